//! Model-specific registers.

use core::arch::asm;

use crate::error::Fault;

/// Reads an MSR that is known to exist.
///
/// # Safety
///
/// The MSR exists on this processor (otherwise #GP, which ends nvmx), and reading it has no side effect.
#[inline]
pub unsafe fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR that is known to accept the value.
///
/// # Safety
///
/// The MSR exists and accepts `value`, and the value breaks none of nvmx's own state (page tables, GS base, EFER.LMA).
#[inline]
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: the caller's promise. Not `nomem`: an MSR may change what memory accesses do.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// Reads any MSR; `Err(#GP(0))` when the processor refuses.
///
/// Works once nvmx's IDT is loaded.
#[inline]
pub fn rdmsr_safe(index: u32) -> Result<u64, Fault> {
    let (low, high, failed): (u32, u32, u32);
    // SAFETY: 1. a #GP lands on label 3 with registers as they were at label 2, so `failed` stays 1. 2. RDMSR writes
    // EAX and EDX only.
    unsafe {
        asm!(
            "2: rdmsr",
            "xor {failed:e}, {failed:e}",
            "3:",
            ".pushsection .fixup, \"a\", @progbits",
            ".quad 2b, 3b",
            ".popsection",
            failed = inout(reg) 1u32 => failed,
            in("ecx") index, inout("eax") 0 => low, inout("edx") 0 => high,
            options(nomem, nostack),
        );
    }
    if failed == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Fault::GeneralProtection(0)) }
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
    let failed: u32;
    // SAFETY: 1. as in `rdmsr_safe`. 2. What the value does is the caller's promise.
    unsafe {
        asm!(
            "2: wrmsr",
            "xor {failed:e}, {failed:e}",
            "3:",
            ".pushsection .fixup, \"a\", @progbits",
            ".quad 2b, 3b",
            ".popsection",
            failed = inout(reg) 1u32 => failed,
            in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack),
        );
    }
    if failed == 0 { Ok(()) } else { Err(Fault::GeneralProtection(0)) }
}

/// IA32_EFER as nvmx runs with it.
pub fn efer() -> u64 {
    const IA32_EFER: u32 = 0xC000_0080;
    // SAFETY: every 64-bit processor has IA32_EFER.
    unsafe { rdmsr(IA32_EFER) }
}
