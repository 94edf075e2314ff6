//! Experiment 9: the cascade.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 9,
    name: "cascade",
    title: "The cascade",
    claim: "With each level an exit costs twice the exits of the level before: 2^(n-1) with n hypervisors.",
    condition: "That is the least: only VMRESUME counted. Measured are 1, 2, 8, 32, since VMPTRLD and VMCLEAR exit as well.",
    mechanism: "An exit of the innermost guest is an exit to the outermost hypervisor, whatever level it is for; that level's VMRESUME is \
                an exit again, and so is each VMPTRLD and VMCLEAR of its handler (SDM vol. 3C, \"VMX Non-Root Operation\"). VMREAD and VMWRITE \
                need none where VMCS shadowing serves them.",
    method: "A CPUID, an interrupt and an EPT violation, each handled by the guest's own hypervisor, and a page walk, which no hypervisor sees, with none to three nvmx below that, with \
             VMCS shadowing and without. The exits are those that the outermost nvmx counted.",
    lacking: &[(
        "VMCS shadowing",
        "With it a CPUID takes 2, 8 and 32 hardware exits with two, three and four hypervisors; without it each VMREAD and VMWRITE of \
         a guest hypervisor is one more, and both halves of the table are the same.",
    )],
    sources: &[
        "a hypercall of 1,575 cycles, nested 37,733, nested twice 857,578: Lim and Nieh (DVH), ASPLOS 2020, table 3",
        "13 exits for a nested CPUID without shadowing: Turtles, OSDI 2010, section 4.3",
    ],
    stacks: &[
        Stack::One,
        Stack::Nested,
        Stack::Twice,
        Stack::Thrice,
        Stack::Trapped,
        Stack::TrappedTwice,
        Stack::TrappedThrice,
    ],
    judge,
    table,
    plot,
};

const SHADOWED: [Stack; 4] = [Stack::One, Stack::Nested, Stack::Twice, Stack::Thrice];
const TRAPPED: [Stack; 4] = [Stack::One, Stack::Trapped, Stack::TrappedTwice, Stack::TrappedThrice];
const EVENTS: [(&str, &str); 3] = [
    ("CPUID", "cascade/cpuid/l3"),
    ("interrupt", "cascade/interrupt/l3"),
    ("EPT violation", "cascade/ept_violation/l3"),
];
/// INVLPG and a load: no level hears of it.
const WALK: (&str, &str) = ("page walk", "cascade/page_walk/l3");
/// Hardware exits of a CPUID with one to four hypervisors, where VMCS shadowing serves all fields. Each hypervisor beyond the second
/// makes four exits of one: the exit itself, and VMPTRLD, VMCLEAR and VMRESUME of the hypervisor that handles it.
const EXPECTED: [f64; 4] = [1.0, 2.0, 8.0, 32.0];

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let exits = |stack, row| figures.count(stack, row, "hw_exits");
    let (name, row) = EVENTS[0];
    for (n, (stack, wanted)) in (1..).zip(SHADOWED.into_iter().zip(EXPECTED)) {
        asserts.hardware(figures, &format!("{n} hypervisors: hardware exits of a {name}"), exits(stack, row), wanted);
        let least = f64::from(1 << (n - 1));
        let found = asserts.need(exits(stack, row));
        asserts.that(format!("{n} hypervisors: no fewer than {least}"), found > least - 0.1);
    }
    for (shadowed, trapped) in SHADOWED.into_iter().zip(TRAPPED).skip(1) {
        let (with, without) = (asserts.need(exits(shadowed, row)), asserts.need(exits(trapped, row)));
        asserts.that(
            format!("without VMCS shadowing {} exits instead of {}", number(Some(without)), number(Some(with))),
            without > with || !figures.shadowing(),
        );
    }
    for (name, row) in EVENTS {
        let grows =
            SHADOWED.windows(2).all(|pair| exits(pair[0], row).zip(exits(pair[1], row)).is_some_and(|(a, b)| b > a));
        asserts.that(format!("{name}: more exits with each level"), grows);
    }
    for (n, (shadowed, trapped)) in (1..).zip(SHADOWED.into_iter().zip(TRAPPED)) {
        for stack in [shadowed, trapped] {
            let walk = asserts.need(exits(stack, WALK.1));
            asserts
                .that(format!("{n} hypervisors: hardware exits of a {}: {}", WALK.0, number(Some(walk))), walk == 0.0);
        }
    }
    let level = |stack| match exits(stack, row) {
        Some(1.0) => "1 exit".into(),
        n => format!("{} exits", number(n)),
    };
    let why = "It is worse than told. Of the 4 exits in place of 2, two are VMPTRLD and VMCLEAR: nvmx changes VMCSs, which always exits, \
               once each on the way up and on the way down. KVM below nvmx is asked for less by editing VMCSs in memory (ADR 0008).";
    asserts.judge(Verdict::DoesNotHold, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "event",
        "hypervisors",
        "2^(n-1)",
        "hardware exits",
        "without shadowing",
        figures.unit.as_str(),
        "without shadowing",
        cycles_word(figures),
    ]);
    for (name, row) in EVENTS.into_iter().chain([WALK]) {
        for (n, (stack, trapped)) in (1..).zip(SHADOWED.into_iter().zip(TRAPPED)) {
            // The model has no cost of a miss.
            let modelled = if row == WALK.1 && figures.counted() { None } else { figures.cycles(stack, row) };
            let of = |stack, key| number(figures.count(stack, row, key));
            table.rows.push(vec![
                name.into(),
                n.to_string(),
                (1 << (n - 1)).to_string(),
                of(stack, "hw_exits"),
                of(trapped, "hw_exits"),
                of(stack, "ticks"),
                of(trapped, "ticks"),
                cycles(modelled),
            ]);
        }
    }
    table.notes.push("A page walk (INVLPG and a load) does not grow with depth: nvmx composes the EPTs of all levels into one, so that it is two-dimensional at every depth (experiment `paging`). What grows is the EPT violation.".into());
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new(
        "Hardware exits of a CPUID by the number of hypervisors",
        true,
        &["2^(n-1)", "VMCS shadowing", "without"],
    );
    for (n, (stack, trapped)) in (1..).zip(SHADOWED.into_iter().zip(TRAPPED)) {
        let of = |stack| figures.count(stack, EVENTS[0].1, "hw_exits");
        plot.group(&format!("n = {n}"), [Some(f64::from(1 << (n - 1))), of(stack), of(trapped)]);
    }
    plot
}
