//! RFLAGS: the flags of the crate `x86_64`, and what a processor asks of the others.
//!
//! Source: Intel SDM vol. 1, "EFLAGS Register".

pub use x86_64::registers::rflags::RFlags;

/// The bit that is always 1.
pub const FIXED: u64 = 1 << 1;
/// The bits that are always 0.
pub const RESERVED: u64 = !0x3F_FFFF | 1 << 15 | 1 << 5 | 1 << 3;
