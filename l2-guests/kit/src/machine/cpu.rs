//! Privileged instructions as functions.

use super::trap::{self, Trap};
use core::arch::asm;

/// Defines functions around one instruction each.
macro_rules! register {
    ($($(#[$doc:meta])* $read:ident $write:ident $name:literal;)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: single CPU, ring 0; reading has no effect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) };
            value
        }

        /// Writes it; the guest answers for the value.
        #[inline(always)]
        pub fn $write(value: u64) {
            // SAFETY: single CPU, ring 0; a bad value is the caller's experiment and traps.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    )* };
}

register! {
    /// CR0
    cr0 set_cr0 "cr0";
    /// CR2
    cr2 set_cr2 "cr2";
    /// CR3
    cr3 set_cr3 "cr3";
    /// CR4
    cr4 set_cr4 "cr4";
    /// DR7
    dr7 set_dr7 "dr7";
}

/// CR0.PE
pub const CR0_PE: u64 = 1 << 0;
/// CR0.NE
pub const CR0_NE: u64 = 1 << 5;
/// CR0.AM: has no effect in ring 0
pub const CR0_AM: u64 = 1 << 18;
/// CR0.PG
pub const CR0_PG: u64 = 1 << 31;
/// CR4.TSD: has no effect in ring 0
pub const CR4_TSD: u64 = 1 << 2;
/// CR4.PAE
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.VMXE
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.OSXSAVE
pub const CR4_OSXSAVE: u64 = 1 << 18;

/// IA32_FEATURE_CONTROL
pub const FEATURE_CONTROL: u32 = 0x3A;
/// IA32_PAT
pub const PAT: u32 = 0x277;
/// IA32_DEBUGCTL
pub const DEBUGCTL: u32 = 0x1D9;
/// IA32_EFER
pub const EFER: u32 = 0xC000_0080;
/// IA32_LSTAR
pub const LSTAR: u32 = 0xC000_0082;
/// IA32_CSTAR
pub const CSTAR: u32 = 0xC000_0083;
/// IA32_FS_BASE
pub const FS_BASE: u32 = 0xC000_0100;
/// IA32_GS_BASE
pub const GS_BASE: u32 = 0xC000_0101;

/// CPUID: EAX, EBX, ECX, EDX.
#[inline(always)]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: a CPU in long mode has CPUID; RBX, which asm blocks may not name, is put back.
    unsafe {
        asm!(
            "mov {b}, rbx", "cpuid", "xchg {b}, rbx",
            b = out(reg) b, inlateout("eax") leaf => a, inlateout("ecx") subleaf => c, out("edx") d,
            options(nomem, nostack, preserves_flags),
        );
    }
    [a, b as u32, c, d]
}

/// RDMSR of an MSR that exists.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: single CPU, ring 0; an MSR that does not exist traps.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(low) | u64::from(high) << 32
}

/// WRMSR of an MSR that exists with a value it takes.
#[inline(always)]
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: single CPU, ring 0; a bad value traps.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// [`rdmsr`] that returns the trap.
///
/// # Errors
/// #GP if there is no such MSR.
pub fn try_rdmsr(msr: u32) -> Result<u64, Trap> {
    trap::catch(|| rdmsr(msr))
}

/// [`wrmsr`] that returns the trap.
///
/// # Errors
/// #GP if there is no such MSR or it refuses the value.
pub fn try_wrmsr(msr: u32, value: u64) -> Result<(), Trap> {
    trap::catch(|| wrmsr(msr, value))
}

/// RDTSC.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a CPU in long mode has a TSC.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(low) | u64::from(high) << 32
}

/// The time-stamp counter between fences: all that comes before is done, and nothing after it has begun.
///
/// Source: Intel SDM vol. 2B, "RDTSC—Read Time-Stamp Counter".
#[inline(always)]
pub fn rdtsc_fenced() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a CPU in long mode has a TSC, and LFENCE.
    unsafe { asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(low) | u64::from(high) << 32
}

/// OUT of a byte.
#[inline(always)]
pub fn out8(port: u16, value: u8) {
    // SAFETY: single CPU, ring 0; the devices are the guest's own.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// REP OUTS of bytes.
pub fn out8s(port: u16, bytes: &[u8]) {
    // SAFETY: as in `out8`; the processor reads no more than the slice, and the direction flag is clear as everywhere.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags));
    }
}

/// OUT of four bytes.
#[inline(always)]
pub fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// IN of a byte.
#[inline(always)]
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as in `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Stops for ever.
pub fn halt() -> ! {
    loop {
        // SAFETY: single CPU, ring 0; nothing is to happen any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
