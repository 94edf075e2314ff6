//! Experiment 10: hypervisors compared.

use super::figures::Figures;
use super::plot::Plot;
use super::stacks::Stack;
use super::text::number;
use super::{Asserts, Experiment, Judgement, Table, Verdict};

pub const EXPERIMENT: Experiment = Experiment {
    name: "compare",
    title: "Hypervisors compared",
    claim: "Nested, a thin hypervisor costs a fraction of what KVM costs in its place.",
    condition: "In instructions, with the same guest on the same machine. KVM does more: it is a whole operating system's hypervisor.",
    mechanism: "KVM copies the guest hypervisor's VMCS to and from its shadow at each exit and entry; nvmx runs the guest on the VMCS that its \
                guest hypervisor reads (docs/adr/0004-field-access-strategies.md).",
    method: "The rows of experiments 2 to 5 and 7 with KVM of Linux in nvmx's place, and the lab as a guest of Linux/KVM that runs under nvmx.",
    lacking: "Linux with KVM is emulated too: this takes minutes, so that `./nvmx lab` shows the figures of the last `./nvmx lab compare --bless`.",
    sources: &[
        "nested CPUID 14,159, nested VMCALL 15,290 cycles with VMCS shadowing on Haswell: Linux commit 74a497fae754",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Kvm, Stack::KvmOnNvmx],
    judge,
    table,
    plot,
};

const ROWS: [(&str, &str); 8] = [
    ("CPUID", "price/cpuid/l3"),
    ("RDTSC", "price/rdtsc/l3"),
    ("VMCALL", "price/vmcall/l3"),
    ("RDMSR, intercepted", "msr_bitmap/rdmsr_intercepted/l3"),
    ("RDMSR, passed", "msr_bitmap/rdmsr_passed/l3"),
    ("life of a page, shadow", "paging/shadow/l3"),
    ("life of a page, EPT", "paging/ept/l3"),
    ("fork, a page, shadow", "cow/shadow/l3"),
];
/// The guest's own CPUID, where the lab itself is KVM's guest.
const OWN: &str = "price/cpuid/native";

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    for (name, row) in &ROWS[..4] {
        let (nvmx, kvm) = (
            asserts.need(figures.get(Stack::Nested, row, "ticks")),
            asserts.need(figures.get(Stack::Kvm, row, "ticks")),
        );
        asserts.that(
            format!("{name}: {} under nvmx, {} under KVM", number(Some(nvmx)), number(Some(kvm))),
            kvm > 2.0 * nvmx,
        );
    }
    let (kvm, on_nvmx) = (
        asserts.need(figures.get(Stack::Kvm, OWN, "ticks")),
        asserts.need(figures.get(Stack::KvmOnNvmx, OWN, "ticks")),
    );
    asserts.that(
        format!(
            "CPUID of KVM's guest: {} alone, {} where KVM runs under nvmx",
            number(Some(kvm)),
            number(Some(on_nvmx))
        ),
        on_nvmx > kvm,
    );
    let of = |stack, row| number(figures.get(stack, row, "ticks"));
    let levels = [
        format!("KVM: {}", of(Stack::Kvm, OWN)),
        format!("nvmx {}, KVM {}", of(Stack::Nested, ROWS[0].1), of(Stack::Kvm, ROWS[0].1)),
        "-".into(),
    ];
    let why = "In instructions per CPUID. The figures are those of the last `./nvmx lab compare`.";
    asserts.judge(Verdict::HoldsIf, levels, why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&["event", "lab alone", "nvmx, lab", "KVM, lab", "times", "nvmx, KVM, lab"]);
    let of = |stack, row: &str| figures.get(stack, row, "ticks");
    for (name, row) in ROWS {
        let (nvmx, kvm) = (of(Stack::Nested, row), of(Stack::Kvm, row));
        let times = nvmx.zip(kvm).map(|(n, k)| k / n);
        table.rows.push(
            [name.to_string()]
                .into_iter()
                .chain([of(Stack::One, row), nvmx, kvm, times, of(Stack::KvmOnNvmx, row)].map(number))
                .collect(),
        );
    }
    let own = [Stack::One, Stack::Nested, Stack::Kvm].map(|stack| of(stack, OWN));
    let times = own[1].zip(own[2]).map(|(n, k)| k / n);
    table.rows.push(
        ["CPUID of the lab itself".to_string()]
            .into_iter()
            .chain([own[0], own[1], own[2], times, of(Stack::KvmOnNvmx, OWN)].map(number))
            .collect(),
    );
    table.notes.push("Instructions per event. \"KVM, lab\": Linux with KVM in nvmx's place. \"nvmx, KVM, lab\": Linux/KVM is L2, the lab its guest.".into());
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Instructions per event", true, &["nvmx, lab", "KVM, lab"]);
    for (name, row) in ROWS {
        plot.group(name, [Stack::Nested, Stack::Kvm].map(|stack| figures.get(stack, row, "ticks")));
    }
    plot
}
