//! Experiment 10: hypervisors compared.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::number;
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 10,
    name: "compare",
    title: "Hypervisors compared",
    claim: "Nested, a thin hypervisor costs a fraction of what KVM costs in its place.",
    condition: "In instructions, with the same guest on the same machine. KVM does more: it is a whole operating system's hypervisor.",
    mechanism: "KVM copies the guest hypervisor's VMCS to and from its shadow at each exit and entry; nvmx runs the guest on the VMCS that its \
                guest hypervisor reads (docs/adr/0004-field-access-strategies.md; SDM vol. 3C, \"Virtual Machine Control Structures\", \"VMCS Types: \
                Ordinary and Shadow\").",
    method: "The rows of experiments 3 to 7 with KVM of Linux in nvmx's place, and the lab as a guest of Linux/KVM that runs under nvmx. \
             There 50 events take the place of 1,000, and a tenth of a second that of a second of stores.",
    lacking: &[],
    sources: &[
        "nested CPUID 14,159, nested VMCALL 15,290 cycles with VMCS shadowing on Haswell: Linux commit 74a497fae754",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Kvm, Stack::KvmOnNvmx],
    judge,
    table,
    plot,
};

/// Events that exit.
const EXITING: [(&str, &str); 8] = [
    ("CPUID", "price/cpuid/l3"),
    ("RDTSC", "price/rdtsc/l3"),
    ("VMCALL", "price/vmcall/l3"),
    ("RDMSR, intercepted", "msr_bitmap/rdmsr_intercepted/l3"),
    ("life of a page, shadow", "paging/shadow/l3"),
    ("store, trapped", "mmio/trapped/l3"),
    ("fork, a page, shadow", "cow/shadow/l3"),
    ("fork, a page, hypercall", "cow/shadow_call/l3"),
];
/// Events for which a way was found around the exit.
const AVOIDED: [(&str, &str); 5] = [
    ("RDMSR, passed", "msr_bitmap/rdmsr_passed/l3"),
    FREE,
    ("store, sampled", SAMPLED),
    ("store, dirty flags", "mmio/dirty_flags/l3"),
    ("store, PML", "mmio/pml/l3"),
];
const SAMPLED: &str = "mmio/sampled/l3";
/// No exit is left of it, to any hypervisor.
const FREE: (&str, &str) = ("life of a page, EPT", "paging/ept/l3");
/// The guest's own CPUID, where the lab itself is KVM's guest.
const OWN: &str = "price/cpuid/native";
const STACKS: [(Stack, &str); 4] = [
    (Stack::One, "the lab alone"),
    (Stack::Nested, "under nvmx"),
    (Stack::Kvm, "under KVM"),
    (Stack::KvmOnNvmx, "under KVM under nvmx"),
];

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let ticks = |stack, row| figures.get(stack, row, "ticks");
    for (name, row) in EXITING {
        let [nvmx, kvm, both] =
            [Stack::Nested, Stack::Kvm, Stack::KvmOnNvmx].map(|stack| asserts.need(ticks(stack, row)));
        let [n, k, b] = [nvmx, kvm, both].map(|value| number(Some(value)));
        asserts.that(format!("{name}: {n} under nvmx, {k} under KVM, more than twice that"), kvm > 2.0 * nvmx);
        asserts.that(format!("{name}: {b} where KVM runs under nvmx"), both > kvm);
    }
    for (stack, place) in STACKS {
        let (alone, there) = (asserts.need(ticks(Stack::One, FREE.1)), asserts.need(ticks(stack, FREE.1)));
        let exits = asserts.need(figures.count(stack, FREE.1, "exits"));
        asserts.that(
            format!("{place}: {} takes {} instructions and no exit", FREE.0, number(Some(there))),
            exits == 0.0 && there < 1.1 * alone,
        );
        let sampled = asserts.need(figures.count(stack, SAMPLED, "exits")) * 1e6;
        asserts.that(
            format!("{place}: {} exits for a million stores that are sampled", number(Some(sampled.round()))),
            (800.0..1500.0).contains(&sampled),
        );
        let cpuid = asserts.need(figures.count(stack, EXITING[0].1, "exits"));
        asserts.that(format!("{place}: {} exit of a CPUID to its hypervisor", number(Some(cpuid))), cpuid == 1.0);
    }
    let (kvm, both) = (asserts.need(ticks(Stack::Kvm, OWN)), asserts.need(ticks(Stack::KvmOnNvmx, OWN)));
    let [k, b] = [kvm, both].map(|value| number(Some(value)));
    asserts.that(format!("CPUID of KVM's guest: {k} alone, {b} where KVM runs under nvmx"), both > kvm);
    let of = |stack, row| number(ticks(stack, row));
    let row = EXITING[0].1;
    let levels = [
        format!("KVM: {}", of(Stack::Kvm, OWN)),
        format!("nvmx {}, KVM {}", of(Stack::Nested, row), of(Stack::Kvm, row)),
        format!("KVM on nvmx {}", of(Stack::KvmOnNvmx, row)),
    ];
    let why = "In instructions per CPUID. What needs no exit costs the same under each of them; what needs one costs under KVM many times what \
               it costs under nvmx.";
    asserts.judge(Verdict::HoldsIf, levels, why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&["event", "lab alone", "nvmx, lab", "KVM, lab", "times", "nvmx, KVM, lab"]);
    for (name, row) in EXITING.into_iter().chain(AVOIDED).chain([("CPUID of the lab itself", OWN)]) {
        let [alone, nvmx, kvm, both] = STACKS.map(|(stack, _)| figures.get(stack, row, "ticks"));
        let times = nvmx.zip(kvm).map(|(n, k)| (k / n * 10.0).round() / 10.0);
        let figures = [alone, nvmx, kvm, times, both].map(number);
        table.rows.push([name.to_string()].into_iter().chain(figures).collect());
    }
    table.notes.push(
        "Instructions per event. \"KVM, lab\": Linux with KVM in nvmx's place. \"nvmx, KVM, lab\": Linux/KVM is L2, the lab its guest.".into(),
    );
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Instructions per event", true, &["nvmx, lab", "KVM, lab", "nvmx, KVM, lab"]);
    for (name, row) in EXITING.into_iter().chain(AVOIDED) {
        plot.group(name, [Stack::Nested, Stack::Kvm, Stack::KvmOnNvmx].map(|stack| figures.get(stack, row, "ticks")));
    }
    plot
}
