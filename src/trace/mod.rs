//! What nvmx counts and remembers, for people: counters, the last exits and the ring of them, the reason for the end.

pub mod counters;
mod kill;
pub mod ring;

pub use counters::{Counters, Ran, Totals};
pub use kill::{KillReason, Promise};
