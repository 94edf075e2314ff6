//! The run loop.

use crate::cpu::{Cpu, Operation, Waiting};
use crate::guest::events;
use crate::hw::cpu::{self, PerCpu};
use crate::hw::vmenter::{self, Entered};
use crate::nested::events::deliver;
use crate::nested::{entry, nested_exit, usual};
use crate::run::{guest_exit, stale, tracing};
use crate::trace::KillReason;
use crate::trace::Ran;
use crate::vmcs::once::Once;
use crate::vmx::Field;
use crate::vmx::exit::{BasicReason, ExitReason};
use core::ops::ControlFlow;

/// Something is to be done before an entry that most entries do without.
#[cold]
fn before_entry(cpu: &mut Cpu) -> Result<(), KillReason> {
    deliver(cpu)?;
    if cpu.waiting.contains(Waiting::LOOK) && matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        stale::look(cpu);
    }
    if cpu.waiting.contains(Waiting::TRACE) {
        tracing::goes_on(cpu);
    }
    Ok(())
}

/// Runs L2 and L3 until the machine ends.
pub fn run(cpu: &mut Cpu) -> KillReason {
    let this = cpu::this();
    this.clear_unused_stack();
    vmenter::start_clock(&mut cpu.regs);
    loop {
        if let Err(reason) = round(cpu, this) {
            return reason;
        }
    }
}

/// What is to be done first, the turns by the usual way, and the exit that ends them.
#[inline(always)]
fn round(cpu: &mut Cpu, this: &PerCpu) -> Result<(), KillReason> {
    if !cpu.waiting.is_empty() {
        before_entry(cpu)?;
    }
    match turns(cpu, this) {
        Left::Guest(reason) => guest_exit::handle(cpu, reason),
        Left::Nested(reason) => nested_exit::handle(cpu, reason),
        Left::Interrupted => Ok(()),
        Left::NestedRefused => entry::refused_by_processor(cpu),
        Left::GuestRefused => {
            let reason = cpu.vmx.read(Field::VM_INSTRUCTION_ERROR) as u32;
            Err(KillReason::EntryFailed { reason, qualification: 0 })
        }
    }
}

/// Where the turns by the usual way end.
enum Left {
    /// An exit of L2 is to be handled.
    Guest(ExitReason),
    /// An exit of L3 is to be handled.
    Nested(ExitReason),
    /// Nothing is, but an event waits.
    Interrupted,
    /// The processor refused to enter L2.
    GuestRefused,
    /// The processor refused to enter L3.
    NestedRefused,
}

/// Enters L2 or L3. By the usual way L2 follows an exit of L3, and L3 a VMRESUME of L2, until something else is to be done.
#[inline(always)]
fn turns(cpu: &mut Cpu, this: &PerCpu) -> Left {
    let mut launch = if matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        let launch = nested_exit::needs_launch(cpu);
        if let ControlFlow::Break(left) = nested_turn(cpu, this, launch) {
            return left;
        }
        false
    } else {
        !cpu.launched01
    };
    loop {
        if let ControlFlow::Break(left) = guest_turn(cpu, this, launch) {
            return left;
        }
        // Its vmcs02 was a shadow VMCS just now, and so is clear.
        const LAUNCH: bool = true;
        if let ControlFlow::Break(left) = nested_turn(cpu, this, LAUNCH) {
            return left;
        }
        // It ran before.
        launch = false;
    }
}

/// Enters L2, by VMLAUNCH or not. It goes on with L3 if L2 exits by a VMRESUME that takes no more than the usual.
#[inline(always)]
fn guest_turn(cpu: &mut Cpu, this: &PerCpu, launch: bool) -> ControlFlow<Left> {
    match vmenter::enter(&mut cpu.regs, launch) {
        Entered::Exit => {}
        other => not_entered(cpu, other, Left::GuestRefused)?,
    }
    let reason = ExitReason(cpu.vmx.read(Field::VM_EXIT_REASON) as u32);
    cpu.exited = Ran::Guest;
    cpu.vmx.counters.exit(Ran::Guest, reason);
    this.note_guest_exit(reason);
    if !reason.is_entry_failure() {
        cpu.launched01 = true;
        if !cpu.once01.is_empty() {
            loaded_once(cpu);
        }
    }
    if reason.0 != u32::from(BasicReason::VMRESUME.0) || !usual::resume(cpu) {
        return ControlFlow::Break(Left::Guest(reason));
    }
    goes_on(cpu)
}

/// Enters L3, by VMLAUNCH or not. It goes on with L2 if the exit is one that L2 has by the usual way.
#[inline(always)]
fn nested_turn(cpu: &mut Cpu, this: &PerCpu, launch: bool) -> ControlFlow<Left> {
    match vmenter::enter(&mut cpu.regs, launch) {
        Entered::Exit => {}
        other => not_entered(cpu, other, Left::NestedRefused)?,
    }
    let reason = ExitReason(cpu.vmx.read(Field::VM_EXIT_REASON) as u32);
    cpu.exited = Ran::Nested;
    cpu.vmx.counters.exit(Ran::Nested, reason);
    if !cpu.vmx.counters.measures() {
        // The preemption timer goes on from here.
        vmenter::note_exit(&mut cpu.regs);
    }
    this.note_nested_exit(reason);
    if !usual::exit(cpu, reason) {
        return ControlFlow::Break(Left::Nested(reason));
    }
    goes_on(cpu)
}

/// The next turn may follow, if no event waits.
#[inline(always)]
fn goes_on(cpu: &Cpu) -> ControlFlow<Left> {
    if cpu.waiting.is_empty() { ControlFlow::Continue(()) } else { ControlFlow::Break(Left::Interrupted) }
}

/// It was no plain exit.
#[cold]
fn not_entered(cpu: &mut Cpu, how: Entered, refused: Left) -> ControlFlow<Left> {
    match how {
        Entered::Exit => {}
        Entered::TracedExit => tracing::left(cpu),
        Entered::CalledOff => {
            events::take_arrived(cpu);
            return ControlFlow::Break(Left::Interrupted);
        }
        Entered::VmFail => return ControlFlow::Break(refused),
    }
    ControlFlow::Continue(())
}

/// vmcs01, which is current, entered with what an exit of L3 was to load.
#[cold]
fn loaded_once(cpu: &mut Cpu) {
    if cpu.once01.contains(Once::MSR_AREA) {
        cpu.tracked.refresh(&mut cpu.vmx);
    }
    cpu.once01.done(&mut cpu.vmx);
}
