//! Experiment 6: MMIO.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::number;
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 6,
    name: "mmio",
    title: "MMIO: trapped, sampled, logged",
    claim: "A device register that is mapped and looked at each millisecond, instead of trapped, makes a thousand exits of a million.",
    condition: "If the device can do without the values in between: the hypervisor never sees them.",
    mechanism: "A store to a page without write right is an EPT violation. With the right it is a store to memory; the VMX-preemption \
                timer makes the hypervisor look (SDM vol. 3C, \"VMX-Preemption Timer\"); EPT's dirty flags tell which pages to look at \
                (\"Accessed and Dirty Flags for EPT\"); the CPU can also write them down and exit when 512 are (\"Page-Modification Logging\").",
    method: "A guest stores a million times in a virtual second, each time the time (10,000 times where each store exits). A virtual \
             millisecond is 100,000 ticks. With dirty flags and log it fills a frame buffer of 1,024 pages, 1,000 stores a page.",
    lacking: &[
        ("VMX-preemption timer", "It would wake the hypervisor each millisecond: 1,000 exits in place of a million."),
        ("accessed and dirty flags of EPT", "They would tell which pages to look at: 2 of 1,024 in a millisecond."),
        (
            "page-modification log",
            "It would make one exit for 512 written pages, and let a value wait for half a second.",
        ),
    ],
    sources: &[
        "109,000 to 146,000 exits a second become fewer than 800 by polling: Har'El et al. (ELVIS), USENIX ATC 2013, section 4.3",
        "tracking video memory by dirty pages takes CPU time from 7% to 0.3%: Xen 3.3, blog.xenproject.org, 2008",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice],
    judge,
    table,
    plot,
};

const WAYS: [(&str, &str); 4] = [
    ("trapped", "mmio/trapped/l3"),
    ("sampled", "mmio/sampled/l3"),
    ("dirty flags", "mmio/dirty_flags/l3"),
    ("PML", "mmio/pml/l3"),
];
/// Ticks of a virtual millisecond.
const MILLISECOND: f64 = 100_000.0;

/// Exits to the hypervisor for a million stores.
fn exits(figures: &Figures, stack: Stack, row: &str) -> Option<f64> {
    Some((figures.count(stack, row, "exits")? * 1e6).round())
}

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let lacks = |what: &str| figures.missing("mmio").iter().any(|m| m.contains(what));
    for (stack, level) in levels(figures) {
        let of = |row: usize, key| figures.get(stack, WAYS[row].1, key);
        asserts.about(&format!("{level}: exits of a million stores, trapped"), exits(figures, stack, WAYS[0].1), 1e6);
        let missed = asserts.need(of(0, "missed"));
        asserts.that(format!("{level}: the hypervisor misses {} values", number(Some(missed))), missed == 0.0);
        if !lacks("timer") {
            let sampled = asserts.need(exits(figures, stack, WAYS[1].1));
            // A processor runs the stores as fast as it can, and KVM's timer is a timer of Linux.
            let wanted = if figures.exact() { 880.0..1120.0 } else { 100.0..10_000.0 };
            asserts.that(format!("{level}: exits, sampled: {}", number(Some(sampled))), wanted.contains(&sampled));
            let missed = asserts.need(of(1, "missed"));
            asserts.that(
                format!("{level}: and {} of them are never seen", number(Some(missed))),
                missed > 0.99 * figures.get(stack, WAYS[1].1, "count").unwrap_or(f64::NAN),
            );
        }
        if !lacks("log") && !lacks("timer") && !lacks("flags") {
            let logged = asserts.need(exits(figures, stack, WAYS[3].1));
            asserts.that(format!("{level}: exits with the log: {}", number(Some(logged))), logged <= 2.0);
        }
    }
    let level = |stack| {
        let of = |row: usize| exits(figures, stack, WAYS[row].1).map_or("-".into(), |n| number(Some(n)));
        format!("{} exits to {}", of(0), of(1))
    };
    let why = "The exits go as told. The price is not told: of 1,000 values 999 are never seen, and what is seen is up to a millisecond \
               old. With the log there is an exit for 512 pages, and a value may wait for half a second.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "a million stores",
        "level",
        "exits",
        "hardware exits",
        "values seen",
        "never seen",
        "oldest, virtual ms",
        figures.unit.as_str(),
    ]);
    for (name, row) in WAYS {
        for (stack, level) in levels(figures) {
            let of = |key| figures.count(stack, row, key);
            // Averages and totals of fewer stores, for a million.
            let million = |key| of(key).map(|v| (v * 1e6).round());
            let scaled = |key| Some((of(key)? * 1e6 / of("count")?).round());
            let old = of("oldest").map(|ticks| (ticks / MILLISECOND * 1000.0).round() / 1000.0);
            table.rows.push(vec![
                name.into(),
                level.into(),
                number(million("exits")),
                number(million("hw_exits")),
                number(scaled("seen")),
                number(scaled("missed")),
                old.map_or("-".into(), |ms| format!("{ms}")),
                number(million("ticks")),
            ]);
        }
    }
    table
        .notes
        .push("\"oldest\": how long a value can have waited that was stored just after the hypervisor looked.".into());
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Exits for a million stores", true, &levels(figures).map(|(_, level)| level));
    for (name, row) in WAYS {
        plot.group(name, levels(figures).map(|(stack, _)| exits(figures, stack, row)));
    }
    plot
}
