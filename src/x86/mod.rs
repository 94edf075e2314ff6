//! The processor's words, without state: control registers, masked pointers, MSRs, debug registers, exceptions.

mod access;
pub mod cr;
pub mod debug;
pub mod efer;
mod fault;
pub mod lam;
pub mod msr;
pub mod rflags;

pub use access::DataAccess;
pub use cr::{Cr0, Cr4};
pub use fault::Fault;
pub use rflags::RFlags;
