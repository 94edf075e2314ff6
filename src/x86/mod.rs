//! The processor's words, without state: control registers, masked pointers, MSRs, debug registers, exceptions, entries of page tables,
//! descriptors, addresses. Numbers come from the crate `x86_64` where it has them; where its types do not serve, the file says why.

mod access;
pub mod canonical;
pub mod cpuid;
pub mod cr;
pub mod debug;
pub mod descriptor;
pub mod efer;
mod fault;
pub mod lam;
pub mod machine_check;
pub mod msr;
pub mod paging;
pub mod rflags;
pub mod selector;

pub use access::DataAccess;
pub use cr::{Cr0, Cr4};
pub use fault::Fault;
pub use rflags::RFlags;
