//! Into a guest and back, on whichever processor.

pub use super::processor::Entered;
pub use super::regs::GuestRegs;

use super::processor::Processor;
use super::this_processor;

/// Address of the exit path, for HOST_RIP.
pub fn host_rip() -> u64 {
    this_processor().exit_path()
}

/// No time is booked from now on: before a host-state area is written.
pub fn without_clock() {
    this_processor().without_clock();
}

/// Exits are traced from now on ([`Entered::TracedExit`]): before a host-state area is written. The others pay nothing.
pub fn trace_exits() {
    this_processor().trace_exits();
}

/// Enters the guest of the current VMCS and returns after its next exit.
#[inline(always)]
pub fn enter(regs: &mut GuestRegs, launch: bool) -> Entered {
    this_processor().enter(regs, launch)
}

/// TSC.
pub fn now() -> u64 {
    this_processor().tsc()
}

/// The guest exited a moment ago: for where exits do not note it.
#[inline(always)]
pub fn note_exit(regs: &mut GuestRegs) {
    regs.exited_at(now());
}

/// Starts the clock of nvmx's own time. Entries follow, for which the registers stay where they are: borrowed as they are here.
///
/// # Panics
///
/// If the registers are not those that the host-state areas point to.
pub fn start_clock(regs: &mut GuestRegs) {
    assert!(regs.are_at_home(), "HOST_RSP points to other registers");
    regs.exited_at(now());
}
