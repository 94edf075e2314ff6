//! Events that nvmx itself gives to a guest: those whose delivery an exit interrupted that nvmx handles, faults of
//! instructions that it emulates, NMIs and machine checks that arrive while it runs, and INITs that VMX root operation of L2 blocks.
//!
//! All other events reach their guest by the hardware: interrupts and NMIs go to L2 directly, and while L3 runs they do
//! what vmcs12 says.
//!
//! An NMI that arrives in nvmx is lost to the processor, so nvmx has to wait in its place until the guest can take it. Two
//! controls tell when: the NMI window for a guest that takes its own NMIs, the monitor trap flag for an L3 whose NMIs are
//! exits to L2. The processor so judges blocking, injected events and bad guest state before the NMI counts.
//! [ADR 0011](../../docs/adr/0011-nmis-in-nvmx.md), and for machine checks [ADR 0032](../../docs/adr/0032-machine-checks-in-nvmx.md).
//!
//! Source: SDM vol. 3C, "Event Injection", "NMI-Window Exiting", "Monitor Trap Flag", "Virtual NMIs", "INIT signals".

use super::reflect;
use crate::cpu::{Cpu, INJECTION, Operation, Waiting};
use crate::emul::init;
use crate::guest::events::{ask_for_window, inject, pin12, set_controls};
use crate::guest::machine_check;
use crate::trace::KillReason;
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use crate::vmx::controls::{PinControls, PrimaryControls};
use crate::vmx::event::{EventInfo, EventKind, vector};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::state::{activity, interruptibility};

/// Before the entry into the guest of the current VMCS, if anything waits; an INIT comes before a machine check, and that before an
/// NMI.
#[cold]
pub fn deliver(cpu: &mut Cpu) -> Result<(), KillReason> {
    if cpu.waiting.contains(Waiting::INIT) {
        deliver_init(cpu);
    }
    if !matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        give_back(cpu);
    }
    if cpu.waiting.contains(Waiting::MACHINE_CHECK) {
        match cpu.nested.operation {
            Operation::NonRoot { current, .. } => stop_before_all(cpu, current),
            _ => machine_check::give(cpu)?,
        }
    }
    if cpu.waiting.contains(Waiting::NMI) {
        match pin12(cpu) {
            Some(pin) if pin.contains(PinControls::NMI_EXITING) => stop_nested(cpu, pin),
            _ => ask_for_window(cpu),
        }
    }
    let events = &cpu.events;
    cpu.waiting.set(Waiting::OWN, events.stops_nested || events.lent.is_some());
    Ok(())
}

/// An INIT takes L3 out; outside of VMX operation it resets L2's processor; else it goes on waiting.
fn deliver_init(cpu: &mut Cpu) {
    match cpu.nested.operation {
        Operation::Off => init::take(cpu),
        Operation::Root { .. } => {}
        Operation::NonRoot { current, .. } => {
            if !waits_for_sipi(cpu) {
                stop_before_all(cpu, current);
            }
        }
    }
}

/// Brings L3 to a stop where an INIT or a machine check is taken, which come before everything else: the entry has checked and
/// loaded everything and delivered its event, and L3 has executed nothing. An entry that fails, or an exit while the event is
/// delivered, leaves them waiting.
fn stop_before_all(cpu: &mut Cpu, id: SlotId) {
    if cpu.events.stops_nested || !can_stop_nested(cpu) {
        return;
    }
    cpu.events.stops_nested = true;
    cpu.waiting |= Waiting::OWN;
    let event = EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32);
    let primary12 = cpu.nested.slots[id].vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32;
    if !event.is_valid() {
        stop_at_once(cpu);
    } else if !event.is(EventKind::Other) && !steps(primary12) {
        set_controls(cpu, PinControls::empty(), PrimaryControls::MONITOR_TRAP_FLAG, true);
    }
}

/// L3 waits for a start-up message, of vmcs02, which is current: INIT and NMI are blocked (SDM vol. 3C, "Changes in the Guest's Activity
/// State").
fn waits_for_sipi(cpu: &mut Cpu) -> bool {
    cpu.vmx.read(Field::GUEST_ACTIVITY_STATE) == activity::WAIT_FOR_SIPI
}

/// The processor has the monitor trap flag.
fn can_stop_nested(cpu: &Cpu) -> bool {
    cpu.config.hardware.primary.settable().contains(PrimaryControls::MONITOR_TRAP_FLAG)
}

/// L2 sets the monitor trap flag.
fn steps(primary12: u32) -> bool {
    PrimaryControls::from_bits_retain(primary12).contains(PrimaryControls::MONITOR_TRAP_FLAG)
}

