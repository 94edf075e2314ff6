//! IA32_EFER.
//!
//! Source: Intel SDM vol. 3A, table "IA32_EFER MSR Information".

use x86_64::registers::model_specific::EferFlags;

/// SYSCALL enable
pub const SCE: u64 = EferFlags::SYSTEM_CALL_EXTENSIONS.bits();
/// IA-32e mode enable
pub const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
/// IA-32e mode active
pub const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
/// Execute-disable enable
pub const NXE: u64 = EferFlags::NO_EXECUTE_ENABLE.bits();
/// Those that Intel's processors define.
pub const DEFINED: u64 = SCE | LME | LMA | NXE;
