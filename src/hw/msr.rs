//! Model-specific registers.

use crate::hw::cpuid::{cpuid_count, decoded};
use crate::hw::processor::Processor;
use crate::hw::this_processor;
use crate::x86::Fault;
use crate::x86::msr::IA32_EFER;

/// Reads any MSR; `Err(#GP(0))` when the processor refuses.
///
/// Works once nvmx's IDT is loaded.
#[inline]
pub fn rdmsr_safe(index: u32) -> Result<u64, Fault> {
    this_processor().rdmsr(index)
}

/// Writes any MSR; `Err(#GP(0))` when the processor refuses.
///
/// Works once nvmx's IDT is loaded.
///
/// # Safety
///
/// The value, if accepted, breaks none of nvmx's own state (page tables, GS base, EFER.LMA).
#[inline]
pub unsafe fn wrmsr_safe(index: u32, value: u64) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe { this_processor().wrmsr(index, value) }
}

/// IA32_EFER as nvmx runs with it.
pub fn efer() -> u64 {
    // Every 64-bit processor has it.
    rdmsr_safe(IA32_EFER).unwrap_or(0)
}

/// Index of IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1A0;
/// IA32_MISC_ENABLE: branch trace storage is not available.
pub const MISC_NO_BTS: u64 = 1 << 11;
/// IA32_MISC_ENABLE: processor event based sampling is not available.
pub const MISC_NO_PEBS: u64 = 1 << 12;
const MISC_NO_EXECUTE_DISABLE: u64 = 1 << 34;

/// True if nvmx can go on with this value of IA32_MISC_ENABLE: without execute-disable, its page tables have reserved bits.
pub fn is_misc_enable_harmless(value: u64) -> bool {
    value & MISC_NO_EXECUTE_DISABLE == 0
}

/// Writes IA32_MISC_ENABLE. The two bits that say what L2 does not have are read-only, and shown otherwise than they are.
pub fn set_misc_enable(value: u64) -> Result<(), Fault> {
    if !is_misc_enable_harmless(value) {
        return Err(Fault::GeneralProtection(0));
    }
    let fixed = MISC_NO_BTS | MISC_NO_PEBS;
    let value = value & !fixed | rdmsr_safe(IA32_MISC_ENABLE)? & fixed;
    // SAFETY: execute-disable stays; the rest is speed, and what CPUID says.
    unsafe { wrmsr_safe(IA32_MISC_ENABLE, value) }
}

/// Index of IA32_XSS.
pub const IA32_XSS: u32 = 0xDA0;
/// The states of Intel PT and of architectural LBRs.
const XSS_TRACES: u64 = 1 << 8 | 1 << 15;

/// True if XRSTORS cannot switch on with this value of IA32_XSS what a guest must not switch on.
pub fn is_xss_harmless(value: u64) -> bool {
    value & XSS_TRACES == 0
}

/// True if this processor refuses by itself the values that [`is_xss_harmless`] is about: it has IA32_XSS and neither state. CPUID leaf
/// 0DH, subleaf 1 tells (SDM vol. 1, "Enumeration of CPU Support for XSAVE Instructions and XSAVE-Supported Features"). Where there
/// is no such MSR, nvmx refuses: emulators ignore a write.
pub fn refuses_trace_states() -> bool {
    let has = decoded().get_extended_state_info().is_some_and(|states| states.has_xsaves_xrstors());
    // raw-cpuid knows one of the two states alone.
    has && u64::from(cpuid_count(0xD, 1).ecx) & XSS_TRACES == 0
}

/// Writes IA32_XSS.
pub fn set_xss(value: u64) -> Result<(), Fault> {
    if !is_xss_harmless(value) {
        return Err(Fault::GeneralProtection(0));
    }
    // SAFETY: nvmx uses no extended state.
    unsafe { wrmsr_safe(IA32_XSS, value) }
}

/// Stops what a loader may have left on and L2 cannot reach: Intel PT, PEBS, architectural LBRs.
pub fn stop_traces() {
    /// Leaf 7, EDX: architectural LBRs, which raw-cpuid does not know.
    const LBR: u32 = 1 << 19;
    let (cpuid, features) = (decoded(), cpuid_count(7, 0));
    let traces = cpuid.get_extended_feature_info().is_some_and(|features| features.has_processor_trace());
    let stores = cpuid.get_feature_info().is_some_and(|features| features.has_ds());
    for (index, present) in [(0x570, traces), (0x3F1, stores), (0x14CE, features.edx & LBR != 0)] {
        if present && rdmsr_safe(index).is_ok_and(|value| value != 0) {
            // SAFETY: nvmx needs none of them. A value that the processor refuses changes nothing.
            let _ = unsafe { wrmsr_safe(index, 0) };
        }
    }
}
