//! The run loop.

use crate::cpu::{Cpu, Operation, Waiting};
use crate::guest::events;
use crate::hw::cpu;
use crate::hw::vmenter::{self, Entered};
use crate::nested::events::deliver;
use crate::nested::{entry, nested_exit, usual};
use crate::run::{guest_exit, stale, tracing};
use crate::trace::KillReason;
use crate::trace::Ran;
use crate::vmcs::once::Once;
use crate::vmx::Field;
use crate::vmx::exit::{BasicReason, ExitReason};

/// Something is to be done before an entry that most entries do without.
#[cold]
fn before_entry(cpu: &mut Cpu) {
    deliver(cpu);
    if cpu.waiting.contains(Waiting::LOOK) && matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        stale::look(cpu);
    }
    if cpu.waiting.contains(Waiting::TRACE) {
        tracing::goes_on(cpu);
    }
}

/// Who is entered next, and how.
struct Turn {
    /// L3
    nested: bool,
    /// By VMLAUNCH.
    launch: bool,
}

impl Turn {
    /// As the state says.
    #[inline(always)]
    fn of(cpu: &Cpu) -> Self {
        let nested = matches!(cpu.nested.operation, Operation::NonRoot { .. });
        Self { nested, launch: if nested { nested_exit::needs_launch(cpu) } else { !cpu.launched01 } }
    }

    /// L2 behind an exit of L3: it ran before.
    const GUEST: Self = Self { nested: false, launch: false };
    /// L3 by the usual way: its vmcs02 was a shadow VMCS just now, and so is clear.
    const NESTED: Self = Self { nested: true, launch: true };
}

/// Runs L2 and L3 until the machine ends.
pub fn run(cpu: &mut Cpu) -> KillReason {
    let this = cpu::this();
    this.clear_unused_stack();
    vmenter::start_clock(&mut cpu.regs);
    loop {
        if !cpu.waiting.is_empty() {
            before_entry(cpu);
        }
        let mut turn = Turn::of(cpu);
        // By the usual way one turn follows from the other.
        let handled = loop {
            match vmenter::enter(&mut cpu.regs, turn.launch) {
                Entered::Exit => {}
                Entered::TracedExit => tracing::left(cpu),
                Entered::Nmi => {
                    events::take_nmi(cpu);
                    break Ok(());
                }
                Entered::VmFail if turn.nested => break entry::refused_by_processor(cpu),
                Entered::VmFail => {
                    let reason = cpu.vmx.read(Field::VM_INSTRUCTION_ERROR) as u32;
                    break Err(KillReason::EntryFailed { reason, qualification: 0 });
                }
            }
            let reason = ExitReason(cpu.vmx.read(Field::VM_EXIT_REASON) as u32);
            if turn.nested {
                cpu.exited = Ran::Nested;
                cpu.vmx.counters.exit(Ran::Nested, reason);
                if !cpu.vmx.counters.measures() {
                    // The preemption timer goes on from here.
                    vmenter::note_exit(&mut cpu.regs);
                }
                this.note_nested_exit(reason);
                if !usual::exit(cpu, reason) {
                    break nested_exit::handle(cpu, reason);
                }
                turn = Turn::GUEST;
            } else {
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
                    break guest_exit::handle(cpu, reason);
                }
                turn = Turn::NESTED;
            }
            if !cpu.waiting.is_empty() {
                break Ok(());
            }
        };
        if let Err(reason) = handled {
            return reason;
        }
    }
}

/// vmcs01, which is current, entered with what an exit of L3 was to load.
#[cold]
fn loaded_once(cpu: &mut Cpu) {
    if cpu.once01.contains(Once::MSR_AREA) {
        cpu.tracked.refresh(&mut cpu.vmx);
    }
    cpu.once01.done(&mut cpu.vmx);
}
