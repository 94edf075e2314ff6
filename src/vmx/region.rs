//! Constants of a VMCS region.
//!
//! Source: Intel SDM vol. 3C, table "Format of the VMCS Region"; "VMCS Types: Ordinary and Shadow".

/// VMCS revision identifier that L2 must write into its regions ("nvmx").
pub const REVISION: u32 = 0x6E76_6D78;

/// Bit 31 of the first word: the shadow-VMCS indicator.
pub const SHADOW_INDICATOR: u32 = 1 << 31;

/// A VMCS link pointer that links to nothing.
pub const NO_LINK: u64 = u64::MAX;
