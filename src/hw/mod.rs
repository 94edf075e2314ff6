//! The only place with unsafe code: instructions, registers, boot.

pub mod apic;
pub mod boot;
pub mod cache;
pub mod cpu;
pub mod cr;
pub mod epitaph;
pub mod held;
pub mod idt;
pub mod msr;
pub mod phys;
mod port;
pub mod serial;
pub mod vmenter;
pub mod vmx;
