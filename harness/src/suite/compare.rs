//! Two boots of one guest, record by record.

use crate::boot::Outcome;
use crate::transcript::{Line, Transcript};
use l2_protocol::{Kind, OwnedRecord};
use std::collections::{BTreeMap, BTreeSet};

/// A difference that is allowed, and why.
pub struct Waiver {
    /// The name of the `check` record
    pub check: &'static str,
    /// The key whose value may differ
    pub key: &'static str,
    /// Why it may
    pub why: &'static str,
}

/// The differences that architecture allows. Each is a decision: keep this short.
pub const WAIVERS: &[Waiver] = &[];

/// What came of comparing two boots.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// Check records, those that only one boot has included; one that speaks for many cases (`cases=`) counts as many
    pub compared: usize,
    /// Records that differ only where they may
    pub waived: usize,
    /// The others that differ
    pub differ: Vec<Difference>,
}

/// A record that differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Level and name, and how many of that name came before
    pub key: (String, usize),
    /// The part of the guest that printed it, if it has parts
    pub part: Option<String>,
    /// The keys that differ
    pub keys: Vec<String>,
    /// The record of the first boot
    pub one: Option<OwnedRecord>,
    /// ... and of the other
    pub other: Option<OwnedRecord>,
}

impl Difference {
    /// What differs, a line each; the boots are called by these names.
    pub fn lines(&self, one: &str, other: &str) -> Vec<String> {
        match (&self.one, &self.other) {
            (Some(left), Some(right)) => {
                let name = left.get("name").unwrap_or("?");
                let text = |r: &OwnedRecord, key: &str| r.get(key).unwrap_or("(absent)").to_string();
                let line = |key: &String| format!("{name}: {key}={} against {}", text(left, key), text(right, key));
                self.keys.iter().map(line).collect()
            }
            (Some(left), None) => vec![format!("{}: only in {one}: {}", self.key.0, short(left))],
            (None, Some(right)) => vec![format!("{}: only in {other}: {}", self.key.0, short(right))],
            (None, None) => Vec::new(),
        }
    }
}

/// Compares the `check` records of two boots of one guest.
pub fn compare(one: &Transcript, other: &Transcript) -> Comparison {
    let (a, b) = (checks(one), checks(other));
    let mut result = Comparison::default();
    let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let (left, right) = (a.get(key), b.get(key));
        let cases = left.or(right).and_then(|found| found.record.get("cases")?.parse().ok());
        result.compared += cases.unwrap_or(1);
        let (keys, waived) = match (left, right) {
            (Some(left), Some(right)) => differ(left.record, right.record),
            _ => (Vec::new(), 0),
        };
        if left.is_some() == right.is_some() && keys.is_empty() {
            result.waived += usize::from(waived > 0);
            continue;
        }
        result.differ.push(Difference {
            key: key.clone(),
            part: left.or(right).and_then(|c| c.part).map(str::to_string),
            keys,
            one: left.map(|c| c.record.clone()),
            other: right.map(|c| c.record.clone()),
        });
    }
    result
}

/// Every `check` record is the same in both boots, which passed.
///
/// # Errors
/// The first differences, one per line.
pub fn agree(one: &Outcome, other: &Outcome) -> Result<(), String> {
    for boot in [one, other] {
        boot.verdict().map_err(|e| format!("{}: {e}; nothing to compare", boot.name))?;
    }
    if checks(&one.transcript).is_empty() {
        return Err(format!("{} has no check records: nothing is compared", one.name));
    }
    let comparison = compare(&one.transcript, &other.transcript);
    let mut differences: Vec<String> = comparison.differ.iter().flat_map(|d| d.lines(&one.name, &other.name)).collect();
    if differences.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 12;
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    if more > 0 {
        differences.push(format!("... and {more} more"));
    }
    let (count, compared) = (comparison.differ.len(), comparison.compared);
    Err(format!(
        "{} and {} differ in {count} of {compared} records:\n  {}",
        one.name,
        other.name,
        differences.join("\n  ")
    ))
}

/// Both nvmx gave the same reasons for what they refused, and at least so many.
///
/// # Errors
/// The first reasons that differ.
pub fn explain_alike(one: &Outcome, other: &Outcome, least: usize) -> Result<(), String> {
    for boot in [one, other] {
        boot.verdict().map_err(|e| format!("{}: {e}", boot.name))?;
    }
    let [left, right] = [one, other].map(|o| o.transcript.of_kind(Kind::Explained).collect::<Vec<_>>());
    if left.len() < least || left.len() != right.len() {
        return Err(format!("{} and {} explanations; at least {least} expected", left.len(), right.len()));
    }
    match left.iter().zip(&right).find(|(left, right)| left != right) {
        Some((left, right)) => Err(format!("{left}\n  against {right}")),
        None => Ok(()),
    }
}

/// A check record and where it is from.
struct Found<'a> {
    record: &'a OwnedRecord,
    part: Option<&'a str>,
}

