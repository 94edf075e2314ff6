//! Experiment 1: rings and the hole.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::number;
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 1,
    name: "rings",
    title: "Rings and the hole",
    claim: "Trap-and-emulate works if each sensitive instruction traps (Popek and Goldberg). On x86 some do not: they read or \
            change the real machine and go on.",
    condition: "Without VMX. UMIP makes five of them trap and leaves the others. In VMX non-root mode none is left.",
    mechanism: "Privileged instructions raise #GP outside of ring 0 (SDM vol. 3A, \"Protection\", \"Privileged Instructions\"); CR4.UMIP \
                adds SGDT, SIDT, SLDT, SMSW and STR. In VMX non-root operation the guest has its own GDTR, IDTR, LDTR, TR, CR0 and \
                RFLAGS, and \"descriptor-table exiting\" makes their instructions exit (SDM vol. 3C, \"VMX Non-Root Operation\").",
    method: "Each instruction runs in ring 3 and in ring 1, where a monitor has put a kernel. One that does not trap runs again in ring \
             0 with the kernel's own state: if the answers differ, it is a hole. Then with UMIP; then in a guest; then with \
             descriptor-table exiting. Last, a tiny kernel boots in ring 1 under a trap-and-emulate monitor, and in a guest.",
    lacking: &[
        ("UMIP", "With it five instructions more would trap in ring 1, and the tiny kernel would read its own IDTR."),
        (
            "descriptor-table exiting",
            "With it SIDT, SGDT, SLDT and STR of a guest would exit, and its hypervisor answer them.",
        ),
    ],
    sources: &[
        "Popek and Goldberg, Formal Requirements for Virtualizable Third Generation Architectures, CACM 17(7), 1974",
        "Robin and Irvine, Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor, USENIX Security 2000: 17 such instructions",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice],
    judge,
    table,
    plot,
};

const TABLES: [&str; 4] = ["sidt", "sgdt", "sldt", "str"];
/// What the holes do to a kernel in ring 1.
const EFFECTS: [(&str, &str); 16] = [
    ("cpuid", "shows VMX, which is the monitor's"),
    ("iret", "leaves IF as it is"),
    ("lar", "denies the kernel's own segment"),
    ("lsl", "denies the kernel's own segment"),
    ("mov_from_cs", "shows the real ring"),
    ("popf", "leaves IF as it is"),
    ("push_cs", "shows the real ring"),
    ("pushf", "shows the real IF"),
    ("sgdt", "shows the monitor's table"),
    ("sidt", "shows the monitor's table"),
    ("sldt", "shows the monitor's table"),
    ("smsw", "shows the real CR0"),
    ("str", "shows the monitor's task"),
    ("syscall", "lands in the monitor"),
    ("verr", "denies the kernel's own segment"),
    ("verw", "denies the kernel's own segment"),
];

const KERNEL: [(&str, &str); 4] = [
    ("own_idt", "reads its own IDTR"),
    ("in_ring_0", "is in ring 0"),
    ("cli_shows", "sees IF = 0 after CLI"),
    ("wakes_up", "has interrupts on after POPF"),
];

/// The instructions in a boot, in the order of names: name and a figure.
fn instructions(figures: &Figures, stack: Stack) -> Vec<(&str, &super::figures::Row)> {
    let rows = figures.boots.get(stack.name()).map(|boot| &boot.rows);
    let of = |(key, row)| {
        let name = <str>::strip_prefix(key, "rings/")?.strip_suffix("/native")?;
        (!name.starts_with("kernel")).then_some((name, row))
    };
    rows.into_iter().flatten().filter_map(|(key, row)| of((key.as_str(), row))).collect()
}

fn holes(figures: &Figures, stack: Stack, key: &str) -> usize {
    instructions(figures, stack)
        .iter()
        .filter(|(_, row)| row.get("ring1_wrong") == Some(&1.0) && row.get(key) == Some(&0.0))
        .count()
}

/// What an instruction leaks or does wrong, if its answer was not the kernel's.
fn effect(name: &str, wrong: bool) -> String {
    let known = EFFECTS.iter().find(|(other, _)| *other == name).map(|(_, effect)| *effect);
    if wrong { known.unwrap_or("answers wrongly").into() } else { "no".into() }
}

