//! The only place with unsafe code: instructions, registers, boot.

pub mod cr;
pub mod msr;
pub mod phys;
