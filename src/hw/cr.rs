//! Control registers, debug registers, XCR0, and the descriptor-table registers.

use core::arch::asm;

use crate::x86::Fault;

macro_rules! control_register {
    ($name:literal, $read:ident, $write:ident) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reading has no side effect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        ///
        /// The processor accepts the value, and nvmx's own code, stack and tables stay mapped and usable with it.
        #[inline]
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller's promise. Not `nomem`: it may change what memory accesses do.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    };
}

control_register!("cr0", cr0, set_cr0);
control_register!("cr3", cr3, set_cr3);
control_register!("cr4", cr4, set_cr4);
control_register!("dr7", dr7, set_dr7);

/// Reads CR2.
#[inline]
pub fn cr2() -> u64 {
    let value;
    // SAFETY: reading has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes CR2. nvmx takes no page fault whose CR2 it needs, so any value is fine at any time.
#[inline]
pub fn set_cr2(value: u64) {
    // SAFETY: CR2 affects nothing.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// DR0 to DR3, which are the guest's.
pub fn breakpoint_addresses() -> [u64; 4] {
    let (a, b, c, d);
    // SAFETY: reading has no side effect; DR7.GD of nvmx is 0 after each exit.
    unsafe {
        asm!("mov {0}, dr0", "mov {1}, dr1", "mov {2}, dr2", "mov {3}, dr3", out(reg) a, out(reg) b, out(reg) c,
            out(reg) d, options(nomem, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// Reads DR6, which VM entries and exits do not switch: it is the guest's.
#[inline]
pub fn dr6() -> u64 {
    let value;
    // SAFETY: reading has no side effect; DR7.GD is clear in nvmx.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes the low half of DR6; the upper one must be 0.
#[inline]
pub fn set_dr6(value: u64) {
    // SAFETY: DR6 affects nothing; a value of 32 bits is accepted.
    unsafe { asm!("mov dr6, {}", in(reg) value & 0xFFFF_FFFF, options(nomem, nostack, preserves_flags)) };
}

/// DR0 to DR3 and DR6 as an INIT leaves them; VM entries and exits do not switch these, so they are L2's.
pub fn reset_debug_registers() {
    const DR6: u64 = 0xFFFF_0FF0;
    // SAFETY: DR7 of nvmx is 0x400 after each exit: no breakpoint is on.
    unsafe {
        asm!("mov dr0, {0}", "mov dr1, {0}", "mov dr2, {0}", "mov dr3, {0}", "mov dr6, {1}", in(reg) 0u64, in(reg) DR6,
            options(nomem, nostack, preserves_flags));
    }
}

/// Takes CD and NW of CR0 from `value`, which does not have NW without CD.
pub fn set_caching(value: u64) {
    const CD_NW: u64 = 0b11 << 29;
    let (old, new) = (cr0(), cr0() & !CD_NW | value & CD_NW);
    if old != new {
        // SAFETY: how memory is cached changes the speed of nvmx only; the combination was checked.
        unsafe { set_cr0(new) };
    }
}

/// XSETBV; `Err(#GP(0))` when the processor refuses the value or the register, `Err(#UD)` is reported the same way when
/// CR4.OSXSAVE is clear: check that before.
///
/// nvmx keeps nothing in extended state, so every value that the processor accepts is fine for nvmx.
#[inline]
pub fn xsetbv_safe(index: u32, value: u64) -> Result<(), Fault> {
    let failed: u32;
    // SAFETY: 1. a #GP or #UD lands on label 3 with registers as they were. 2. nvmx uses no SSE or AVX state.
    unsafe {
        asm!(
            "2: xsetbv",
            "xor {failed:e}, {failed:e}",
            "3:",
            ".pushsection .fixup, \"a\", @progbits",
            ".quad 2b, 3b",
            ".popsection",
            failed = inout(reg) 1u32 => failed,
            in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nomem, nostack),
        );
    }
    if failed == 0 { Ok(()) } else { Err(Fault::GeneralProtection(0)) }
}