/// L2 runs again: the fields of vmcs02 that nvmx used have L2's values again. Controls are written with its next entry.
fn give_back(cpu: &mut Cpu) {
    cpu.events.stops_nested = false;
    let activity = cpu.events.activity.take();
    let Some((id, values)) = cpu.events.lent.take() else { return };
    cpu.enter_vmcs02(id);
    for (field, value) in INJECTION.into_iter().zip(values) {
        cpu.vmx.write(field, value);
    }
    if let Some(activity) = activity {
        cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, activity);
    }
    cpu.leave_vmcs02(id);
}

/// L2 wants NMIs of L3: brings L3 to a stop behind the event that is being injected, or at once.
fn stop_nested(cpu: &mut Cpu, pin: PinControls) {
    let Operation::NonRoot { current, .. } = cpu.nested.operation else { return };
    let primary12 = cpu.nested.slots[current].vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32;
    let event = EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32);
    let blocking = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    let nmis_blocked = blocking & interruptibility::NMI != 0;
    let blocked = nmis_blocked && !pin.contains(PinControls::VIRTUAL_NMIS);
    // What comes before an NMI takes L3 to L2 by itself, and L2 then takes the NMI: a step, the timer, the NMI window.
    let steps = steps(primary12) || event.is(EventKind::Other);
    let timer = pin.contains(PinControls::PREEMPTION_TIMER) && cpu.vmx.read(Field::VMX_PREEMPTION_TIMER_VALUE) == 0;
    let window = PrimaryControls::from_bits_retain(primary12).contains(PrimaryControls::NMI_WINDOW_EXITING)
        && !nmis_blocked
        && !event.is(EventKind::Nmi);
    if cpu.events.stops_nested || blocked || steps || timer || window || waits_for_sipi(cpu) || !can_stop_nested(cpu) {
        return;
    }
    cpu.events.stops_nested = true;
    cpu.waiting |= Waiting::OWN;
    if event.is_valid() || blocking & interruptibility::STI_OR_MOV_SS != 0 {
        set_controls(cpu, PinControls::empty(), PrimaryControls::MONITOR_TRAP_FLAG, true);
    } else {
        stop_at_once(cpu);
    }
}

/// L3 exits before it executes anything.
fn stop_at_once(cpu: &mut Cpu) {
    let state = cpu.vmx.read(Field::GUEST_ACTIVITY_STATE);
    cpu.events.activity = Some(state);
    // The processor takes no such event into a guest that is shut down or waits for a start-up message.
    if matches!(state, activity::SHUTDOWN | activity::WAIT_FOR_SIPI) {
        cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, activity::ACTIVE);
    }
    inject(cpu, EventInfo::new(EventKind::Other, 0), None, None);
}

/// An exit of L3 by the monitor trap flag: if nvmx asked for it, L2 gets the INIT, L2 or L3 the machine check, or L2 the NMI. Says
/// whether nvmx asked.
#[cold]
pub fn stopped_nested(cpu: &mut Cpu, id: SlotId) -> Result<bool, KillReason> {
    if !core::mem::take(&mut cpu.events.stops_nested) {
        return Ok(false);
    }
    set_controls(cpu, PinControls::empty(), PrimaryControls::MONITOR_TRAP_FLAG, false);
    if let Some(activity) = cpu.events.activity.take() {
        cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, activity);
    }
    if cpu.waiting.contains(Waiting::INIT) {
        cpu.waiting -= Waiting::INIT;
        reflect::reflect(cpu, id, Some((ExitReason::exit(BasicReason::INIT_SIGNAL), 0)))?;
        return Ok(true);
    }
    if cpu.waiting.contains(Waiting::MACHINE_CHECK) {
        cpu.waiting -= Waiting::MACHINE_CHECK;
        machine_check_of_nested(cpu, id)?;
        return Ok(true);
    }
    cpu.waiting -= Waiting::NMI;
    reflect::exception(cpu, id, EventInfo::new(EventKind::Nmi, vector::NMI).0, None, 0)?;
    Ok(true)
}

/// A machine check before L3's next instruction: an exit if L2 wants it, else L3's exception. Where CR4.MCE of L3 is clear a processor
/// shuts down, the machine with it; L3 does not end L2's machine (I7), and shuts down alone.
fn machine_check_of_nested(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let exits = cpu.vmx.read(Field::EXCEPTION_BITMAP) >> vector::MC & 1 == 1;
    if exits {
        return reflect::exception(cpu, id, machine_check::EVENT.0, None, 0);
    }
    if machine_check::enabled(cpu) && !waits_for_sipi(cpu) {
        inject(cpu, machine_check::EVENT, None, None);
        return Ok(());
    }
    reflect::reflect(cpu, id, Some((ExitReason::exit(BasicReason::TRIPLE_FAULT), 0)))
}
