//! From records of the guest to figures.

use super::figures::{Boot, CALIBRATION, Row};
use crate::transcript::Transcript;
use l2_protocol::{Kind, OwnedRecord};

/// Keys that are no sums over the events of a bracket.
const FACTS: [&str; 25] = [
    "ring3_trap",
    "ring1_trap",
    "ring1_wrong",
    "umip_trap",
    "guest_exits",
    "guest_wrong",
    "tables_exits",
    "own_idt",
    "in_ring_0",
    "cli_shows",
    "wakes_up",
    "traps",
    "seen",
    "missed",
    "oldest",
    "guest_faults",
    "hidden",
    "reflected_faults",
    "references",
    "ept_entries",
    "marked",
    "faults",
    "write_exits",
    "alarms",
    "harm",
];
/// Words of a record that are no figures.
const WORDS: [&str; 4] = ["experiment", "name", "scope", "missing"];

impl Boot {
    /// Reads a boot. With `depth` nvmx below the guest, hardware exits are those that the outermost counted.
    pub fn read(transcript: &Transcript, depth: u32) -> Self {
        let mut boot = Boot::default();
        let records = || transcript.of_kind(Kind::Event).filter(|r| r.get("experiment").is_some());
        for record in records() {
            let experiment = record.get("experiment").unwrap_or_default();
            if let Some(what) = record.get("missing") {
                boot.missing.entry(experiment.into()).or_default().push(what.into());
                continue;
            }
            let Some((name, scope)) = record.get("name").zip(record.get("scope")) else { continue };
            let empty = records().find(|r| r.get("experiment") == Some(CALIBRATION) && r.get("scope") == Some(scope));
            if experiment != CALIBRATION {
                boot.rows.insert(format!("{experiment}/{name}/{scope}"), row(record, empty, depth));
            }
        }
        boot
    }
}

fn number(record: &OwnedRecord, key: &str) -> Option<f64> {
    record.get(key)?.parse::<f64>().ok()
}

/// A row: sums become averages per event, without what the bracket itself costs. What nvmx counted is one sum over all of them.
fn row(record: &OwnedRecord, empty: Option<&OwnedRecord>, depth: u32) -> Row {
    let count = number(record, "count").unwrap_or(1.0).max(1.0);
    let average = |key: &str| {
        let own = number(record, key)?;
        let bracket = empty.and_then(|r| number(r, key)).unwrap_or(0.0);
        // Six decimals: one exit of a million events is still seen.
        Some(((own - bracket) / count * 1e6).round() / 1e6 + 0.0)
    };
    // A row that holds only facts has no bracket.
    let bracket = number(record, "ticks").is_some_and(|ticks| ticks > 0.0);
    let mut row = Row::from([("count".to_string(), count)]);
    for (key, _) in record.fields.iter().filter(|(key, _)| !WORDS.contains(&key.as_str())) {
        let key = key.as_str();
        if FACTS.contains(&key) {
            row.extend(number(record, key).map(|value| (key.to_string(), value)));
        } else if bracket && (key == "ticks" || key == "exits" || key.starts_with("x_") || key == "l0_exits") {
            row.extend(average(key).map(|value| (key.to_string(), value)));
        }
    }
    if !bracket {
        return row;
    }
    let prefix = |k: u32| if k == 0 { String::new() } else { format!("below{k}_") };
    let sum = |keys: &[&str]| -> f64 {
        (0..depth).flat_map(|k| keys.iter().filter_map(move |key| average(&format!("{}{key}", prefix(k))))).sum()
    };
    if depth > 0 {
        let outermost = prefix(depth - 1);
        row.extend(average(&format!("{outermost}hw_exits")).map(|value| ("hw_exits".into(), value)));
        row.insert("accesses".into(), sum(&["l1_vmread", "l1_vmwrite"]));
        row.insert("pointers".into(), sum(&["l1_vmptrld", "l1_vmclear"]));
        row.insert("invalidations".into(), sum(&["l1_invept", "l1_invvpid"]));
        let trapped = ["trapped_vmread", "trapped_vmwrite"].into_iter().filter_map(average).sum::<f64>();
        row.insert("own_accesses".into(), trapped);
    } else if let Some(exits) = average("exits") {
        row.insert("hw_exits".into(), exits);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn a_row_is_an_average_without_its_bracket_and_hardware_exits_are_the_outermosts() {
        let boot = Boot::read(
            &transcript(&[
                "@L2 event experiment=calibration name=empty scope=l3 count=1 ticks=50 exits=0 hw_exits=2 below1_hw_exits=8 l1_vmread=5 below1_l1_vmread=1",
                "@L2 event experiment=price name=cpuid scope=l3 count=10 ticks=1050 exits=10 x_cpuid=10 hw_exits=22 below1_hw_exits=88 l1_vmread=15 below1_l1_vmread=21",
                "@L2 event experiment=mmio missing=\"page-modification log\"",
            ]),
            2,
        );
        let row = &boot.rows["price/cpuid/l3"];
        let figures = ["ticks", "exits", "x_cpuid", "hw_exits", "accesses"].map(|key| row[key]);
        assert_eq!(figures, [100.0, 1.0, 1.0, 8.0, 3.0]);
        assert_eq!(boot.missing["mmio"], ["page-modification log"]);
    }

    #[test]
    fn facts_are_not_divided() {
        let line = "@L2 event experiment=rings name=sidt scope=native count=1 ticks=0 exits=0 ring3_trap=13";
        let boot = Boot::read(&transcript(&[line]), 0);
        assert_eq!(boot.rows["rings/sidt/native"]["ring3_trap"], 13.0);
        assert!(!boot.rows["rings/sidt/native"].contains_key("ticks"));
    }
}
