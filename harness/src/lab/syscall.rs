//! Experiment 2: system call and hypercall.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::model::{self, Range};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 2,
    name: "syscall",
    title: "System call and hypercall",
    claim: "Under ring compression SYSCALL lands in the wrong ring; in non-root mode a system call costs no exit, while a \
            hypercall is slower by orders of magnitude.",
    condition: "\"Orders of magnitude\" holds only nested: with one hypervisor a hypercall takes 2 to 15 times a system call.",
    mechanism: "SYSCALL goes to ring 0 whatever ring the kernel is in, SYSRET outside of ring 0 raises #GP (SDM vol. 3A, \"Fast \
                System Calls in 64-Bit Mode\"). In VMX non-root operation the guest has all rings for itself.",
    method: "1,000 system calls to a kernel that returns at once: natively, with the kernel in ring 1 and a monitor in ring 0, and \
             in guests; beside them 1,000 VMCALL.",
    lacking: &[],
    sources: &[
        "a hypercall takes 0.46 us against 0.06 (0.22 with page-table isolation), nested 7.4 to 7.9 us: Huang et al. (PVM), SOSP 2023, tables 1 and 2",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice, Stack::Trapped],
    judge,
    table,
    plot,
};

const SYSCALL: &str = "syscall/syscall/l3";
const HYPERCALL: &str = "syscall/hypercall/l3";
/// From ring 3 to the monitor, IRET to ring 1, #GP of SYSRET, IRET to ring 3.
const SWITCHES: f64 = 4.0;

fn ratio(figures: &Figures, stack: Stack) -> Option<f64> {
    let call = if figures.counted() { model::SYSCALL.cycles.mid } else { figures.get(stack, SYSCALL, "ticks")? };
    Some(figures.cycles(stack, HYPERCALL)?.mid / call)
}

fn compressed(figures: &Figures) -> Option<Range> {
    let ticks = figures.get(Stack::One, "syscall/syscall_ring1/native", "ticks")?;
    Some(if figures.counted() {
        Range::exact(ticks).plus(model::RING_SWITCH.cycles.times(SWITCHES))
    } else {
        Range::exact(ticks)
    })
}

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    for ((stack, level), wanted) in levels(figures).into_iter().zip([1.0, 2.0, 8.0]) {
        let exits = asserts.need(figures.count(stack, SYSCALL, "exits"));
        asserts.that(format!("{level}: exits of a system call: {}", number(Some(exits))), exits == 0.0);
        asserts.hardware(
            figures,
            &format!("{level}: hardware exits of a hypercall"),
            figures.count(stack, HYPERCALL, "hw_exits"),
            wanted,
        );
    }
    let native = asserts.need(figures.get(Stack::One, "syscall/syscall/native", "ticks"));
    let guest = asserts.need(figures.get(Stack::One, SYSCALL, "ticks"));
    let ring1 = asserts.need(figures.get(Stack::One, "syscall/syscall_ring1/native", "ticks"));
    asserts.that(
        "a guest's system call is as many instructions as without a hypervisor",
        !figures.exact() || (native - guest).abs() < 0.5,
    );
    asserts.that(
        format!(
            "with the kernel in ring 1 it takes {} instructions instead of {}",
            number(Some(ring1)),
            number(Some(native))
        ),
        ring1 > 5.0 * native,
    );
    let (one, twice) = (asserts.need(ratio(figures, Stack::One)), asserts.need(ratio(figures, Stack::Twice)));
    asserts.that(
        format!("one level: a hypercall is {} system calls, less than 20", number(Some(one.round()))),
        figures.below || one < 20.0,
    );
    asserts.that(format!("nested twice: {}, more than 100", number(Some(twice.round()))), twice > 100.0);
    let level = |stack| {
        ratio(figures, stack).map_or("-".into(), |n| format!("0 exits; hypercall = {} calls", number(Some(n.round()))))
    };
    let why = "Nested, a hypercall takes tens to more than a hundred system calls; with one hypervisor it does not. nvmx has less \
               to do than KVM, so its nested factor is smaller than the 32 to 131 that PVM measured.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "call",
        "level",
        figures.unit.as_str(),
        "exits to its hypervisor",
        "hardware exits",
        cycles_word(figures),
    ]);
    let system = |row| if figures.counted() { Some(model::SYSCALL.cycles) } else { figures.cycles(Stack::One, row) };
    let native = "syscall/syscall/native";
    let of = |row: &str| number(figures.get(Stack::One, row, "ticks"));
    table.rows.push(vec![
        "system call".into(),
        "native".into(),
        of(native),
        "0".into(),
        "0".into(),
        cycles(system(native)),
    ]);
    let ring1 = "syscall/syscall_ring1/native";
    table.rows.push(vec![
        "system call, kernel in ring 1".into(),
        "native".into(),
        of(ring1),
        "0".into(),
        "0".into(),
        cycles(compressed(figures)),
    ]);
    for (name, row) in [("system call", SYSCALL), ("hypercall", HYPERCALL)] {
        for (stack, level) in levels(figures) {
            let of = |key| number(figures.count(stack, row, key));
            let cost = if row == SYSCALL && figures.counted() {
                Some(model::SYSCALL.cycles)
            } else {
                figures.cycles(stack, row)
            };
            table.rows.push(vec![name.into(), level.into(), of("ticks"), of("exits"), of("hw_exits"), cycles(cost)]);
        }
    }
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Cycles of a system call and of a hypercall", true, &["system call", "hypercall"]);
    for (stack, level) in levels(figures) {
        let call =
            if figures.counted() { Some(model::SYSCALL.cycles.mid) } else { figures.get(stack, SYSCALL, "ticks") };
        plot.group(level, [call, figures.cycles(stack, HYPERCALL).map(|r| r.mid.round())]);
    }
    plot
}
