//! A machine check that arrived in nvmx and left it alone, for L2: it gets the exception before its next instruction, and finds
//! IA32_MCG_STATUS and the banks as the processor wrote them.
//!
//! [ADR 0032](../../docs/adr/0032-machine-checks-in-nvmx.md). Source: SDM vol. 3C, "Machine-Check Events During VM Entry"; vol. 3B,
//! chapter "Machine-Check Architecture".

use crate::cpu::{Cpu, Waiting};
use crate::guest::events::{inject, set_controls};
use crate::hw::machine_check;
use crate::trace::KillReason;
use crate::vmx::Field;
use crate::vmx::controls::{PinControls, PrimaryControls};
use crate::vmx::event::{EventInfo, EventKind, vector};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::state::activity;
use crate::x86::Cr4;

/// #MC
pub const EVENT: EventInfo = EventInfo::new(EventKind::HardwareException, vector::MC);

/// L2, whose VMCS is current, is entered next and takes it: behind an event that is being delivered, else at once.
#[cold]
pub fn give(cpu: &mut Cpu) -> Result<(), KillReason> {
    if cpu.vmx.read(Field::GUEST_ACTIVITY_STATE) == activity::WAIT_FOR_SIPI {
        // Nobody runs there who could end it, and the next one must not shut the machine down.
        cpu.waiting -= Waiting::MACHINE_CHECK;
        machine_check::end();
    } else if !enabled(cpu) {
        return Err(KillReason::MachineCheck);
    } else if EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32).is_valid() {
        set_controls(cpu, PinControls::empty(), PrimaryControls::MONITOR_TRAP_FLAG, true);
    } else {
        cpu.waiting -= Waiting::MACHINE_CHECK;
        inject(cpu, EVENT, None, None);
    }
    Ok(())
}

/// An entry of nvmx's failed. By a machine check that left nvmx alone, it is as if that had arrived before, and the entry is made again;
/// whose machine check it is does not depend on the processor's choice among the three ways.
#[cold]
pub fn stopped_entry(cpu: &mut Cpu, reason: ExitReason) -> bool {
    let stopped = reason.basic() == BasicReason::ENTRY_MACHINE_CHECK && machine_check::leaves_nvmx_alone();
    cpu.waiting.set(Waiting::MACHINE_CHECK, stopped || cpu.waiting.contains(Waiting::MACHINE_CHECK));
    stopped
}

/// Does the guest of the current VMCS have CR4.MCE?
pub fn enabled(cpu: &mut Cpu) -> bool {
    cpu.vmx.read(Field::GUEST_CR4) & Cr4::MCE.bits() != 0
}

/// L2 exits by the monitor trap flag: the event that was to be delivered first is.
#[cold]
pub fn event_delivered(cpu: &mut Cpu) {
    set_controls(cpu, PinControls::empty(), PrimaryControls::MONITOR_TRAP_FLAG, false);
}
