//! The subcommands.

pub mod bench;
pub mod bochs;
pub mod depth;
pub mod diff;
pub mod doctor;
pub mod fuzz;
pub mod lab;
pub mod linux;
pub mod run;
pub mod test;
pub mod toolchain;
pub mod xen;
