//! Experiment 5: EPT against shadow paging.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 5,
    name: "paging",
    title: "EPT against shadow paging",
    claim: "With EPT the exits of a guest's paging are gone; shadow page tables take several for each page that a guest maps.",
    condition: "Once the guest has its frames. A miss of the TLB costs up to 24 references instead of 4.",
    mechanism: "Shadow: the CPU walks tables of the hypervisor's, filled fault by fault (SDM vol. 3C, \"Memory Virtualization\"). EPT: the \
                guest's tables are its own, and each address in them is translated by a second set (\"The Extended Page Table Mechanism\").",
    method: "A guest lets 256 pages live: mapped on demand, moved to another frame, protected, unmapped; it takes 512 page faults of its \
             own. Then a walk through both kinds of tables is counted entry by entry, and the accessed flags that the CPU sets in EPT \
             show that it went through the same entries.",
    lacking: &[(
        "accessed and dirty flags of EPT",
        "They would confirm that the CPU's walk goes through each entry that is counted here; the count is the same.",
    )],
    sources: &[
        "EPT takes away 90% of exits for many workloads: Agesen et al., USENIX ATC 2012, section 1",
        "up to 24 references: Bhargava et al., ASPLOS 2008",
        "shadow on EPT makes a nested kernel build 3.5 times as slow as EPT on EPT: Turtles, OSDI 2010, figure 9",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice, Stack::Trapped],
    judge,
    table,
    plot,
};

const SHADOW: &str = "paging/shadow/l3";
const FIRST: &str = "paging/ept_first/l3";
const EPT: &str = "paging/ept/l3";
const WALKS: [(&str, &str, f64); 4] = [
    ("paging/walk_4k/native", "no second level, 4 KiB pages", 4.0),
    ("paging/walk_2m_2m/l3", "guest 2 MiB, EPT 2 MiB", 15.0),
    ("paging/walk_4k_2m/l3", "guest 4 KiB, EPT 2 MiB", 19.0),
    ("paging/walk_4k_4k/l3", "guest 4 KiB, EPT 4 KiB", 24.0),
];

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let flags = figures.missing("paging").is_empty();
    for (stack, level) in levels(figures) {
        let of = |row, key| figures.count(stack, row, key);
        let shadow = asserts.need(of(SHADOW, "exits"));
        asserts.that(
            format!("{level}: shadow paging takes {} exits for the life of a page", number(Some(shadow))),
            shadow >= 9.0,
        );
        let left = asserts.need(of(EPT, "exits"));
        asserts.that(format!("{level}: EPT {}", number(Some(left))), left == 0.0);
        asserts.about(&format!("{level}: while it gets its frames"), of(FIRST, "exits"), 2.0);
        let faults = asserts.need(of(EPT, "guest_faults")) / of(EPT, "count").unwrap_or(1.0);
        asserts.that(
            format!("{level}: {} faults of a page are the guest's own and do not leave it", number(Some(faults))),
            faults == 2.0,
        );
        let hardware = asserts.need(of(EPT, "hw_exits"));
        asserts.that(format!("{level}: hardware exits with EPT: {}", number(Some(hardware))), hardware == 0.0);
    }
    for (row, name, wanted) in WALKS {
        let references = asserts.need(figures.get(Stack::One, row, "references"));
        asserts.that(format!("{name}: {} references of a walk", number(Some(references))), references == wanted);
        let entries = figures.get(Stack::One, row, "ept_entries");
        if let (true, Some(entries)) = (flags, entries) {
            let marked = figures.get(Stack::One, row, "marked");
            asserts.that(
                format!("{name}: the CPU marked all {} entries of EPT in it", number(Some(entries))),
                marked == Some(entries),
            );
        }
    }
    let level = |stack| {
        let of = |row| number(figures.count(stack, row, "exits"));
        format!("{} exits a page to {}", of(SHADOW), of(EPT))
    };
    let why = "No #PF, INVLPG or MOV to CR3 leaves a guest with EPT. Nested the walk is no longer: nvmx composes both EPTs into one, \
               and pays for that once, when an entry is filled.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "life of a page",
        "level",
        "#PF",
        "INVLPG",
        "CR3",
        "EPT violation",
        "exits",
        "hardware exits",
        figures.unit.as_str(),
        cycles_word(figures),
    ]);
    for (name, row) in [("shadow paging", SHADOW), ("EPT, first frames", FIRST), ("EPT", EPT)] {
        for (stack, level) in levels(figures) {
            let of = |key| number(figures.count(stack, row, key));
            table.rows.push(
                [name, level]
                    .map(String::from)
                    .into_iter()
                    .chain(["x_exception", "x_invlpg", "x_cr", "x_ept_violation", "exits", "hw_exits", "ticks"].map(of))
                    .chain([cycles(figures.cycles(stack, row))])
                    .collect(),
            );
        }
    }
    for (row, name, _) in WALKS {
        let references = number(figures.get(Stack::One, row, "references"));
        table.notes.push(format!("References of one walk, {name}: {references}."));
    }
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Hardware exits for the life of a page", true, &["shadow", "EPT, first", "EPT"]);
    for (stack, level) in levels(figures) {
        plot.group(level, [SHADOW, FIRST, EPT].map(|row| figures.count(stack, row, "hw_exits")));
    }
    plot
}
