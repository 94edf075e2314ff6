//! What nvmx counts and remembers, for people: counters, the last exits, the reason for the end.

pub mod counters;
mod kill;

pub use counters::{Counters, Ran, Totals};
pub use kill::{KillReason, Promise};
