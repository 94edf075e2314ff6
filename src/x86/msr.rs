//! MSRs by number, and bits of their values.
//!
//! Source: Intel SDM vol. 4, table "IA-32 Architectural MSRs".

/// IA32_FEATURE_CONTROL
pub const IA32_FEATURE_CONTROL: u32 = 0x3A;
/// IA32_FEATURE_CONTROL: what it says holds until reset.
pub const FEATURE_LOCK: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON is allowed outside SMX operation.
pub const FEATURE_VMX: u64 = 1 << 2;
/// IA32_PAT
pub const IA32_PAT: u32 = 0x277;
/// IA32_PKRS
pub const IA32_PKRS: u32 = 0x6E1;
/// IA32_EFER
pub const IA32_EFER: u32 = 0xC000_0080;
