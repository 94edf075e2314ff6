//! The processor's words, without state: control registers, masked pointers, MSRs, debug registers, exceptions.

pub mod cr;
pub mod debug;
pub mod efer;
mod fault;
pub mod lam;
pub mod msr;
pub mod rflags;

pub use cr::{Cr0, Cr4};
pub use fault::Fault;
pub use rflags::RFlags;
