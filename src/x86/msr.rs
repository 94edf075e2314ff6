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
/// IA32_PERF_CAPABILITIES
pub const IA32_PERF_CAPABILITIES: u32 = 0x345;
/// IA32_PKRS
pub const IA32_PKRS: u32 = 0x6E1;
/// IA32_EFER
pub const IA32_EFER: u32 = 0xC000_0080;
/// IA32_FS_BASE
pub const IA32_FS_BASE: u32 = 0xC000_0100;
/// IA32_GS_BASE
pub const IA32_GS_BASE: u32 = 0xC000_0101;

/// True if each byte of IA32_PAT names a memory type (SDM vol. 3A, table "Memory Types That Can Be Encoded With PAT").
pub fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|memory_type| matches!(memory_type, 0 | 1 | 4..=7))
}