/// By name and how many of that name came before: an extra record shifts only its own name.
fn checks(transcript: &Transcript) -> BTreeMap<(String, usize), Found<'_>> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = BTreeMap::new();
    let mut part = None;
    for line in &transcript.lines {
        let record = match line {
            Line::Record(record) if record.kind == Kind::Check => record,
            Line::Text(text) => {
                // How guests announce a part: `[L2] part NAME`.
                part = text.split_once("] part ").map(|(_, name)| name.trim()).or(part);
                continue;
            }
            _ => continue,
        };
        let name = format!("{} {}", record.level, record.get("name").unwrap_or("?"));
        let number = seen.entry(name.clone()).or_insert(0);
        all.insert((name, *number), Found { record, part });
        *number += 1;
    }
    all
}

/// Enough of a record to find it.
fn short(record: &OwnedRecord) -> String {
    let text = record.to_string();
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text,
    }
}

/// The keys that differ and may not, and how many differ and may.
fn differ(left: &OwnedRecord, right: &OwnedRecord) -> (Vec<String>, usize) {
    let name = left.get("name").unwrap_or("?");
    let mut keys: Vec<&str> = left.fields.iter().chain(&right.fields).map(|(k, _)| k.as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.retain(|key| left.get(key) != right.get(key));
    let all = keys.len();
    keys.retain(|key| !WAIVERS.iter().any(|w| w.check == name && w.key == *key));
    (keys.iter().map(|k| k.to_string()).collect(), all - keys.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;

    fn outcome(name: &str, lines: &[&str]) -> Outcome {
        boot::tests::outcome(name, &[lines, &["@L2 end status=pass failed=0"]].concat())
    }

    #[test]
    fn a_record_for_many_cases_counts_as_many() {
        let one = outcome("bare", &["@L2 check name=group cases=100 digest=1", "@L2 check name=b"]);
        let other = outcome("nvmx", &["@L2 check name=group cases=100 digest=2"]);
        let found = compare(&one.transcript, &other.transcript);
        assert_eq!((found.compared, found.differ.len()), (101, 2));
    }

    #[test]
    fn a_changed_value_and_a_missing_record_are_named() {
        let one = outcome("bare", &["@L2 check name=a x=1 y=2", "@L2 check name=b", "@L2 event name=e ticks=1"]);
        let same = outcome("nvmx", &["@L2 check name=b", "@L2 check name=a x=1 y=2", "@L2 event name=e ticks=9"]);
        assert_eq!(agree(&one, &same), Ok(()));
        let other = outcome("nvmx", &["@L2 check name=a x=1 y=3 z=1"]);
        let text = agree(&one, &other).unwrap_err();
        assert!(text.contains("a: y=2 against 3"), "{text}");
        assert!(text.contains("a: z=(absent) against 1"));
        assert!(text.contains("L2 b: only in bare"));
        assert!(agree(&other, &one).unwrap_err().contains("L2 b: only in bare"));
    }

    #[test]
    fn a_difference_knows_both_records_and_the_part_that_printed_them() {
        let one =
            outcome("bare", &["[L2] part modes", "@L2 check name=a x=1", "[L2] part traps", "@L2 check name=b x=1"]);
        let other =
            outcome("nvmx", &["[L2] part modes", "@L2 check name=a x=1", "[L2] part traps", "@L2 check name=b x=2"]);
        let found = compare(&one.transcript, &other.transcript);
        assert_eq!((found.compared, found.waived, found.differ.len()), (2, 0, 1));
        let difference = &found.differ[0];
        assert_eq!((difference.part.as_deref(), difference.keys.as_slice()), (Some("traps"), &["x".to_string()][..]));
        assert_eq!(difference.one.as_ref().unwrap().get("x"), Some("1"));
        assert_eq!(difference.other.as_ref().unwrap().get("x"), Some("2"));
    }

    #[test]
    fn records_of_one_name_are_compared_in_their_order() {
        let one = outcome("bare", &["@L2 check name=a x=1", "@L2 check name=a x=2"]);
        let swapped = outcome("nvmx", &["@L2 check name=a x=2", "@L2 check name=a x=1"]);
        assert!(agree(&one, &swapped).unwrap_err().contains("a: x=1 against 2"));
    }

    #[test]
    fn explanations_are_compared_one_by_one() {
        let one = outcome("zero-copy", &["@L2 explained rule=A what=2", "@L2 explained rule=B what=3"]);
        let other = outcome("trapped", &["@L2 explained rule=A what=2", "@L2 explained rule=C what=3"]);
        assert_eq!(explain_alike(&one, &one, 2), Ok(()));
        assert!(explain_alike(&one, &one, 3).unwrap_err().contains("at least 3"));
        assert!(explain_alike(&one, &other, 2).unwrap_err().contains("rule=C"));
    }

    #[test]
    fn boots_without_check_records_do_not_agree() {
        let empty = outcome("bare", &[]);
        assert!(agree(&empty, &empty).is_err());
        let unfinished = outcome("nvmx", &["@L2 check name=a", "@L1 epitaph who=L2 where=x why=y"]);
        let whole = outcome("bare", &["@L2 check name=a"]);
        assert!(agree(&whole, &unfinished).is_err());
    }

    #[test]
    fn every_waiver_has_its_reason() {
        assert!(WAIVERS.iter().all(|w| w.why.len() > 20 && !w.check.is_empty() && !w.key.is_empty()));
    }
}
