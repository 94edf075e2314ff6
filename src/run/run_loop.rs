//! The run loop.

use crate::cpu::{Cpu, Operation, Waiting};
use crate::guest::events;
use crate::hw::cpu;
use crate::hw::vmenter::{self, Entered};
use crate::nested::events::deliver;
use crate::nested::{entry, nested_exit};
use crate::run::{guest_exit, stale};
use crate::trace::KillReason;
use crate::trace::Ran;
use crate::vmcs::once::Once;
use crate::vmx::Field;
use crate::vmx::exit::ExitReason;

/// Something is to be done before an entry that most entries do without.
#[cold]
fn before_entry(cpu: &mut Cpu) {
    deliver(cpu);
    if cpu.waiting.contains(Waiting::LOOK) && matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        stale::look(cpu);
    }
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
        let nested = matches!(cpu.nested.operation, Operation::NonRoot { .. });
        let launch = if nested { nested_exit::needs_launch(cpu) } else { !cpu.launched01 };
        let entered = vmenter::enter(&mut cpu.vmx, &mut cpu.regs, launch);
        let handled = match entered {
            Entered::Exit => {
                let reason = ExitReason(cpu.vmx.read(Field::VM_EXIT_REASON) as u32);
                if nested {
                    cpu.vmx.counters.exit(Ran::Nested, reason);
                    this.note_nested_exit(reason);
                    nested_exit::handle(cpu, reason)
                } else {
                    cpu.vmx.counters.exit(Ran::Guest, reason);
                    this.note_guest_exit(reason);
                    if !reason.is_entry_failure() {
                        cpu.launched01 = true;
                        if !cpu.once01.is_empty() {
                            loaded_once(cpu);
                        }
                    }
                    guest_exit::handle(cpu, reason)
                }
            }
            Entered::Nmi => {
                events::take_nmi(cpu);
                Ok(())
            }
            Entered::VmFail if nested => entry::refused_by_processor(cpu),
            Entered::VmFail => Err(KillReason::EntryFailed {
                reason: cpu.vmx.read(Field::VM_INSTRUCTION_ERROR) as u32,
                qualification: 0,
            }),
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
