//! The only place with unsafe code: instructions, registers, boot.
//!
//! [`processor`] is what nvmx asks of a processor; on the bare machine instructions answer, on a host a model.

pub mod apic;
pub mod boot;
pub mod cache;
pub mod cpu;
pub mod cpuid;
pub mod cr;
mod early;
pub mod epitaph;
pub mod halt;
pub mod held;
#[cfg(not(target_os = "none"))]
pub mod host;
pub mod host_area;
pub mod idt;
pub mod machine_check;
pub mod msr;
pub mod phys;
mod port;
pub mod processor;
#[cfg(target_os = "none")]
mod real;
mod region;
mod regs;
pub mod serial;
#[cfg(target_os = "none")]
mod switch;
pub mod vmenter;
pub mod vmx;

#[cfg(not(target_os = "none"))]
pub use host::this_processor;
#[cfg(target_os = "none")]
pub use real::this_processor;
