//! Into a guest and back, on whichever processor.

pub use super::processor::Entered;
pub use super::regs::GuestRegs;

use super::processor::Processor;
use super::this_processor;
use super::vmx::Vmx;
use l2_protocol::abi::Counter;

/// Address of the exit path, for HOST_RIP.
pub fn host_rip() -> u64 {
    this_processor().exit_path()
}

/// Enters the guest of the current VMCS and returns after its next exit.
#[inline(always)]
pub fn enter(vmx: &mut Vmx, regs: &mut GuestRegs, launch: bool) -> Entered {
    let entered = this_processor().enter(regs, launch);
    vmx.counters.set(Counter::L1Ticks, regs.ticks);
    entered
}

/// TSC.
pub fn now() -> u64 {
    this_processor().tsc()
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
