//! nvmx: an L1 hypervisor that virtualizes VMX itself.
//!
//! Levels are for people, digits in code are roles: in a name, 0 = nvmx, 1 = its guest hypervisor (L2), 2 = the nested
//! guest (L3). `vmcs01` runs L2, `vmcs12` is what L2 wrote for L3, `vmcs02` is what really runs L3.
//!
//! Everything outside [`hw`] is safe code; most of it is pure and runs under `cargo test` on any host.
#![cfg_attr(target_os = "none", no_std)]
#![deny(unsafe_code)]

pub mod addr;
pub mod boot;
pub mod cpu;
pub mod emul;
pub mod ept;
pub mod guest;
#[allow(unsafe_code)]
pub mod hw;
pub mod mm;
pub mod nested;
pub mod rules;
pub mod run;
pub mod sync;
pub mod trace;
pub mod vmcs;
pub mod vmx;
pub mod x86;
