//! The table of `run`, and what it says in plain words.

use super::Event;
use super::model::Range;
use crate::backend::Unit;
use crate::text::{grouped, number};
use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent, presets};

const HEAD: [&str; 13] = [
    "event",
    "handled\nby",
    "native",
    "one\nlevel",
    "under\nnvmx",
    "hardware\nexits",
    "nvmx\nVMREAD",
    "nvmx\nVMWRITE",
    "VMPTRLD\nVMCLEAR",
    "INVEPT\nINVVPID",
    "trapped\nVMREAD",
    "trapped\nVMWRITE",
    "inside\nnvmx",
];

type Figure = fn(&Event) -> Option<f64>;

/// Columns that only some stacks have.
const EXTRA: [(&str, Figure); 7] = [
    ("a tenth\nbelow", |e| e.nested_p10),
    ("a tenth\nabove", |e| e.nested_p90),
    ("cycles\n(model)", |e| e.cycles.map(|range| range.mid)),
    ("exits\nto KVM", |e| e.l0_exits),
    ("KVM\ninstead", |e| e.under_kvm),
    ("its\nexits", |e| e.kvm_exits),
    ("cycles\n(model)", |e| e.kvm_cycles.map(|range| range.mid)),
];

/// Boots that ended before their guest did: what they did not measure was not reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cut {
    /// The guest alone on the machine
    pub alone: bool,
    /// The guest under nvmx
    pub under: bool,
}

/// Columns of [`HEAD`] that go first where the terminal is too narrow for all; then go those that only some stacks have.
const SPARE: [usize; 6] = [9, 8, 7, 6, 11, 10];
/// Columns of [`HEAD`] that go last.
const LAST: [usize; 2] = [1, 2];

/// [`render`] for a terminal of so many columns, with rows of boots that were cut told as such; and how many columns had to be
/// left out.
pub fn fitting(events: &[Event], cut: Cut, width: Option<usize>) -> (String, usize) {
    let extra = HEAD.len()..HEAD.len() + extra(events).count();
    let spare: Vec<usize> = SPARE.into_iter().chain(extra.rev()).chain(LAST).collect();
    for left_out in 0..=spare.len() {
        let text = drawn(events, cut, &spare[..left_out]);
        let wide = text.lines().map(|line| line.trim_end().chars().count()).max().unwrap_or(0);
        if width.is_none_or(|width| wide <= width) || left_out == spare.len() {
            return (text, left_out);
        }
    }
    (String::new(), 0)
}

/// The table: averages per event.
pub fn render(events: &[Event]) -> String {
    drawn(events, Cut::default(), &[])
}

/// The columns that this stack has beside those of [`HEAD`].
fn extra(events: &[Event]) -> impl Iterator<Item = &'static (&'static str, Figure)> {
    EXTRA.iter().filter(|(_, figure)| events.iter().any(|e| figure(e).is_some()))
}

