//! What every guest of ours needs to be a bootable image and to test a machine from inside: boot code for three loaders,
//! the serial line and its records, traps that can be caught, page tables, and VMX.
//!
//! A guest is one CPU in ring 0 with the first 4 GiB mapped one to one; it has no other tasks and takes no interrupt it did
//! not ask for. The `unsafe` blocks of this crate lean on that: "single CPU, ring 0" in their comments means this sentence.
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
