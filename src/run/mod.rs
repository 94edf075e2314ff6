//! What makes a virtual CPU run: start, the run loop, and which exit goes where.

mod build;
mod end;
pub mod l2_exit;
mod machine;
mod run_loop;
pub mod smp;
mod start;

pub use machine::Machine;
pub use start::{Decided, start};
