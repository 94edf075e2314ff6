//! The subcommands.

pub mod bench;
pub mod bench_stack;
pub mod bochs;
pub mod depth;
pub mod diff;
pub mod doctor;
mod doctor_report;
pub mod explain;
pub mod files;
pub mod fuzz;
pub mod gdb;
pub mod lab;
pub mod linux;
pub mod new;
pub mod own;
pub mod release;
pub mod run;
pub mod stat;
pub mod test;
pub mod toolchain;
pub mod trace;
pub mod vmcs;
pub mod watch;
pub mod xen;
