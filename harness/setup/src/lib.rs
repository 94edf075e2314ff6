//! What a boot needs from the machine: a compiler for the bare-metal target, an emulator, a boot disk maker, kernels.
//!
//! Beside them stands what every part of the host program uses: where things are ([`paths`]), how programs are started
//! ([`proc`]), what the user sees ([`ui`], [`output`]) and how it ends ([`error`]).

pub mod apt;
pub mod bochs;
pub mod error;
pub mod grub;
pub mod initramfs;
pub mod linux;
mod need;
pub mod output;
pub mod paths;
pub mod proc;
pub mod programs;
pub mod qemu;
pub mod release;
pub mod sources;
pub mod tcg;
pub mod toolchain;
pub mod ui;
pub mod xen;

pub use apt::require;
pub use need::{Need, What, program};
