//! Sub-page write permissions of L3: vmcs02 points to the spp02 of the ept02 that it runs on. vmcs02 is current.
//!
//! Source: SDM vol. 3C, "SPP-Induced VM Exits".

use super::{fill, reflect};
use crate::addr::{Gpa, Ngpa};
use crate::cpu::Cpu;
use crate::ept::{Outcome, Qualification};
use crate::guest::missing;
use crate::trace::{KillReason, Promise};
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use crate::vmx::exit::{BasicReason, ExitReason};

/// To be done where vmcs02 was made to run on an ept02, for a vmcs12 with the control.
#[cold]
pub fn point(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let slot = &mut cpu.nested.slots[id];
    let spptp12 = Gpa::new(slot.vmcs12.get(Field::SUB_PAGE_PERMISSION_TABLE_POINTER));
    let mut tables = Cpu::tables(&mut cpu.frames, &cpu.phys);
    let Some(sub_pages) = cpu.ept02.sub_pages(spptp12, &mut tables) else {
        return Err(KillReason::Broken(Promise::FrameInReserve));
    };
    slot.vmcs02.point_to_sub_pages(&mut cpu.vmx, sub_pages);
    Ok(())
}

/// An SPP-related event of L3: fills spp02, or tells L2.
#[cold]
pub fn event(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let slot = &mut cpu.nested.slots[id];
    let at = Ngpa::new(cpu.vmx.read(Field::GUEST_PHYSICAL_ADDRESS));
    let qualification = Qualification::from_bits_retain(cpu.vmx.read(Field::EXIT_QUALIFICATION));
    let (eptp12, mut tables) = (slot.eptp12(), Cpu::tables(&mut cpu.frames, &cpu.phys));
    match cpu.ept02.sub_page_event(eptp12, at, qualification, &cpu.guest, &mut tables) {
        Outcome::ReflectSubPageEvent { qualification } => tell(cpu, id, qualification),
        _ => {
            fill::count(cpu);
            fill::run_on_it(cpu, id);
            missing::redeliver(cpu, qualification);
            Ok(())
        }
    }
}

/// L2 sees an SPP-related event.
#[cold]
pub fn tell(cpu: &mut Cpu, id: SlotId, qualification: Qualification) -> Result<(), KillReason> {
    let reason = ExitReason::exit(BasicReason::SPP_EVENT);
    reflect::reflect(cpu, id, Some((reason, qualification.bits())))
}
