//! Instructions that nvmx completes or refuses: the guest `native` sees under nvmx what it sees bare, combination by combination.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::Session;
use crate::transcript::Transcript;
use anyhow::Result;
use l2_protocol::{Kind, OwnedRecord};

/// The combinations that must have been tried at least.
const LEAST: usize = 15_000;
/// Characters of a record that stand for one combination.
const DIGITS: usize = 2;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let names = ["native-bare", "native-zero-copy", "native-trapped"];
    let mut boot = |name: &str, spec: Result<crate::backend::Spec>| {
        let named = spec.map(|spec| crate::backend::Spec { name: name.into(), ..spec });
        suite.boots.insert(name.into(), named.map_err(|e| format!("{e:#}")));
    };
    boot(names[0], session.bare("native", ""));
    boot(names[1], session.nested("native", "", Fields::ZeroCopy));
    boot(names[2], session.nested("native", "", Fields::Trapped));
    suite.clamps.insert(names[0].into(), names[1].into());
    const NAME: &str = "instructions that nvmx completes or refuses look as on the bare machine";
    for (name, nested) in [(NAME.into(), names[1]), (format!("{NAME}, with trapped field access"), names[2])] {
        let judge: Judge = Box::new(|o| agree(o[0], o[1]));
        suite.cases.push(Case { name, boots: vec![names[0].into(), nested.into()], judge });
    }
}

/// Both passed, tried enough, and saw the same; else the combinations that differ are named.
fn agree(one: &Outcome, other: &Outcome) -> Result<(), String> {
    all_pass(&[one, other])?;
    let differ = differences(&one.transcript, &other.transcript);
    if !differ.is_empty() {
        const SHOWN: usize = 12;
        let shown = &differ[..differ.len().min(SHOWN)];
        let how = "all of them: `./nvmx diff --l2 native --l2-args detail=NAME`, without `in MODE, SITUATION`";
        return Err(format!("{} combinations differ; {how}:\n  {}", differ.len(), shown.join("\n  ")));
    }
    compare::agree(one, other)?;
    let tried = record(&one.transcript, "combinations").and_then(|r| r.get("count")?.parse::<usize>().ok());
    match tried {
        Some(LEAST..) => Ok(()),
        other => Err(format!("{other:?} combinations were tried, at least {LEAST} are wanted")),
    }
}

fn record<'a>(transcript: &'a Transcript, name: &str) -> Option<&'a OwnedRecord> {
    transcript.of_kind(Kind::Check).find(|r| r.get("name") == Some(name))
}

/// The names of the combinations whose digests differ.
fn differences(one: &Transcript, other: &Transcript) -> Vec<String> {
    let mut found = Vec::new();
    for left in one.of_kind(Kind::Check) {
        let (Some(name), Some(seen)) = (left.get("name"), left.get("seen")) else { continue };
        let Some(seen_by_other) = record(other, name).and_then(|r| r.get("seen")) else { continue };
        for (mode, other_mode) in seen.split(',').zip(seen_by_other.split(',')) {
            let (Some((mode, digests)), Some((_, others))) = (mode.split_once(':'), other_mode.split_once(':')) else {
                continue;
            };
            let (mode, list) = mode.split_at(mode.len().saturating_sub(1));
            let situations = record(one, &format!("situations {list}")).and_then(|r| r.get("names")).unwrap_or("");
            let pairs = |text: &str| text.as_bytes().chunks(DIGITS).map(<[u8]>::to_vec).collect::<Vec<_>>();
            for ((situation, a), b) in situations.split(',').zip(pairs(digests)).zip(pairs(others)) {
                if a != b {
                    found.push(format!("{name} in {mode}, {situation}"));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transcript::Line;

    fn transcript(seen: &str) -> Transcript {
        let lines = [
            "@L2 check name=\"situations a\" names=plain,plain_tf".to_string(),
            "@L2 check name=\"situations b\" names=plain,end".to_string(),
            format!("@L2 check name=\"L2: cpuid 0\" seen={seen} digest=0x1 cases=4"),
        ];
        Transcript { lines: lines.iter().map(|line| Line::parse(line)).collect() }
    }

    #[test]
    fn the_combinations_that_differ_are_named() {
        let bare = transcript("kernel64a:0011,kernel32b:2233");
        assert!(differences(&bare, &bare).is_empty());
        let nested = transcript("kernel64a:0012,kernel32b:2x33");
        assert_eq!(
            differences(&bare, &nested),
            ["L2: cpuid 0 in kernel64, plain_tf", "L2: cpuid 0 in kernel32, plain"]
        );
    }
}
