//! What the guest asks its hypervisor for, by VMCALL: RAX = number, RBX and RCX = arguments.

use core::arch::asm;

/// Does nothing: the event `vmcall`.
pub const NOTHING: u64 = 0;
/// Prints RCX bytes of text at RBX.
pub const SAY: u64 = 1;
/// Event RBX comes next, for the time RCX: set the machine up for it, observe its first exit of all.
pub const PREPARE: u64 = 2;
/// The bracket of event RBX begins.
pub const BEGIN: u64 = 3;
/// It ends.
pub const END: u64 = 4;
/// Lets the other guest run.
pub const YIELD: u64 = 5;
/// The guest has done its work.
pub const DONE: u64 = 6;
/// Changes fields of the host-state area before the next entry: the event `host_writes`.
pub const HOST_WRITES: u64 = 7;
/// Changes controls before the next entry: the event `control_writes`.
pub const CONTROL_WRITES: u64 = 8;
/// Invalidates what was cached of the guest's EPT, and changes nothing: the event `invept`.
pub const INVEPT: u64 = 9;

/// Whether an exit for this call only serves the measurement.
pub fn is_service(number: u64) -> bool {
    !matches!(number, NOTHING | YIELD | HOST_WRITES | CONTROL_WRITES | INVEPT)
}

/// The guest's side of a call.
#[inline(always)]
pub fn call(number: u64, b: u64, c: u64) {
    // SAFETY: the hypervisor returns after the instruction with all registers as they were.
    unsafe {
        asm!("xchg rbx, {b}", "vmcall", "xchg rbx, {b}", b = inout(reg) b => _, in("rax") number, in("rcx") c, options(nostack));
    }
}
