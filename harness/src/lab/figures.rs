//! What the boots of the lab said, as figures: kept in docs/lab-figures.json, and all that the reports are made of.

use super::stacks::Stack;
use crate::report::model::{self, Counts, Range};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What nvmx's first sight of a page takes at most, in instructions.
pub const FIRST_SIGHT_TICKS: f64 = 2000.0;

/// The format of the file.
pub const SCHEMA: &str = "nvmx-lab/1";

/// The experiment under which the guest says what a bracket costs and what every figure depends on.
pub const CALIBRATION: &str = "calibration";

/// Figures of one row: averages per event of what was counted, and facts as they are.
pub type Row = BTreeMap<String, f64>;

/// All rows of a boot, by `experiment/name/scope`.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The rows
    pub rows: BTreeMap<String, Row>,
    /// What the machine lacked, by experiment
    pub missing: BTreeMap<String, Vec<String>>,
}

/// The figures of all boots.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// [`SCHEMA`]
    pub schema: String,
    /// The machine
    pub machine: String,
    /// What ticks are: `instructions` or `cycles`
    pub unit: String,
    /// Whether a hypervisor is below the machine, so that there is one level more than the names of the stacks tell
    #[serde(default)]
    pub below: bool,
    /// What the machine lacks so that nvmx does not run on it
    #[serde(default)]
    pub needs: Vec<String>,
    /// One round of [`super::trace::SAMPLE`], as `--trace` shows it
    #[serde(default)]
    pub trace: Vec<String>,
    /// By the name of the stack
    pub boots: BTreeMap<String, Boot>,
}

impl Figures {
    /// No boots yet.
    pub fn new(machine: String, unit: &str) -> Self {
        Figures {
            schema: SCHEMA.into(),
            machine,
            unit: unit.into(),
            below: false,
            needs: Vec::new(),
            trace: Vec::new(),
            boots: BTreeMap::new(),
        }
    }

    /// A figure: `row` is `experiment/name/scope`.
    pub fn get(&self, stack: Stack, row: &str, key: &str) -> Option<f64> {
        self.boots.get(stack.name())?.rows.get(row)?.get(key).copied()
    }

    /// [`Figures::get`], 0 where a count did not occur although the row is there.
    pub fn count(&self, stack: Stack, row: &str, key: &str) -> Option<f64> {
        let row = self.boots.get(stack.name())?.rows.get(row)?;
        Some(row.get(key).copied().unwrap_or(0.0))
    }

    /// By how many ticks per event two rows that do the same may differ. With two nvmx, one of their brackets, or the empty one that
    /// is subtracted, may include the lower nvmx's first sight of a page.
    pub fn slack(&self, stack: Stack, row: &str) -> f64 {
        let sight = if stack == Stack::Twice { FIRST_SIGHT_TICKS } else { 0.0 };
        0.1 + sight / self.get(stack, row, "count").unwrap_or(1.0).max(1.0)
    }

    /// What the machine lacks for an experiment.
    pub fn missing(&self, experiment: &str) -> Vec<String> {
        let mut all: Vec<String> =
            self.boots.values().filter_map(|boot| boot.missing.get(experiment)).flatten().cloned().collect();
        if experiment == "cascade" && !self.shadowing() {
            all.push("VMCS shadowing".into());
        }
        all.sort();
        all.dedup();
        all
    }

    /// Whether the machine has VMCS shadowing, on which every nested figure depends.
    pub fn shadowing(&self) -> bool {
        !self.missing(CALIBRATION).iter().any(|what| what.contains("shadowing"))
    }

    /// Whether instructions and exits of one boot can be held against those of another to the last one: a KVM below has its own
    /// interrupts, first sights of pages, and features that it does not offer.
    pub fn exact(&self) -> bool {
        self.counted() && !self.below
    }

    /// Whether ticks are instructions, so that cycles can only be modelled.
    pub fn counted(&self) -> bool {
        self.unit == "instructions"
    }

    /// Cycles of an event: modelled from the counts where instructions are counted, measured where there is a processor.
    pub fn cycles(&self, stack: Stack, row: &str) -> Option<Range> {
        let ticks = self.get(stack, row, "ticks")?;
        if !self.counted() {
            return Some(Range::exact(ticks));
        }
        // The model knows nothing of the exits that a KVM below has of its own.
        if self.below {
            return None;
        }
        let of = |key: &str| self.get(stack, row, key).unwrap_or(0.0);
        // How many fields the guest's own hypervisor touches is counted where each of them traps.
        let own = self.get(Stack::Trapped, row, "own_accesses").unwrap_or(0.0);
        Some(model::cycles(&Counts {
            instructions: ticks,
            exits: of("hw_exits"),
            accesses: of("accesses") + own,
            pointers: of("pointers"),
            invalidations: of("invalidations"),
        }))
    }
}
