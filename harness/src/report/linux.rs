//! What booting a Linux guest of Linux or Xen costs with the guest hypervisor alone on the machine, under nvmx, and with KVM in
//! nvmx's place.

use crate::backend::Unit;
use crate::text::number;
use crate::transcript::Transcript;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use l2_protocol::{Kind, Level, OwnedRecord};
use nvmx::vmx::exit::BasicReason;

/// The stages that L2 and L3 tell of, and what they are.
pub type Stages = [(&'static str, &'static str)];

/// Those of Linux with KVM. The loads are there on demand.
pub const KVM: [(&str, &str); 13] = [
    ("linux_boot", "L2 boots, from power-on"),
    ("kvm_load", "L2 loads KVM"),
    ("l3_boot", "L3 boots"),
    ("l3_work", "L3 works"),
    ("load_programs", "L3 starts programs"),
    ("load_faults", "L3 takes page faults"),
    ("load_sweep", "L3 sweeps memory"),
    ("load_calls", "L3 calls its kernel"),
    ("load_pipe", "L3 talks by a pipe"),
    ("load_timer", "L3 computes, a timer fires"),
    ("load_barriers", "L3 interrupts its CPUs"),
    ("machine", "VMM of L3, to its end"),
    ("load_guests", "L2 switches among 12 guests"),
];

/// Stages with this beginning are there with `loads=on`; where no boot has them they are left out.
pub const ON_DEMAND: &str = "load_";

/// Those of Xen.
pub const XEN: [(&str, &str); 5] = [
    ("linux_boot", "Xen and dom0 boot, from power-on"),
    ("services", "services of dom0 start"),
    ("l3_boot", "L3 boots"),
    ("l3_work", "L3 works"),
    ("machine", "xl: L3 from file to its end"),
];

/// One boot of the comparison.
pub struct Column<'a> {
    /// Its heading
    pub name: &'a str,
    /// What it said
    pub said: &'a Transcript,
}

/// Stages by boot: ticks, and exits to the KVM that runs L3 by its own count, if one counts.
pub fn render(columns: &[Column<'_>], stages: &Stages, unit: Unit) -> String {
    // With many guests, the last stands for all: the first one finds cold caches.
    let last = |c: &Column<'_>, stage| named(c.said, stage).next_back().cloned();
    let figure = |r: Option<&OwnedRecord>, key| r.and_then(|r| r.number(key).ok()).map(|n| n as f64);
    // Those of L2 itself are KVM's where KVM is L1: another KVM's.
    let exits = |r: Option<&OwnedRecord>| figure(r.filter(|r| r.level == Level::L3), "l0_exits");
    let counted = stages.iter().any(|(stage, _)| columns.iter().any(|c| exits(last(c, stage).as_ref()).is_some()));
    let mut table = table();
    let head = columns.iter().flat_map(|c| {
        let exits = counted.then(|| "exits\nto L2".to_string());
        std::iter::once(format!("{}\n{}", c.name, unit.name())).chain(exits)
    });
    let share = (columns.len() == 3).then(|| "nvmx adds,\nof KVM's".to_string());
    table.set_header(std::iter::once("stage".to_string()).chain(head).chain(share));
    for &(stage, text) in stages {
        if stage.starts_with(ON_DEMAND) && columns.iter().all(|c| last(c, stage).is_none()) {
            continue;
        }
        let cells = columns.iter().flat_map(|c| {
            let record = last(c, stage);
            let exits = counted.then(|| exits(record.as_ref()));
            std::iter::once(figure(record.as_ref(), "ticks")).chain(exits)
        });
        let share = match columns {
            [alone, nvmx, kvm] => Some(added([alone, nvmx, kvm].map(|c| figure(last(c, stage).as_ref(), "ticks")))),
            _ => None,
        };
        table.add_row(std::iter::once(text.to_string()).chain(cells.map(number)).chain(share));
    }
    right(table)
}

/// What the level of nvmx adds to a stage, of what KVM adds in its place: of ticks alone, under nvmx, with KVM.
fn added([alone, nvmx, kvm]: [Option<f64>; 3]) -> String {
    match (alone, nvmx, kvm) {
        (Some(alone), Some(nvmx), Some(kvm)) if kvm > alone => {
            format!("{:.1} %", (nvmx - alone) / (kvm - alone) * 100.0)
        }
        _ => "-".into(),
    }
}

/// What nvmx did for the stages of L3.
pub fn render_nvmx(nested: &Transcript, stages: &Stages) -> String {
    const KEYS: [(&str, &str); 8] = [
        ("hw_exits", "hardware\nexits"),
        ("exits_l2", "of L2"),
        ("exits_l3", "of L3"),
        ("reflected", "reflected"),
        ("trapped_vmread", "trapped\nVMREAD"),
        ("trapped_vmwrite", "trapped\nVMWRITE"),
        ("ept02_fills", "ept02\nfills"),
        ("l1_ticks", "inside\nnvmx"),
    ];
    let mut table = table();
    table.set_header(std::iter::once("nvmx").chain(KEYS.map(|(_, head)| head)));
    for &(stage, text) in stages {
        let Some(record) = named(nested, stage).next_back().filter(|r| r.get("hw_exits").is_some()) else { continue };
        let cells = KEYS.map(|(key, _)| number(record.number(key).ok().map(|n| n as f64)));
        table.add_row(std::iter::once(text.to_string()).chain(cells));
    }
    right(table)
}

/// Exits by reason: of L3 by those that L2 asked for or nvmx took, of L2 by what it executed.
pub fn render_reasons(nested: &Transcript) -> String {
    let mut table = table();
    table.set_header(["exits of L3", "", "exits of L2", ""]);
    let Some(record) = named(nested, "exits").next_back() else { return String::new() };
    let (l3, l2) = (reasons(record.get("l3")), reasons(record.get("l2")));
    let cell = |list: &[(String, u64)], row: usize| match list.get(row) {
        Some((name, count)) => [name.clone(), number(Some(*count as f64))],
        None => [String::new(), String::new()],
    };
    for row in 0..l3.len().max(l2.len()) {
        table.add_row([cell(&l3, row), cell(&l2, row)].concat());
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 1));
        column.set_cell_alignment(if i % 2 == 1 { CellAlignment::Right } else { CellAlignment::Left });
    }
    table.to_string()
}

