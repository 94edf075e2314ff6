//! Events for the guest of the current VMCS: injected, delivered again after an exit that nvmx handled, or awaited.
//!
//! Source: SDM vol. 3C, "Event Injection", "NMI-Window Exiting", "Virtual NMIs".

use crate::cpu::{Cpu, INJECTION, Operation, Startup, Waiting};
use crate::hw::cpu;
use crate::hw::vmx::Vmx;
use crate::vmcs::stale::Stale;
use crate::vmx::Field;
use crate::vmx::controls::{PinControls, PrimaryControls};
use crate::vmx::event::{EventInfo, EventKind, Redelivery, vector};
use crate::vmx::state::interruptibility;

/// Gives an event to the guest of the current VMCS with the next entry.
#[cold]
pub fn inject(cpu: &mut Cpu, info: EventInfo, error: Option<u32>, length: Option<u32>) {
    if let Operation::NonRoot { current, .. } = cpu.nested.operation {
        if cpu.events.lent.is_none() {
            cpu.events.lent = Some((current, INJECTION.map(|field| cpu.vmx.read(field))));
            cpu.waiting |= Waiting::OWN;
        }
    }
    let [to_info, to_error, to_length] = INJECTION;
    cpu.vmx.write(to_info, info.0 as u64);
    if let Some(error) = error {
        cpu.vmx.write(to_error, error as u64);
    }
    if let Some(length) = length {
        cpu.vmx.write(to_length, length as u64);
    }
}

/// After an exit that nvmx handled and that hit the delivery of this event: delivers it again.
#[cold]
pub fn deliver_again(cpu: &mut Cpu, vectoring: EventInfo) {
    let error = cpu.vmx.read(Field::IDT_VECTORING_ERROR_CODE) as u32;
    let length = cpu.vmx.read(Field::VM_EXIT_INSTRUCTION_LEN) as u32;
    let again = Redelivery::of(vectoring, error, length);
    // An NMI blocks NMIs by its own delivery, and may be injected only if they are not blocked.
    if again.info.is(EventKind::Nmi) {
        set_nmi_blocking(&mut cpu.vmx, false);
    }
    inject(cpu, again.info, again.error, again.length);
}

/// After a fault of an IRET that had unblocked NMIs already and runs again.
#[cold]
pub fn iret_again(cpu: &mut Cpu) {
    // Without virtual NMIs an IRET of L3 does not unblock those that exit to L2, and what the exit says is undefined.
    if !pin12(cpu)
        .is_some_and(|pin| pin & (PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS) == PinControls::NMI_EXITING)
    {
        set_nmi_blocking(&mut cpu.vmx, true);
    }
}

fn set_nmi_blocking(vmx: &mut Vmx, blocked: bool) {
    let others = vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO) & !interruptibility::NMI;
    vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, others | if blocked { interruptibility::NMI } else { 0 });
}

/// L2's pin-based controls for L3, if L3 is the guest of the current VMCS.
pub fn pin12(cpu: &Cpu) -> Option<PinControls> {
    let Operation::NonRoot { current, .. } = cpu.nested.operation else { return None };
    let slot = &cpu.nested.slots[current];
    Some(PinControls::from_bits_retain(slot.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32))
}

/// An NMI arrived: in nvmx, or in a guest while nvmx waits for its NMI window.
#[cold]
pub fn note_nmi(cpu: &mut Cpu) {
    cpu.waiting |= Waiting::NMI;
}

/// The entry was called off because something arrived in nvmx: takes it over.
#[cold]
pub fn take_arrived(cpu: &mut Cpu) {
    cpu.waiting |= Waiting::from_bits_retain(cpu::this().take_arrived().bits());
}

/// The controls of the NMI window; the processor keeps blocking by NMI as virtual-NMI blocking meanwhile, in the same bit.
const WINDOW: PinControls = PinControls::NMI_EXITING.union(PinControls::VIRTUAL_NMIS);

/// Has the guest exit once it could take an NMI.
#[cold]
pub fn ask_for_window(cpu: &mut Cpu) {
    set_controls(cpu, WINDOW, PrimaryControls::NMI_WINDOW_EXITING, true);
}

/// The NMI window that nvmx asked for is open: the guest takes the NMI, if there is one.
#[cold]
pub fn window_opened(cpu: &mut Cpu) {
    set_controls(cpu, WINDOW, PrimaryControls::NMI_WINDOW_EXITING, false);
    cpu.start = Startup::Done;
    if cpu.waiting.contains(Waiting::NMI) {
        cpu.waiting -= Waiting::NMI;
        let blocking = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
        if blocking & interruptibility::STI != 0 {
            // A processor may open the window here, and refuse the injection nevertheless.
            cpu.vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, blocking & !interruptibility::STI);
        }
        inject(cpu, EventInfo::new(EventKind::Nmi, vector::NMI), None, None);
    }
}

/// Sets or clears controls of the current VMCS.
pub fn set_controls(cpu: &mut Cpu, pin: PinControls, primary: PrimaryControls, on: bool) {
    let vmx = &mut cpu.vmx;
    if let Operation::NonRoot { current, .. } = cpu.nested.operation {
        let slot = &mut cpu.nested.slots[current];
        slot.vmcs02.alter_controls(vmx, pin, primary, on);
        // L2's come back with its next entry.
        slot.stale |= Stale::WINDOWS;
        return;
    }
    for (field, bits) in
        [(Field::PIN_BASED_VM_EXEC_CONTROL, pin.bits()), (Field::CPU_BASED_VM_EXEC_CONTROL, primary.bits())]
    {
        let (old, bits) = (vmx.read(field), bits as u64);
        let new = if on { old | bits } else { old & !bits };
        if new != old {
            vmx.write(field, new);
        }
    }
}
