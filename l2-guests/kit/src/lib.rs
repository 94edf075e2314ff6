//! What every guest of ours needs to be a bootable image and to test a machine from inside: boot code for three loaders,
//! the serial line and its records, traps that can be caught, page tables, and VMX.
//!
//! A guest runs in ring 0 with the first 4 GiB mapped one to one, on one CPU until it starts others (`smp`); it takes no interrupt
//! that it did not ask for. "Single CPU, ring 0" in the comments of `unsafe` blocks means: no other CPU uses the same at the time.
//! A guest is an experiment on its machine: it may bring itself down, and its trap handlers say so when it does.
#![cfg_attr(target_os = "none", no_std)]

mod boot_info;
pub mod fields;
mod global;

pub use arrayvec;
pub use boot_info::{BootInfo, Module, option};
pub use global::Global;
pub use l2_protocol as protocol;

#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
pub use machine::*;
