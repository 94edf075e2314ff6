//! The experiments, in the order of the story.

mod cascade;
mod cow;
mod mmio;
mod monitor;
mod msr_bitmap;
mod paging;
mod price;
mod rings;
mod security;
mod syscall;

use crate::record::Stop;

/// One step of the story.
pub struct Experiment {
    /// Its name on the command line and in records
    pub name: &'static str,
    /// Does it and prints its rows
    pub run: fn() -> Result<(), Stop>,
}

/// All of them.
pub static EXPERIMENTS: &[Experiment] = &[
    Experiment { name: "rings", run: rings::run },
    Experiment { name: "syscall", run: syscall::run },
    Experiment { name: "price", run: price::run },
    Experiment { name: "msr_bitmap", run: msr_bitmap::run },
    Experiment { name: "paging", run: paging::run },
    Experiment { name: "mmio", run: mmio::run },
    Experiment { name: "cow", run: cow::run },
    Experiment { name: "security", run: security::run },
    Experiment { name: "cascade", run: cascade::run },
];
