//! EPT violations that the guest does not see.

use super::events;
use crate::addr::Gpa;
use crate::cpu::Cpu;
use crate::ept::{Qualification, Resolved};
use crate::trace::KillReason;
use crate::vmx::Field;
use crate::vmx::event::EventInfo;
use crate::x86::Fault;

/// Maps what ept01 lacks at `at`, after a violation of the guest of the current VMCS. Answers with the exception that the
/// guest gets if there is nothing and an instruction can say so.
///
/// Only the load of PDPTEs by a MOV to a control register has no linear address (SDM vol. 3C, table "Exit Qualification for
/// EPT Violations"). Where nothing answers they read as all ones, which the instruction refuses.
pub fn map_missing(cpu: &mut Cpu, at: Gpa) -> Result<Option<Fault>, KillReason> {
    let qualification = Qualification::from_bits_retain(cpu.vmx.read(Field::EXIT_QUALIFICATION));
    let mtrrs = &cpu.config.mtrrs;
    let memory_type = |start: Gpa, bytes| mtrrs.type_of(start.get(), bytes);
    match cpu.ept01.map_missing(at, memory_type, &mut Cpu::tables(&mut cpu.frames, &cpu.phys)) {
        Ok(Resolved::Mapped | Resolved::Present) => {
            redeliver(cpu, qualification);
            Ok(None)
        }
        _ if !qualification.contains(Qualification::LINEAR_VALID) => Ok(Some(Fault::GeneralProtection(0))),
        Ok(Resolved::Forbidden | Resolved::BeyondPhysical) | Err(_) => Err(KillReason::ForbiddenMemory(at)),
    }
}

/// After an EPT violation that L2 does not see, with the qualification it had: the event whose delivery it hit is delivered
/// again, or the IRET runs again (SDM, "Information for VM Exits That Occur During Event Delivery", "Information About NMI
/// Unblocking Due to IRET").
#[inline(always)]
pub fn redeliver(cpu: &mut Cpu, qualification: Qualification) {
    let vectoring = EventInfo(cpu.vmx.read(Field::IDT_VECTORING_INFO_FIELD) as u32);
    if vectoring.is_valid() {
        events::deliver_again(cpu, vectoring);
    } else if qualification.contains(Qualification::NMI_UNBLOCKING) {
        events::iret_again(cpu);
    }
}
