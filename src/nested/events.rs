//! Events that arrive when their guest cannot take them: NMIs that hit nvmx itself, and INITs that VMX root operation of L2
//! blocks. They go to the guest that runs next.
//!
//! All other events reach their guest by the hardware: interrupts and NMIs go to L2 directly, and while L3 runs they do
//! what vmcs12 says. Source: SDM vol. 3C, "Event Injection", "Exceptions and Interrupts" of VMX non-root operation, "INIT
//! signals".

use super::{Operation, reflect};
use crate::emul::init;
use crate::error::KillReason;
use crate::hw::cpu;
use crate::vcpu::{Cpu, Waiting};
use crate::vmx::Field;
use crate::vmx::controls::PinControls;
use crate::vmx::event::{EventInfo, EventKind, vector};
use crate::vmx::exit::{BasicReason, ExitReason};

/// Blocking by STI, MOV SS, SMI or NMI.
const NMI_UNDELIVERABLE: u64 = 0b1111;

/// The entry was called off because an NMI is pending: takes it over.
pub fn take_nmi(cpu: &mut Cpu) {
    if cpu::this().take_nmi() {
        cpu.waiting |= Waiting::NMI;
    }
}

/// Delivers what waits to the guest of the current VMCS, as far as it can take it now; an INIT comes before an NMI.
#[cold]
pub fn deliver(cpu: &mut Cpu) -> Result<(), KillReason> {
    if cpu.waiting.contains(Waiting::INIT) {
        deliver_init(cpu)?;
    }
    if cpu.waiting.contains(Waiting::NMI) {
        deliver_nmi(cpu)?;
    }
    Ok(())
}

/// An INIT takes L3 out; outside of VMX operation it resets L2's processor; else it goes on waiting.
fn deliver_init(cpu: &mut Cpu) -> Result<(), KillReason> {
    match cpu.nested.operation {
        Operation::Off => init::reset(cpu),
        Operation::Root { .. } => {}
        Operation::NonRoot { current, .. } => {
            cpu.waiting -= Waiting::INIT;
            // What L2 injects with this entry is not lost: it counts as an event whose delivery the exit hit.
            let injected = EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32);
            let vectoring = if injected.is_valid() { injected.0 } else { 0 };
            let code = cpu.vmx.read(Field::VM_ENTRY_EXCEPTION_ERROR_CODE);
            for (field, value) in [
                (Field::VM_EXIT_INTR_INFO, 0),
                (Field::IDT_VECTORING_INFO_FIELD, u64::from(vectoring)),
                (Field::IDT_VECTORING_ERROR_CODE, code),
                (Field::VM_ENTRY_INTR_INFO_FIELD, 0),
            ] {
                cpu.vmx.write(field, value);
            }
            return reflect::reflect(cpu, current, Some((ExitReason::exit(BasicReason::INIT_SIGNAL), 0)));
        }
    }
    Ok(())
}

/// Delivers the waiting NMI if the guest of the current VMCS can take it now; else it waits for the next exit.
fn deliver_nmi(cpu: &mut Cpu) -> Result<(), KillReason> {
    if EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32).is_valid() {
        return Ok(());
    }
    let nmi = EventInfo::new(EventKind::Nmi, vector::NMI);
    if let Operation::NonRoot { current, .. } = cpu.nested.operation {
        let slot = &mut cpu.nested.slots[current];
        let pin = PinControls::from_bits_retain(slot.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32);
        if pin.contains(PinControls::NMI_EXITING) {
            cpu.waiting -= Waiting::NMI;
            cpu.vmx.write(Field::VM_EXIT_INTR_INFO, nmi.0 as u64);
            cpu.vmx.write(Field::IDT_VECTORING_INFO_FIELD, 0);
            return reflect::reflect(cpu, current, Some((ExitReason::exit(BasicReason::EXCEPTION_OR_NMI), 0)));
        }
    }
    if cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO) & NMI_UNDELIVERABLE == 0 {
        cpu.waiting -= Waiting::NMI;
        cpu.vmx.write(Field::VM_ENTRY_INTR_INFO_FIELD, nmi.0 as u64);
    }
    Ok(())
}
