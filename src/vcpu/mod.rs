//! One virtual CPU: the state, the run loop, and what both levels have in common.

pub(crate) mod build;
pub mod counters;
mod cpu;
pub mod host;
pub mod initial;
pub mod inject;
pub mod l2_exit;
pub mod operand;
mod probe;
mod run;
pub mod smp;
mod start;
pub mod tracked;
pub mod vmcs01;

pub use cpu::{Config, Cpu, Next, Startup, Stop, Waiting};
pub use start::{Decided, start};