/// `48:12 30:7` by name.
fn reasons(text: Option<&str>) -> Vec<(String, u64)> {
    let pair = |word: &str| {
        let (reason, count) = word.split_once(':')?;
        Some((BasicReason(reason.parse().ok()?).to_string(), count.parse().ok()?))
    };
    text.unwrap_or_default().split(' ').filter_map(pair).collect()
}

/// The records of measurements with this name.
pub fn named<'a>(said: &'a Transcript, name: &'a str) -> impl DoubleEndedIterator<Item = &'a OwnedRecord> {
    said.of_kind(Kind::Event).filter(move |r| r.get("name") == Some(name))
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn right(mut table: Table) -> String {
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 1));
        if i > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn stages_stand_side_by_side_and_reasons_have_names() {
        let bare = transcript(&["@L3 event name=l3_boot count=1 ticks=4000000 l0_exits=41000"]);
        let nested = transcript(&[
            "@L2 event name=linux_boot count=1 ticks=5",
            "@L3 event name=l3_boot count=1 ticks=5000000 l0_exits=42000 hw_exits=99 exits_l2=50 exits_l3=49",
            "@L2 event name=exits l2=\"25:41004 10:54\" l3=\"30:40785\"",
        ]);
        let text = render(
            &[Column { name: "KVM alone", said: &bare }, Column { name: "under nvmx", said: &nested }],
            &KVM,
            Unit::Instructions,
        );
        let row = text.lines().find(|l| l.contains("L3 boots")).unwrap();
        let cells: Vec<&str> = row.split_whitespace().skip(2).collect();
        assert_eq!(cells, ["4,000,000", "41,000", "5,000,000", "42,000"]);
        assert!(render_nvmx(&nested, &KVM).contains("99"));
        let reasons = render_reasons(&nested);
        assert!(reasons.contains("VMWRITE") && reasons.contains("41,004") && reasons.contains("40,785"), "{reasons}");
    }

    #[test]
    fn what_nvmx_adds_is_a_share_of_what_kvm_adds() {
        let said = [100, 102, 150].map(|n| transcript(&[&*format!("@L3 event name=l3_work count=1 ticks={n}")]));
        let columns: Vec<Column<'_>> = said.iter().map(|said| Column { name: "x", said }).collect();
        let text = render(&columns, &KVM, Unit::Instructions);
        assert!(text.contains("4.0 %") && !text.contains("pipe"), "{text}");
        assert_eq!(added([Some(5.0), Some(6.0), Some(5.0)]), "-");
    }

    #[test]
    fn exits_that_nobody_counts_have_no_column() {
        let said = transcript(&["@L3 event name=l3_boot count=1 ticks=4000000"]);
        let text = render(&[Column { name: "Xen alone", said: &said }], &XEN, Unit::Instructions);
        assert!(text.contains("4,000,000") && !text.contains("exits"), "{text}");
    }
}
