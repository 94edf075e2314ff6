//! Experiment 4: the MSR bitmap.

use super::asserts::Asserts;
use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::stacks::Stack;
use super::text::{cycles, cycles_note, cycles_word, number};
use crate::report::model::{HERTZ, MSR, Range};
use crate::report::plot::Plot;

pub const EXPERIMENT: Experiment = Experiment {
    number: 4,
    name: "msr_bitmap",
    title: "The MSR bitmap",
    claim: "A harmless MSR in a tight loop exits millions of times a second; a bit in the MSR bitmap makes it none.",
    condition: "In a tight loop. Real guests make 1,000 to 10,000 exits of all kinds a second and CPU.",
    mechanism: "The CPU looks into a bitmap of 4 KiB before RDMSR and WRMSR exit (SDM vol. 3C, \"VM-Execution Control Fields\", \
                \"MSR-Bitmap Address\"). Nested, nvmx lets the guest run by a bitmap merged from its own and its guest hypervisor's.",
    method: "1,000 RDMSR and 1,000 WRMSR of IA32_CSTAR, whose bits are first set, then clear.",
    lacking: &[],
    sources: &[
        "RDMSR from 1,300 to 120 cycles: Linux commit ceef7d10dfb6",
        "1,000 to 10,000 exits a second: Agesen et al., USENIX ATC 2012, figure 6",
    ],
    stacks: &[Stack::One, Stack::Nested, Stack::Twice, Stack::Trapped],
    judge,
    table,
    plot,
};

const EXITING: [&str; 2] = ["msr_bitmap/rdmsr_intercepted/l3", "msr_bitmap/wrmsr_intercepted/l3"];
const PASSED: [&str; 2] = ["msr_bitmap/rdmsr_passed/l3", "msr_bitmap/wrmsr_passed/l3"];

fn per_second(figures: &Figures, stack: Stack) -> Option<f64> {
    Some(HERTZ / figures.cycles(stack, EXITING[0])?.mid)
}

/// An access that passes costs what the instruction costs; a count of instructions does not know that.
fn access(figures: &Figures, stack: Stack, row: &str) -> Option<Range> {
    let counted = figures.cycles(stack, row)?;
    Some(if figures.counted() && PASSED.contains(&row) { MSR.cycles } else { counted })
}

fn judge(figures: &Figures) -> Judgement {
    let mut asserts = Asserts::default();
    for (stack, level) in levels(figures) {
        for (exiting, passed) in EXITING.into_iter().zip(PASSED) {
            let what = if exiting == EXITING[0] { "RDMSR" } else { "WRMSR" };
            asserts.about(
                &format!("{level}: exits of an intercepted {what}"),
                figures.count(stack, exiting, "exits"),
                1.0,
            );
            let hardware = asserts.need(figures.count(stack, passed, "hw_exits"));
            asserts.that(
                format!("{level}: hardware exits of a {what} that passes: {}", number(Some(hardware))),
                hardware == 0.0,
            );
            let (native, ticks) = (figures.get(Stack::One, passed, "ticks"), figures.get(stack, passed, "ticks"));
            let slack = figures.slack(stack, passed);
            let same = ticks.zip(native).is_some_and(|(a, b)| !figures.exact() || (a - b).abs() < slack);
            asserts.that(format!("{level}: it costs what it costs without a hypervisor"), same);
        }
    }
    let level = |stack| match per_second(figures, stack) {
        Some(n) => format!("{} exits/s to 0", rounded(n)),
        None => "-".into(),
    };
    let why = "Intercepted, the loop exits as often as the CPU can exit; passed, never, at any depth: the merged bitmap lets it \
               through to the processor.";
    asserts.judge(Verdict::HoldsIf, levels(figures).map(|(stack, _)| level(stack)), why.into())
}

/// Two digits: a model knows no more.
fn rounded(value: f64) -> String {
    let unit = 10f64.powi((value.log10().floor() as i32 - 1).max(0));
    number(Some((value / unit).round() * unit))
}

fn table(figures: &Figures) -> Table {
    let mut table = Table::new(&[
        "MSR access",
        "level",
        figures.unit.as_str(),
        "exits to its hypervisor",
        "hardware exits",
        cycles_word(figures),
    ]);
    for row in EXITING.into_iter().zip(PASSED).flat_map(|(a, b)| [a, b]) {
        for (stack, level) in levels(figures) {
            let of = |key| number(figures.count(stack, row, key));
            let name = row.split('/').nth(1).unwrap_or_default().replace('_', " ");
            table.rows.push(vec![
                name,
                level.into(),
                of("ticks"),
                of("exits"),
                of("hw_exits"),
                cycles(access(figures, stack, row)),
            ]);
        }
    }
    table.notes.push(cycles_note(figures));
    table
}

fn plot(figures: &Figures) -> Plot {
    let mut plot = Plot::new("Cycles of an RDMSR", true, &["intercepted", "passed"]);
    for (stack, level) in levels(figures) {
        plot.group(level, [EXITING[0], PASSED[0]].map(|row| access(figures, stack, row).map(|r| r.mid.round())));
    }
    plot
}
