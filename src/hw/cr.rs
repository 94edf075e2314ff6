//! Control registers, debug registers, XCR0, and the descriptor-table registers.

use crate::hw::processor::{Processor, Register};
use crate::hw::this_processor;
use crate::x86::{Cr4, Fault};
use raw_cpuid::CpuIdResult;

macro_rules! control_register {
    ($name:ident, $read:ident, $write:ident) => {
        #[doc = concat!("Reads ", stringify!($name), ".")]
        #[inline]
        pub fn $read() -> u64 {
            this_processor().read(Register::$name)
        }

        #[doc = concat!("Writes ", stringify!($name), ".")]
        ///
        /// # Safety
        ///
        /// The processor accepts the value, and nvmx's own code, stack and tables stay mapped and usable with it.
        #[inline]
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller's promise.
            unsafe { this_processor().write(Register::$name, value) };
        }
    };
}

control_register!(Cr0, cr0, set_cr0);
control_register!(Cr3, cr3, set_cr3);
control_register!(Cr4, cr4, set_cr4);

/// Reads CR2.
#[inline]
pub fn cr2() -> u64 {
    this_processor().read(Register::Cr2)
}

/// Writes CR2. nvmx takes no page fault whose CR2 it needs, so any value is fine at any time.
#[inline]
pub fn set_cr2(value: u64) {
    // SAFETY: CR2 affects nothing.
    unsafe { this_processor().write(Register::Cr2, value) };
}

/// PKRU, which VM entries and exits do not switch: it is the guest's. The processor has protection keys.
pub fn pkru() -> u32 {
    let own = cr4();
    // SAFETY: keys are applied to user-mode pages, and nvmx has none.
    unsafe { set_cr4(own | Cr4::PKE.bits()) };
    let value = this_processor().read(Register::Pkru) as u32;
    // SAFETY: it was the value before.
    unsafe { set_cr4(own) };
    value
}

/// CPUID with CR4.KL set, which the guest has set on this processor: the answer says whether firmware has activated Key Locker.
pub fn cpuid_with_key_locker(leaf: u32, subleaf: u32) -> CpuIdResult {
    let own = cr4();
    // SAFETY: the guest runs with the bit, so the processor has it; it enables instructions that nvmx does not use.
    unsafe { set_cr4(own | Cr4::KL.bits()) };
    let answer = this_processor().cpuid(leaf, subleaf);
    // SAFETY: it was the value before.
    unsafe { set_cr4(own) };
    answer
}

const ADDRESSES: [Register; 4] = [Register::Dr0, Register::Dr1, Register::Dr2, Register::Dr3];

/// DR0 to DR3, which are the guest's.
pub fn breakpoint_addresses() -> [u64; 4] {
    ADDRESSES.map(|register| this_processor().read(register))
}

/// Reads DR6, which VM entries and exits do not switch: it is the guest's.
#[inline]
pub fn dr6() -> u64 {
    this_processor().read(Register::Dr6)
}

/// Writes the low half of DR6; the upper one must be 0.
#[inline]
pub fn set_dr6(value: u64) {
    // SAFETY: DR6 affects nothing; a value of 32 bits is accepted.
    unsafe { this_processor().write(Register::Dr6, value & 0xFFFF_FFFF) };
}

/// DR0 to DR3 and DR6 as an INIT leaves them; VM entries and exits do not switch these, so they are L2's.
pub fn reset_debug_registers() {
    const DR6: u64 = 0xFFFF_0FF0;
    // SAFETY: DR7 of nvmx is 0x400 after each exit: no breakpoint is on.
    ADDRESSES.into_iter().for_each(|register| unsafe { this_processor().write(register, 0) });
    set_dr6(DR6);
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
    this_processor().xsetbv(index, value)
}
