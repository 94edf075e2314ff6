//! What an experiment is, and what comes of it.

use super::figures::Figures;
use super::stacks::Stack;
use crate::report::plot::Plot;
use serde::Serialize;

/// One step of the story.
pub struct Experiment {
    /// Its place in the story, from 1
    pub number: usize,
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
    /// Features that a machine may lack, and what the experiment would show with them
    pub lacking: &'static [(&'static str, &'static str)],
    /// Where the claim and its figures are from
    pub sources: &'static [&'static str],
    /// The boots it needs
    pub stacks: &'static [Stack],
    /// Asserts the claim
    pub judge: fn(&Figures) -> Judgement,
    /// What was measured
    pub table: fn(&Figures) -> Table,
    /// The same to look at
    pub plot: fn(&Figures) -> Plot,
}

/// What all experiments may lack.
const LACKING: [(&str, &str); 1] = [(
    "EPT",
    "The guests of this experiment have EPT: what runs without a guest, or with shadow page tables, is measured, and nothing else.",
)];

impl Experiment {
    /// What the machine lacks for this, and what would be seen with it: a sentence or two each.
    pub fn lacks(&self, figures: &Figures) -> Vec<String> {
        let all = self.lacking.iter().chain(&LACKING);
        let would = |what: &str| all.clone().find(|(name, _)| *name == what).map_or("", |(_, text)| *text);
        let told = |what: String| format!("This machine has no {what}. {}", would(&what)).trim_end().to_string();
        let needs = (!figures.needs.is_empty()).then(|| {
            let what = figures.needs.join("; ");
            format!("nvmx does not run on this machine, so that only what has one level is measured. It lacks {what}.")
        });
        figures.missing(self.name).into_iter().map(told).chain(needs).collect()
    }
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
    /// Without rows.
    pub fn new(head: &[&str]) -> Self {
        Table { head: head.iter().map(|h| h.to_string()).collect(), rows: Vec::new(), notes: Vec::new() }
    }
}

/// The three levels of most experiments, with their headings.
pub fn levels(figures: &Figures) -> [(Stack, &'static str); 3] {
    let names = if figures.below {
        ["under KVM", "nested under KVM", "twice under KVM"]
    } else {
        ["one level", "nested", "nested twice"]
    };
    [(Stack::One, names[0]), (Stack::Nested, names[1]), (Stack::Twice, names[2])]
}
