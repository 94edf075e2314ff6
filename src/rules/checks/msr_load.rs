//! Which rule an entry of the VM-entry MSR-load area broke that the processor refused.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Loading MSRs" of the chapter "VM Entries".

use crate::rules::checks::CheckId;
use crate::x86::msr;

/// What stands in nvmx's copy for an entry that L2 may not have: the processor refuses it, since reserved bits are set.
pub const REFUSED: u64 = u64::MAX;

const IA32_FS_BASE: u64 = msr::IA32_FS_BASE as u64;
const IA32_GS_BASE: u64 = msr::IA32_GS_BASE as u64;

/// The rule that an entry broke, by its first word as the processor saw it.
pub fn msr_load_failure(index: u64) -> CheckId {
    match index {
        REFUSED => CheckId::MsrLoadWithheld,
        _ if index >> 32 != 0 => CheckId::MsrLoadReserved,
        IA32_FS_BASE | IA32_GS_BASE => CheckId::MsrLoadBase,
        _ if index >> 8 == 8 => CheckId::MsrLoadX2apic,
        _ => CheckId::MsrLoadValue,
    }
}
