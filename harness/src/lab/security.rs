//! Experiment 8: security by exits.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 8,
    name: "security",
    title: "Exits that watch",
    claim: "A hypervisor can forbid its guest's kernel to patch code, hook the IDT, read code, switch protections off or move the \
            system-call entry, and that costs nothing until it is tried.",
    condition: "If honest work does not touch what is guarded. A page that is guarded and also written honestly exits each time.",
    mechanism: "Rights of a page in EPT, execute-only among them (SDM vol. 3C, \"EPT Violations\"); guest/host masks of CR0 and CR4; the MSR \
                bitmap's bits for writing.",
    method: "The same ordinary work (calls into guarded code, a trap through the guarded IDT, a read of the guarded MSR, CR4 bits that \
             nobody guards) in an open and a guarded guest; each attack 1,000 times; then a rootkit does all six in both.",
    lacking: &[
        ("CR4.SMEP", "Its mask bit would make the guest's switching it off an exit: the sixth attack."),
        ("execute-only pages", "They would let the guest run code that it cannot read: a read would be an exit."),
    ],
    sources: &[
        "Seshadri et al., SecVisor, SOSP 2007; Riley et al., NICKLE, RAID 2008: code of a kernel kept whole by a hypervisor",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice, Stack::Trapped],
    judge,
    table,
    plot,
};

const OPEN: &str = "security/ordinary_open/l3";
const GUARDED: &str = "security/ordinary_guarded/l3";
const ATTACKS: [(&str, &str); 6] = [
    ("patches code", "security/patch_code/l3"),
    ("hooks the IDT", "security/patch_idt/l3"),
    ("reads execute-only code", "security/read_secret/l3"),
    ("clears CR4.SMEP", "security/clear_smep/l3"),
    ("clears CR0.WP", "security/clear_wp/l3"),
    ("moves IA32_LSTAR", "security/write_lstar/l3"),
];
const ROOTKIT: [&str; 2] = ["security/rootkit_open/l3", "security/rootkit_guarded/l3"];

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    let missing = figures.missing("security");
    let lacks = |part: &str| missing.iter().any(|what| what.contains(part));
    for (stack, level) in levels(figures) {
        let exits = asserts.need(figures.count(stack, GUARDED, "hw_exits"));
        asserts.that(
            format!("{level}: hardware exits of ordinary work that is guarded: {}", number(Some(exits))),
            exits == 0.0,
        );
        let (open, guarded) = (figures.get(stack, OPEN, "ticks"), figures.get(stack, GUARDED, "ticks"));
        let slack = figures.slack(stack, GUARDED);
        let same = open.zip(guarded).is_some_and(|(a, b)| !figures.exact() || (a - b).abs() < slack);
        asserts.that(format!("{level}: it takes what it takes in an open guest"), same);
        for (name, row) in ATTACKS.iter().filter(|(_, row)| {
            !(lacks("execute-only") && row.contains("secret") || lacks("SMEP") && row.contains("smep"))
        }) {
            asserts.about(&format!("{level}: exits when it {name}"), figures.count(stack, row, "exits"), 1.0);
        }
        let seen = asserts.need(figures.get(stack, ROOTKIT[0], "alarms"));
        let harm = asserts.need(figures.get(stack, ROOTKIT[0], "harm"));
        asserts.that(
            format!(
                "{level}: open, the rootkit raises {} alarms and changes {} pages",
                number(Some(seen)),
                number(Some(harm))
            ),
            seen == 0.0 && harm == 2.0,
        );
        let alarms = (asserts.need(figures.get(stack, ROOTKIT[1], "alarms")) as u64).count_ones();
        let harm = asserts.need(figures.get(stack, ROOTKIT[1], "harm"));
        let wanted = 6 - missing.len() as u32;
        asserts.that(
            format!("{level}: guarded, {alarms} alarms and {} pages", number(Some(harm))),
            alarms == wanted && harm == 0.0,
        );
    }
    let level = |stack| {
        let alarms =
            figures.get(stack, ROOTKIT[1], "alarms").map_or("-".into(), |a| (a as u64).count_ones().to_string());
        format!("0 exits at rest, {alarms} of 6 attacks caught")
    };
    let why = "What watches costs no exit and no instruction while nothing happens; each attack costs one exit and is refused.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

fn table(figures: &Figures) -> Table {
    let mut table =
        Table::new(&["the guest", "level", "exits", "hardware exits", figures.unit.as_str(), cycles_word(figures)]);
    let rows = [("works, open", OPEN), ("works, guarded", GUARDED)].into_iter().chain(ATTACKS);
    for (name, row) in rows {
        for (stack, level) in levels(figures) {
            let of = |key| number(figures.count(stack, row, key));
            table.rows.push(vec![
                name.into(),
                level.into(),
                of("exits"),
                of("hw_exits"),
                of("ticks"),
                cycles(figures.cycles(stack, row)),
            ]);
        }
    }
    for (stack, level) in levels(figures) {
        let told = |guest: &str, row| {
            let alarms = (figures.get(stack, row, "alarms")? as u64).count_ones();
            let harm = number(figures.get(stack, row, "harm"));
            Some(format!("in the {guest} guest {alarms} alarms and {harm} pages changed"))
        };
        if let Some((open, guarded)) = told("open", ROOTKIT[0]).zip(told("guarded", ROOTKIT[1])) {
            table.notes.push(format!("The rootkit, {level}: {open}; {guarded}."));
        }
    }
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new(
        "Cycles of an attack that is caught, and of ordinary work",
        true,
        &levels(figures).map(|(_, level)| level),
    );
    for (name, row) in [("works, open", OPEN), ("works, guarded", GUARDED)].into_iter().chain(ATTACKS) {
        plot.group(name, levels(figures).map(|(stack, _)| figures.cycles(stack, row).map(|r| r.mid.round())));
    }
    plot
}
