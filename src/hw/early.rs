//! Model-specific registers before nvmx's IDT is loaded: a #GP would end nvmx.

use core::arch::asm;

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
