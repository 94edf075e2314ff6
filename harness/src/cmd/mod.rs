//! The subcommands.

pub mod bench;
pub mod bochs;
pub mod depth;
pub mod diff;
pub mod doctor;
pub mod explain;
pub mod fuzz;
pub mod lab;
pub mod linux;
pub mod new;
pub mod own;
pub mod run;
pub mod test;
pub mod toolchain;
pub mod watch;
pub mod xen;
