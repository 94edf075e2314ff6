//! NMIs that arrive while nvmx itself runs: they go to the guest that runs next.
//!
//! All other events reach their guest by the hardware: interrupts and NMIs go to L2 directly, and while L3 runs they do
//! what vmcs12 says. Source: SDM vol. 3C, "Event Injection", "Exceptions and Interrupts" of VMX non-root operation.

use super::{Operation, reflect};
use crate::error::KillReason;
use crate::hw::cpu;
use crate::vcpu::Cpu;
use crate::vmx::Field;
use crate::vmx::controls::PinControls;
use crate::vmx::event::{EventInfo, EventKind, vector};
use crate::vmx::exit::{BasicReason, ExitReason};

/// Blocking by STI, MOV SS, SMI or NMI.
const NMI_UNDELIVERABLE: u64 = 0b1111;

/// The entry was called off because an NMI is pending: takes it over.
pub fn take_nmi(cpu: &mut Cpu) {
    cpu.nmi_waits |= cpu::this().take_nmi();
}

/// Delivers the waiting NMI if the guest of the current VMCS can take it now; else it waits for the next exit.
#[cold]
pub fn deliver_nmi(cpu: &mut Cpu) -> Result<(), KillReason> {
    if EventInfo(cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD) as u32).is_valid() {
        return Ok(());
    }
    let nmi = EventInfo::new(EventKind::Nmi, vector::NMI);
    if let Operation::NonRoot { current, .. } = cpu.nested.operation {
        let slot = &mut cpu.nested.slots[current];
        let pin = PinControls::from_bits_retain(slot.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32);
        if pin.contains(PinControls::NMI_EXITING) {
            cpu.nmi_waits = false;
            cpu.vmx.write(Field::VM_EXIT_INTR_INFO, nmi.0 as u64);
            cpu.vmx.write(Field::IDT_VECTORING_INFO_FIELD, 0);
            return reflect::reflect(cpu, current, Some((ExitReason::exit(BasicReason::EXCEPTION_OR_NMI), 0)));
        }
    }
    if cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO) & NMI_UNDELIVERABLE == 0 {
        cpu.nmi_waits = false;
        cpu.vmx.write(Field::VM_ENTRY_INTR_INFO_FIELD, nmi.0 as u64);
    }
    Ok(())
}
