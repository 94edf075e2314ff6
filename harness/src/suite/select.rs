//! Which cases run: by name, and by the share of a machine among several.

use super::{Case, Suite};
use crate::shard::Shard;
use std::collections::{BTreeMap, BTreeSet};

/// What the user wants of the cases; without anything all.
#[derive(Clone, Default, Debug)]
pub struct Selection {
    /// With one of these in the name
    pub contains: Vec<String>,
    /// With one of these as the name
    pub exact: Vec<String>,
    /// Without any of these in the name
    pub exclude: Vec<String>,
    /// Those that take long too
    pub long: bool,
    /// Of those, a share
    pub shard: Option<Shard>,
}

impl Selection {
    fn has(&self, name: &str) -> bool {
        let wanted = self.contains.is_empty() && self.exact.is_empty()
            || self.contains.iter().any(|text| name.contains(text))
            || self.exact.iter().any(|text| name == text);
        wanted && !self.exclude.iter().any(|text| name.contains(text))
    }

    /// The names of exact filters that no case has.
    pub fn unknown<'a>(&'a self, suite: &Suite) -> Vec<&'a str> {
        let known = |name: &&String| suite.cases.iter().any(|case| case.name == **name);
        self.exact.iter().filter(|name| !known(name)).map(String::as_str).collect()
    }
}

impl Suite {
    /// Keeps the cases that are selected, and their boots.
    pub fn select(&mut self, selection: &Selection) {
        let named = !(selection.contains.is_empty() && selection.exact.is_empty());
        let long = &self.long;
        let wanted = |name: &str| selection.has(name) && (selection.long || named || !long.contains(name));
        self.cases.retain(|case| wanted(&case.name));
        if let Some(shard) = selection.shard {
            let mine: BTreeSet<String> = shares(&self.cases, shard.of).swap_remove(shard.number - 1);
            self.cases.retain(|case| mine.contains(&case.name));
        }
        self.keep_boots();
    }

    /// Keeps the cases of these names, and their boots.
    pub fn keep(&mut self, names: &BTreeSet<String>) {
        self.cases.retain(|case| names.contains(&case.name));
        self.keep_boots();
    }

    fn keep_boots(&mut self) {
        let needed = self.order();
        self.boots.retain(|name, _| needed.contains(name));
    }
}

/// The names of the cases in each of so many shares. Cases that use a boot in common stay together, and the share with the
/// fewest boots gets the next, so that all machines have about as much to do and no boot runs twice.
fn shares(cases: &[Case], count: usize) -> Vec<BTreeSet<String>> {
    let mut groups: Vec<(BTreeSet<&str>, Vec<&str>)> = Vec::new();
    for case in cases {
        let mut boots: BTreeSet<&str> = case.boots.iter().map(String::as_str).collect();
        let mut names = vec![case.name.as_str()];
        let (joined, others) = groups.into_iter().partition(|(theirs, _)| !theirs.is_disjoint(&boots));
        groups = others;
        for (theirs, more) in Vec::from_iter::<Vec<_>>(joined) {
            boots.extend(theirs);
            names.extend(more);
        }
        groups.push((boots, names));
    }
    groups.sort_by_key(|(boots, names)| (std::cmp::Reverse(boots.len()), names.iter().min().copied()));
    let mut shares: Vec<(usize, BTreeSet<String>)> = vec![(0, BTreeSet::new()); count];
    for (boots, names) in groups {
        if let Some(least) = shares.iter_mut().min_by_key(|(boots, _)| *boots) {
            least.0 += boots.len();
            least.1.extend(names.into_iter().map(str::to_string));
        }
    }
    shares.into_iter().map(|(_, names)| names).collect()
}

/// The topics that need something dear set up, of those that a selection of cases touches.
pub fn topics(suite: &Suite, topic_of: &BTreeMap<String, &'static str>) -> BTreeSet<&'static str> {
    suite.cases.iter().filter_map(|case| topic_of.get(&case.name).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(cases: &[(&str, &[&str])]) -> Suite {
        let case = |(name, boots): &(&str, &[&str])| Case {
            name: name.to_string(),
            boots: boots.iter().map(|b| b.to_string()).collect(),
            judge: Box::new(|_| Ok(())),
        };
        let boots = cases.iter().flat_map(|(_, boots)| boots.iter().map(|b| (b.to_string(), Err("x".to_string()))));
        Suite { boots: boots.collect(), cases: cases.iter().map(case).collect(), ..Suite::default() }
    }

    const CASES: [(&str, &[&str]); 5] = [
        ("a passes", &["a"]),
        ("a agrees", &["a", "b"]),
        ("c passes", &["c"]),
        ("d passes", &["d"]),
        ("d agrees", &["d", "e", "f"]),
    ];

    fn names(selection: &Selection) -> Vec<String> {
        let mut suite = suite(&CASES);
        suite.select(selection);
        suite.cases.into_iter().map(|case| case.name).collect()
    }

    #[test]
    fn filters_are_contained_exact_or_exclude() {
        let of = |list: &[&str]| list.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&Selection::default()).len(), 5);
        assert_eq!(names(&Selection { contains: of(&["agrees"]), ..Default::default() }), ["a agrees", "d agrees"]);
        let exact = Selection { exact: of(&["c passes", "pass"]), ..Default::default() };
        assert_eq!(names(&exact), ["c passes"]);
        assert_eq!(exact.unknown(&suite(&CASES)), ["pass"]);
        let but = Selection { contains: of(&["passes"]), exclude: of(&["a "]), ..Default::default() };
        assert_eq!(names(&but), ["c passes", "d passes"]);
    }

    #[test]
    fn what_takes_long_runs_only_if_it_is_asked_for() {
        let run = |selection: &Selection| {
            let mut suite = suite(&CASES);
            suite.long.insert("c passes".into());
            suite.select(selection);
            suite.cases.iter().any(|case| case.name == "c passes")
        };
        assert!(!run(&Selection::default()) && run(&Selection { long: true, ..Default::default() }));
        assert!(run(&Selection { contains: vec!["c pass".into()], ..Default::default() }));
    }

    #[test]
    fn shards_together_are_everything_once_and_share_no_boot() {
        for of in 1..=6 {
            let mut all = Vec::new();
            let mut boots = Vec::new();
            for number in 1..=of {
                let mut part = suite(&CASES);
                part.select(&Selection { shard: Some(Shard { number, of }), ..Default::default() });
                all.extend(part.cases.into_iter().map(|case| case.name));
                boots.extend(part.boots.into_keys());
            }
            all.sort();
            let mut expected = CASES.map(|(name, _)| name.to_string());
            expected.sort();
            assert_eq!(all, expected);
            assert_eq!(boots.len(), 6, "a boot runs in two shards of {of}");
        }
    }

    #[test]
    fn a_shard_is_written_k_of_n() {
        assert_eq!("2/4".parse(), Ok(Shard { number: 2, of: 4 }));
        for text in ["0/4", "5/4", "2", "a/b", "1/0", "-1/4"] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
        let share = |number| Shard { number, of: 3 };
        assert_eq!([1, 2, 3].map(|n| share(n).range(10)), [(0, 3), (3, 3), (6, 4)]);
        assert_eq!(share(2).of(vec![1, 2, 3, 4, 5]), [2, 5]);
    }
}
