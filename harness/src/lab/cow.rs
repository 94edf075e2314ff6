//! Experiment 7: paravirtual copy-on-write.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 7,
    name: "cow",
    title: "Paravirtual copy-on-write",
    claim: "A hypercall that announces a copy-on-write makes one exit of the two that each such fault takes.",
    condition: "Under shadow paging whose filter lets faults on present pages through, and under EPT where the hypervisor tracks page \
                tables and frames. With plain EPT there is no exit to save.",
    mechanism: "#PF exits by the exception bitmap, filtered by its error code (SDM vol. 3C, \"Exception Bitmap\", \"Page-Fault Error-Code \
                Mask\"); INVLPG by its control; a write to a protected page by EPT violation. VMCALL always exits.",
    method: "A guest with a small kernel \"forks\": 64 pages become read-only and are read once; then the parent writes to each, its kernel \
             copies the page and maps the copy. Without and with a hypercall in place of INVLPG.",
    lacking: &[],
    sources: &[
        "a copy-on-write fault from 3 exits to 2, a kernel build 10% faster: Linux commit 0028425f647b",
        "6 world switches become 2 for a nested EPT fault: HyperTurtle, USENIX ATC 2025",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice, Stack::Trapped],
    judge,
    table,
    plot,
};

/// Name, without and with the hypercall, and the exits of a fault that each takes.
const WAYS: [(&str, &str, &str, f64, f64); 3] = [
    ("shadow paging", "cow/shadow/l3", "cow/shadow_call/l3", 3.0, 2.0),
    ("shadow paging, filter", "cow/filtered/l3", "cow/filtered_call/l3", 2.0, 1.0),
    ("EPT, tracked", "cow/tracked/l3", "cow/tracked_call/l3", 2.0, 1.0),
];
const PLAIN: &str = "cow/ept/l3";

/// Exits of a fault, when the parent writes.
fn per_fault(figures: &Figures, stack: Stack, row: &str) -> Option<f64> {
    Some(figures.get(stack, row, "write_exits")? / figures.get(stack, row, "faults")?)
}

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    for (stack, level) in levels(figures) {
        for (name, without, with, before, after) in WAYS {
            asserts.about(&format!("{level}: {name}: exits of a fault"), per_fault(figures, stack, without), before);
            asserts.about(&format!("{level}: {name}: with the hypercall"), per_fault(figures, stack, with), after);
        }
        let none = asserts.need(per_fault(figures, stack, PLAIN));
        asserts.that(format!("{level}: with plain EPT: {}", number(Some(none))), none == 0.0);
        let (with, without) = (figures.get(stack, WAYS[1].2, "hw_exits"), figures.get(stack, WAYS[1].1, "hw_exits"));
        let fewer = asserts.need(without) - asserts.need(with);
        asserts.that(
            format!("{level}: the filtered fork saves {} hardware exits a page", number(Some(fewer))),
            fewer >= 0.9,
        );
    }
    let level = |stack| {
        let of = |row| per_fault(figures, stack, row).map_or("-".into(), |n| number(Some(n)));
        format!("{} exits to {}", of(WAYS[1].1), of(WAYS[1].2))
    };
    let why = "Two to one where the fault itself does not exit, three to two where it does. What is above a whole number are the first faults \
               after the fork's MOV to CR3, which fill the shadow. The hypercall needs a guest that knows its hypervisor.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "way",
        "level",
        "exits a fault",
        "with hypercall",
        "exits of the fork, a page",
        "with hypercall",
        "hardware exits",
        "with hypercall",
        cycles_word(figures),
        "with hypercall",
    ]);
    for (name, without, with, ..) in WAYS.into_iter().chain([("EPT, plain", PLAIN, "", 0.0, 0.0)]) {
        for (stack, level) in levels(figures) {
            let fault = |row| number(per_fault(figures, stack, row));
            let of = |row, key| number(figures.count(stack, row, key));
            table.rows.push(vec![
                name.into(),
                level.into(),
                fault(without),
                fault(with),
                of(without, "exits"),
                of(with, "exits"),
                of(without, "hw_exits"),
                of(with, "hw_exits"),
                cycles(figures.cycles(stack, without)),
                cycles(figures.cycles(stack, with)),
            ]);
        }
    }
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Hardware exits of a whole fork, per page", false, &["without", "with hypercall"]);
    for (name, without, with, ..) in WAYS {
        for (stack, level) in levels(figures).iter().take(2) {
            plot.group(&format!("{name}, {level}"), [without, with].map(|row| figures.get(*stack, row, "hw_exits")));
        }
    }
    plot
}
