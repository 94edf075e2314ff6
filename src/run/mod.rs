//! What makes a virtual CPU run: start, the run loop, and which exit goes where.

mod build;
mod end;
pub mod guest_exit;
mod machine;
mod run_loop;
pub mod smp;
mod stale;
mod start;
mod tracing;

pub use machine::Machine;
pub use start::{Decided, start};

/// The way from a machine to the run loop, for tests on a host. The image has it inlined.
#[cfg(not(target_os = "none"))]
pub mod steps {
    pub use super::build::{Common, set_up};
    pub use super::run_loop::run;
}
