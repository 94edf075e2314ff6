//! Two boots of one guest, record by record.

use crate::boot::Outcome;
use l2_protocol::{Kind, OwnedRecord};
use std::collections::BTreeMap;

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

/// Every `check` record is the same in both boots.
///
/// # Errors
/// The first differences, one per line.
pub fn agree(one: &Outcome, other: &Outcome) -> Result<(), String> {
    for boot in [one, other] {
        boot.verdict().map_err(|e| format!("{}: {e}; nothing to compare", boot.name))?;
    }
    let (a, b) = (checks(one), checks(other));
    if a.is_empty() {
        return Err(format!("{} has no check records: nothing is compared", one.name));
    }
    let mut differences = Vec::new();
    for (key, left) in &a {
        match b.get(key) {
            None => differences.push(format!("{}: only in {}: {}", key.0, one.name, short(left))),
            Some(right) => differences.extend(differ(left, right)),
        }
    }
    for (key, right) in &b {
        if !a.contains_key(key) {
            differences.push(format!("{}: only in {}: {}", key.0, other.name, short(right)));
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 12;
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    if more > 0 {
        differences.push(format!("... and {more} more"));
    }
    Err(format!("{} ({}) and {} ({}) differ:\n  {}", one.name, a.len(), other.name, b.len(), differences.join("\n  ")))
}

/// By name and how many of that name came before: an extra record shifts only its own name.
fn checks(outcome: &Outcome) -> BTreeMap<(String, usize), &OwnedRecord> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = BTreeMap::new();
    for record in outcome.transcript.of_kind(Kind::Check) {
        let name = format!("{} {}", record.level, record.get("name").unwrap_or("?"));
        let number = seen.entry(name.clone()).or_insert(0);
        all.insert((name, *number), record);
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

fn differ(left: &OwnedRecord, right: &OwnedRecord) -> Vec<String> {
    let name = left.get("name").unwrap_or("?");
    let mut keys: Vec<&str> = left.fields.iter().chain(&right.fields).map(|(k, _)| k.as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    let waived = |key: &str| WAIVERS.iter().any(|w| w.check == name && w.key == key);
    let text = |r: &OwnedRecord, key: &str| r.get(key).unwrap_or("(absent)").to_string();
    keys.into_iter()
        .filter(|key| left.get(key) != right.get(key) && !waived(key))
        .map(|key| format!("{name}: {key}={} against {}", text(left, key), text(right, key)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Ended;
    use crate::transcript::{Line, Transcript};
    use std::time::Duration;

    fn outcome(name: &str, lines: &[&str]) -> Outcome {
        let end = Line::parse("@L2 end status=pass failed=0");
        Outcome {
            name: name.into(),
            transcript: Transcript { lines: lines.iter().map(|l| Line::parse(l)).chain([end]).collect() },
            ended: Ended::Itself,
            machine: Vec::new(),
            took: Duration::ZERO,
            folder: "/".into(),
        }
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
    fn records_of_one_name_are_compared_in_their_order() {
        let one = outcome("bare", &["@L2 check name=a x=1", "@L2 check name=a x=2"]);
        let swapped = outcome("nvmx", &["@L2 check name=a x=2", "@L2 check name=a x=1"]);
        assert!(agree(&one, &swapped).unwrap_err().contains("a: x=1 against 2"));
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