fn fact(figures: &Figures, stack: Stack, name: &str, key: &str) -> Option<f64> {
    figures.get(stack, &format!("rings/{name}/native"), key)
}

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let umip = !figures.missing("rings").iter().any(|what| what == "UMIP");
    let exiting = !figures.missing("rings").iter().any(|what| what.contains("exiting"));
    for (stack, level) in levels(figures) {
        let all = instructions(figures, stack);
        let total = if all.is_empty() { asserts.need(None) } else { all.len() as f64 };
        let open = holes(figures, stack, "ring1_trap");
        asserts.that(
            format!(
                "{level}: {open} of {} instructions are holes in ring 1, some of the known 17 among them",
                number(Some(total))
            ),
            open >= 12,
        );
        if umip {
            let left = holes(figures, stack, "umip_trap");
            asserts.that(format!("{level}: UMIP leaves {left}"), left + 5 == open && left > 0);
        }
        let wrong = all.iter().filter(|(_, row)| row.get("guest_wrong") != Some(&0.0)).count();
        asserts.that(format!("{level}: in a guest {wrong} of them answer wrongly"), wrong == 0);
        let exits = all.iter().filter(|(name, row)| *name != "cpuid" && row.get("guest_exits") != Some(&0.0)).count();
        asserts.that(format!("{level}: none exits for that, but CPUID"), exits == 0);
        if exiting {
            let met = TABLES.iter().all(|name| fact(figures, stack, name, "tables_exits") == Some(1.0));
            asserts
                .that(format!("{level}: with descriptor-table exiting SIDT, SGDT, SLDT and STR exit once each"), met);
        }
        let beliefs =
            |kernel: &str| KERNEL.iter().filter(|(key, _)| fact(figures, stack, kernel, key) == Some(1.0)).count();
        asserts.that(
            format!("{level}: of 4 things that the tiny kernel relies on, {} hold in ring 1", beliefs("kernel_ring1")),
            beliefs("kernel_ring1") == 0,
        );
        if umip {
            asserts.that(format!("{level}: {} with UMIP", beliefs("kernel_umip")), beliefs("kernel_umip") == 1);
        }
        asserts.that(format!("{level}: {} in a guest", beliefs("kernel_guest")), beliefs("kernel_guest") == 4);
    }
    let level = |stack| match instructions(figures, stack).len() {
        0 => "-".into(),
        _ => format!(
            "{} holes, UMIP {}, guest 0",
            holes(figures, stack, "ring1_trap"),
            holes(figures, stack, "umip_trap")
        ),
    };
    let why = "The condition is broken by each instruction that is marked a hole: it does not trap, and its answer is not the kernel's.";
    asserts.judge(Verdict::Holds, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "instruction",
        "ring 3",
        "ring 1",
        "ring 1, UMIP",
        "sensitive: it",
        "Popek-Goldberg",
        "guest",
        "guest, tables exit",
    ]);
    let umip = !figures.missing("rings").iter().any(|what| what == "UMIP");
    let trap = |vector: f64| if vector > 0.0 { "traps" } else { "goes on" };
    let mut privileged = Vec::new();
    for (name, row) in instructions(figures, Stack::One) {
        let of = |key: &str| row.get(key).copied().unwrap_or(0.0);
        if of("ring1_trap") > 0.0 && of("ring3_trap") > 0.0 {
            privileged.push(name.replace('_', " "));
            continue;
        }
        let guest = |exits: &str| if of(exits) > 0.0 { "exits".to_string() } else { "its own".to_string() };
        table.rows.push(vec![
            name.replace('_', " "),
            trap(of("ring3_trap")).into(),
            trap(of("ring1_trap")).into(),
            if umip { trap(of("umip_trap")).into() } else { "-".into() },
            effect(name, of("ring1_wrong") > 0.0),
            if of("ring1_wrong") > 0.0 { "broken: a hole".into() } else { "kept: harmless".into() },
            guest("guest_exits"),
            guest("tables_exits"),
        ]);
    }
    table.notes.push(format!("Trap in both rings, so that the condition is kept: {}.", privileged.join(", ")));
    for (kernel, name) in
        [("kernel_ring1", "in ring 1"), ("kernel_umip", "in ring 1 with UMIP"), ("kernel_guest", "in a guest")]
    {
        let beliefs: Vec<String> = KERNEL
            .iter()
            .filter_map(|(key, text)| {
                Some(format!("{text}: {}", if fact(figures, Stack::One, kernel, key)? == 1.0 { "yes" } else { "NO" }))
            })
            .collect();
        if let Some(traps) = fact(figures, Stack::One, kernel, "traps") {
            table.notes.push(format!(
                "The tiny kernel {name} ({} traps): {}.",
                number(Some(traps)),
                beliefs.join("; ")
            ));
        }
    }
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Sensitive instructions that neither trap nor answer rightly", false, &["holes"]);
    let known = |n: usize| (!instructions(figures, Stack::One).is_empty()).then_some(n as f64);
    plot.group("ring 1", [known(holes(figures, Stack::One, "ring1_trap"))]);
    plot.group("ring 1, UMIP", [known(holes(figures, Stack::One, "umip_trap"))]);
    let wrong =
        instructions(figures, Stack::One).iter().filter(|(_, row)| row.get("guest_wrong") == Some(&1.0)).count();
    plot.group("VMX non-root", [known(wrong)]);
    plot
}
