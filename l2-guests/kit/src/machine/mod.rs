//! Everything that needs the real machine.

pub mod apic;
mod boot;
pub mod caps;
pub mod controls;
pub mod cpu;
pub mod descriptors;
pub mod ept;
pub mod exit;
pub mod identity;
pub mod machine_check;
pub mod pages;
pub mod report;
pub mod serial;
pub mod setup;
pub mod smp;
pub mod trap;
pub mod user;
pub mod vcpu;
pub mod vmx;

pub use report::Check;
