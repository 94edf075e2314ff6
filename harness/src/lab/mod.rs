//! `lab`: every step of the story of the VM exit as an experiment.
//!
//! The guest `l2-guests/lab` measures; a file here for each experiment says what is claimed, asserts it by counts, and makes
//! the table and the plot. `stacks` boots, `figures` keeps what came out, `text`, `plot` and `page` show it, `pages` keeps
//! docs/lab.md equal to it.

mod cascade;
mod compare;
mod cow;
pub mod figures;
mod mmio;
mod msr_bitmap;
mod page;
pub mod pages;
mod paging;
pub mod plot;
mod price;
mod rings;
mod security;
pub mod stacks;
mod syscall;
pub mod text;

pub use page::html;

use figures::Figures;
use serde::Serialize;
use stacks::Stack;

/// One step of the story.
pub struct Experiment {
    /// On the command line and in records
    pub name: &'static str,
    /// In a few words
    pub title: &'static str,
    /// What the story says
    pub claim: &'static str,
    /// When that holds
    pub condition: &'static str,
    /// What the hardware does, with the chapters of the SDM by title
    pub mechanism: &'static str,
    /// What the experiment does
    pub method: &'static str,
    /// What it would show where the machine lacks something
    pub lacking: &'static str,
    /// Where the claim and its figures are from
    pub sources: &'static [&'static str],
    /// The boots it needs
    pub stacks: &'static [Stack],
    /// Asserts the claim
    pub judge: fn(&Figures) -> Judgement,
    /// What was measured
    pub table: fn(&Figures) -> Table,
    /// The same to look at
    pub plot: fn(&Figures) -> plot::Plot,
}

/// All experiments, in the order of the story.
pub static EXPERIMENTS: [&Experiment; 10] = [
    &rings::EXPERIMENT,
    &syscall::EXPERIMENT,
    &price::EXPERIMENT,
    &msr_bitmap::EXPERIMENT,
    &paging::EXPERIMENT,
    &mmio::EXPERIMENT,
    &cow::EXPERIMENT,
    &security::EXPERIMENT,
    &cascade::EXPERIMENT,
    &compare::EXPERIMENT,
];

/// The boots that the experiments need which `lab` runs without being asked for one by name.
pub const USUAL: [Stack; 7] =
    [Stack::Twice, Stack::Nested, Stack::Trapped, Stack::One, Stack::Thrice, Stack::TrappedTwice, Stack::TrappedThrice];

/// The experiment with this name.
///
/// # Errors
/// The names there are.
pub fn find(name: &str) -> Result<&'static Experiment, String> {
    let names = || EXPERIMENTS.iter().map(|e| e.name).collect::<Vec<_>>().join(", ");
    let found = EXPERIMENTS.iter().find(|e| e.name == name || e.name == name.replace('-', "_"));
    found.copied().ok_or_else(|| format!("there is no experiment `{name}`; there are: {}", names()))
}

/// What came of a claim.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As the story tells it
    Holds,
    /// Under the condition that is named
    HoldsIf,
    /// Not as told
    DoesNotHold,
    /// A count contradicts what the experiment asserts: a fault of nvmx or of the experiment
    Contradicted,
    /// The machine lacks something, or the boots were not made
    NotMeasured,
}

impl Verdict {
    /// For tables.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::HoldsIf => "holds, with a condition",
            Verdict::DoesNotHold => "does not hold as told",
            Verdict::Contradicted => "CONTRADICTED",
            Verdict::NotMeasured => "not measured",
        }
    }
}

/// A claim and its counts.
#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    /// The verdict
    pub verdict: Verdict,
    /// What was measured with one hypervisor, nested, nested twice
    pub levels: [String; 3],
    /// Why the verdict is what it is
    pub why: String,
    /// What was asserted, and whether it is so
    pub asserted: Vec<(String, bool)>,
}

/// Collects what an experiment asserts. A figure that is not there makes it "not measured".
#[derive(Default)]
struct Asserts {
    all: Vec<(String, bool)>,
    unknown: bool,
}

impl Asserts {
    /// A figure that must be there.
    fn need(&mut self, value: Option<f64>) -> f64 {
        self.unknown |= value.is_none();
        value.unwrap_or(f64::NAN)
    }

    /// A statement.
    fn that(&mut self, what: impl Into<String>, holds: bool) {
        self.all.push((what.into(), holds));
    }

    /// Two counts per event are the same, but for what a few events at the start and the end may add.
    fn about(&mut self, what: &str, value: Option<f64>, wanted: f64) {
        let value = self.need(value);
        self.that(format!("{what}: {}", text::number(Some(value))), (value - wanted).abs() <= 0.12 * wanted.max(0.4));
    }

    /// Hardware exits of an event: exactly so many with VMCS shadowing, without it at least as many.
    fn hardware(&mut self, figures: &Figures, what: &str, value: Option<f64>, wanted: f64) {
        if figures.shadowing() {
            return self.about(what, value, wanted);
        }
        let value = self.need(value);
        self.that(format!("{what}: {}, without VMCS shadowing", text::number(Some(value))), value > 0.88 * wanted);
    }

    /// The end: `verdict` if all of it is so.
    fn judge(self, verdict: Verdict, levels: [String; 3], why: String) -> Judgement {
        let verdict = match self.all.iter().all(|(_, holds)| *holds) {
            _ if self.unknown => Verdict::NotMeasured,
            true => verdict,
            false => Verdict::Contradicted,
        };
        Judgement { verdict, levels, why, asserted: self.all }
    }
}

/// A table of an experiment.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Table {
    /// What the columns are
    pub head: Vec<String>,
    /// The rows, the first cell the name
    pub rows: Vec<Vec<String>>,
    /// What is to be known about the figures
    pub notes: Vec<String>,
}

impl Table {
    fn new(head: &[&str]) -> Self {
        Table { head: head.iter().map(|h| h.to_string()).collect(), rows: Vec::new(), notes: Vec::new() }
    }
}

/// The three levels of most experiments, with their headings.
const LEVELS: [(Stack, &str); 3] =
    [(Stack::One, "one level"), (Stack::Nested, "nested"), (Stack::Twice, "nested twice")];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_lists_the_known() {
        let text = find("rdtscp").err().unwrap();
        assert!(text.contains("`rdtscp`") && text.contains("rings, syscall, price"), "{text}");
        assert_eq!(find("msr-bitmap").unwrap().name, "msr_bitmap");
    }

    #[test]
    fn without_figures_nothing_is_claimed_and_nothing_panics() {
        let none = Figures::new("none".into(), "instructions");
        for experiment in EXPERIMENTS {
            let judgement = (experiment.judge)(&none);
            assert_eq!(judgement.verdict, Verdict::NotMeasured, "{}", experiment.name);
            (experiment.table)(&none);
            (experiment.plot)(&none);
        }
    }
}