fn drawn(events: &[Event], cut: Cut, left_out: &[usize]) -> String {
    let kept = |row: Vec<String>| -> Vec<String> {
        (0..).zip(row).filter(|(column, _)| !left_out.contains(column)).map(|(_, cell)| cell).collect()
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    use TableComponent::{BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections};
    for rule in [BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections] {
        table.set_style(rule, '─');
    }
    let extra: Vec<&(&str, Figure)> = extra(events).collect();
    table.set_header(kept(HEAD.into_iter().chain(extra.iter().map(|(head, _)| *head)).map(String::from).collect()));
    for e in events {
        let mut row = vec![
            e.event.clone(),
            e.handled_by.clone(),
            number(e.native),
            number(e.one_level),
            number(e.nested),
            number(e.hw_exits),
            number(e.l1_vmread),
            number(e.l1_vmwrite),
            number(sum(e.l1_vmptrld, e.l1_vmclear)),
            number(sum(e.l1_invept, e.l1_invvpid)),
            number(e.trapped_vmread),
            number(e.trapped_vmwrite),
            number(e.l1_instructions),
        ];
        row.extend(extra.iter().map(|(_, figure)| number(figure(e))));
        if cut.under && e.nested.is_none() {
            row[4] = "not reached".into();
        }
        if cut.alone && e.native.is_none() && e.one_level.is_none() {
            row[3] = "not reached".into();
        }
        table.add_row(kept(row));
    }
    let of_text = [0, 1].into_iter().filter(|column| !left_out.contains(column)).count();
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 0));
        if i >= of_text {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// The line above the table.
pub fn title(unit: Unit) -> String {
    let how = match unit {
        Unit::Instructions => "counted, exact and repeatable",
        Unit::Cycles => "timed by the TSC",
    };
    format!("What each event of the guest costs, in {} per event ({how}); `-`: does not apply", unit.name())
}

/// The table's gist.
pub fn footer(events: &[Event], unit: Unit) -> Vec<String> {
    let mut lines = Vec::new();
    let find = |name: &str| events.iter().find(|e| e.event == name);
    let unit = unit.name();
    if let Some((e, nested)) = find("cpuid").and_then(|e| Some((e, e.nested?))) {
        let native = e.native.map_or(String::new(), |v| format!("{} without a hypervisor, ", number(Some(v))));
        let one = e.one_level.map_or(String::new(), |v| format!("{} with one, ", number(Some(v))));
        lines.push(format!(
            "A CPUID of L3 that L2 handles costs {native}{one}{} {unit} under nvmx.",
            number(Some(nested))
        ));
        if let (Some(exits), Some(inside)) = (e.hw_exits, e.l1_instructions) {
            let trapped = sum(e.trapped_vmread, e.trapped_vmwrite);
            lines.push(format!(
                "nvmx takes {} hardware exits for it, spends {} {unit} inside itself, and {} VMREAD/VMWRITE of L2 trap.",
                number(Some(exits)),
                number(Some(inside)),
                number(trapped)
            ));
        }
    }
    if let Some((nested, kvm)) = find("cpuid").and_then(|e| Some((e.nested?, e.under_kvm?))) {
        let times = number(Some(kvm / nested.max(1.0)));
        lines.push(format!("With KVM in nvmx's place it costs {} {unit}: {times} times as much.", number(Some(kvm))));
    }
    if let Some((e, own)) = find("cpuid").and_then(|e| Some((e, e.cycles?))) {
        let kvm = e.kvm_cycles.map_or(String::new(), |kvm| {
            let times = number(Some((kvm.mid / own.mid.max(1.0) * 10.0).round() / 10.0));
            format!(", with KVM in its place at least {}: {times} times as many", spread(kvm))
        });
        lines.push(format!(
            "An exit costs a processor about a thousand cycles and no instruction. In cycles by a model (./nvmx lab --model): {}{kvm}.",
            spread(own)
        ));
    }
    let own = find("l2_cpuid").filter(|e| e.hw_exits.is_some());
    if let Some(e) = own {
        let (exits, inside) = (number(e.hw_exits), number(e.l1_instructions));
        lines.push(format!(
            "A CPUID of L2 itself, which nvmx answers alone: {exits} hardware exit, {inside} {unit} inside nvmx."
        ));
    }
    lines
}

/// "5,400 (3,900 to 9,600)"
fn spread(range: Range) -> String {
    let [low, mid, high] = [range.low, range.mid, range.high].map(|v| grouped(v.round() as u64));
    format!("{mid} ({low} to {high})")
}

fn sum(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    if a.is_none() && b.is_none() { None } else { Some(a.unwrap_or(0.0) + b.unwrap_or(0.0)) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn each_event_has_its_row_with_all_three_costs() {
        let text = render(&sample());
        let row = text.lines().find(|l| l.trim_start().starts_with("cpuid")).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells, ["cpuid", "L2", "3", "260", "1,200", "2", "19", "-", "-", "-", "-", "-", "900"]);
        assert!(text.lines().any(|l| l.trim_start().starts_with("l2_cpuid")));
    }

    #[test]
    fn what_a_boot_that_was_cut_did_not_measure_is_not_reached() {
        let mut events = sample();
        events[0].nested = None;
        let text = fitting(&events, Cut { under: true, alone: false }, None).0;
        let row = text.lines().find(|l| l.trim_start().starts_with("cpuid")).unwrap();
        assert!(row.contains("not reached"), "{text}");
        assert!(!fitting(&events, Cut::default(), None).0.contains("not reached"));
        assert!(!footer(&events, Unit::Instructions).join("\n").contains("A CPUID of L3"));
    }

    #[test]
    fn a_narrow_terminal_gets_fewer_columns() {
        let wide = |text: &str| text.lines().map(|l| l.trim_end().chars().count()).max().unwrap();
        let (all, none) = fitting(&sample(), Cut::default(), None);
        assert_eq!((none, all.contains("INVVPID")), (0, true));
        let (text, left_out) = fitting(&sample(), Cut::default(), Some(80));
        assert!(wide(&text) <= 80 && left_out > 0 && text.contains("inside"), "{text}");
        let mut events = sample();
        events[0].kvm_exits = Some(7.0);
        let (text, left_out) = fitting(&events, Cut::default(), Some(50));
        assert!(wide(&text) <= 50 && left_out == SPARE.len() + 2, "{text}");
        assert!(text.contains("under") && text.contains("exits"), "{text}");
        let (_, most) = fitting(&events, Cut::default(), Some(10));
        assert_eq!(most, SPARE.len() + 1 + LAST.len());
    }

    #[test]
    fn columns_for_kvm_appear_where_kvm_was_measured() {
        let mut events = sample();
        assert!(!render(&events).contains("instead"));
        events[0].under_kvm = Some(15_000.0);
        let text = render(&events);
        let row = text.lines().find(|l| l.trim_start().starts_with("cpuid")).unwrap();
        assert!(text.contains("instead") && row.trim_end().ends_with("15,000"), "{text}");
        assert!(
            footer(&events, Unit::Instructions).join("\n").contains("costs 15,000 instructions: 12.5 times as much")
        );
    }

    #[test]
    fn modelled_cycles_are_labelled_so() {
        let mut events = sample();
        (events[0].under_kvm, events[0].kvm_exits) = (Some(15_000.0), Some(2.0));
        super::super::add_cycles(&mut events);
        assert!(render(&events).contains("(model)"));
        let text = footer(&events, Unit::Instructions).join("\n");
        assert!(text.contains("by a model") && text.contains("with KVM in its place at least"), "{text}");
    }

    #[test]
    fn the_gist_is_told_in_words() {
        let text = footer(&sample(), Unit::Instructions).join("\n");
        assert!(text.contains("costs 3 without a hypervisor, 260 with one, 1,200 instructions under nvmx"), "{text}");
        assert!(text.contains("nvmx takes 2 hardware exits for it"), "{text}");
        assert!(text.contains("A CPUID of L2 itself, which nvmx answers alone: 1 hardware exit"), "{text}");
        assert!(footer(&[], Unit::Cycles).is_empty());
    }
}
