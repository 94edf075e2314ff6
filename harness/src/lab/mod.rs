//! `lab`: every step of the story of the VM exit as an experiment.
//!
//! The guest `l2-guests/lab` measures; a file here for each experiment says what is claimed, asserts it by counts, and makes
//! the table and the plot. `stacks` boots, `figures` keeps what came out, `text`, `plot` and `page` show it, `pages` keeps
//! docs/lab.md equal to it.

mod asserts;
mod cascade;
mod compare;
mod cow;
mod experiment;
pub mod figures;
mod mmio;
mod msr_bitmap;
mod page;
pub mod pages;
mod paging;
mod price;
mod read;
mod rings;
mod security;
pub mod stacks;
mod syscall;
pub mod text;
pub mod trace;

pub use experiment::{Experiment, Verdict};
pub use page::html;

use stacks::Stack;

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

/// The boots with a Linux in them, the longest first.
pub const WITH_LINUX: [Stack; 2] = [Stack::KvmOnNvmx, Stack::Kvm];

/// All other boots that the experiments need, the longest first.
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

#[cfg(test)]
mod tests {
    use super::figures::Figures;
    use super::*;

    #[test]
    fn they_are_numbered_in_their_order() {
        assert!(EXPERIMENTS.iter().map(|e| e.number).eq(1..=EXPERIMENTS.len()));
    }

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
