//! VMCS shadowing for L3: L2's shadow VMCS, reached by VMREAD and VMWRITE of L3 without an exit to L2.
//!
//! Before an entry the vmcs12 behind the link pointer becomes active in a slot of its own, as it does in a processor. Where
//! the hardware has VMCS shadowing, vmcs02 links to the vmcs02 of that slot, which is in shadow form, and L3 reaches in it
//! the fields that L2's bitmaps leave open and whose values live there. All other accesses exit: to L2 if a bitmap says so,
//! else to nvmx, which makes them in the slot's copy ([`of_nested`]).
//!
//! Source: Intel SDM vol. 3C (December 2024), "VMCS Shadowing", "VMCS Types: Ordinary and Shadow", "Instructions That Cause VM
//! Exits Conditionally".

use super::{active, completion, fields, result};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::cpu::Cpu;
use crate::guest::operand::{self, require_cpl0};
use crate::guest::{Next, Stop, inject};
use crate::rules::merge::{self, Duties};
use crate::trace::KillReason;
use crate::vmcs::slot::VmcsKind;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::bitmap::Access;
use crate::vmx::region::{NO_LINK, REVISION, SHADOW_INDICATOR};
use crate::vmx::{Field, VmxResult};

/// Makes the shadow VMCS of a slot's vmcs12 ready for an entry; vmcs01 is current, the rules on controls hold. A link pointer
/// that breaks a rule is left to the rules on guest state. Answers with the link pointer for vmcs02.
#[cold]
pub fn link(cpu: &mut Cpu, id: SlotId) -> u64 {
    let slot = &mut cpu.nested.slots[id];
    let shadows = slot.has_duty(Duties::LINK_SHADOW_VMCS);
    let link12 = slot.vmcs12.get(Field::VMCS_LINK_POINTER);
    let at = Gpa::new(link12);
    let good = at.is_aligned(PAGE_SIZE)
        && cpu.config.offered.is_physical(link12)
        && slot.vmptr != Some(at)
        && Vmcs12::revision(&cpu.guest, at) == Ok(REVISION | SHADOW_INDICATOR);
    slot.linked = None;
    if link12 != NO_LINK && !(shadows && good) {
        slot.stale |= Stale::GUEST;
    }
    if !shadows {
        return NO_LINK;
    }
    let bitmaps = slot.merged.and_then(|m| m.shadow_bitmaps);
    if bitmaps.is_some() {
        let fields = [Field::VMREAD_BITMAP, Field::VMWRITE_BITMAP];
        for ((field, to), ours) in fields.into_iter().zip(&slot.shadow_bitmaps).zip(&cpu.shadow_words) {
            merge::shadow_bitmap(&cpu.phys, ours, &cpu.guest, Gpa::new(slot.vmcs12.get(field)), to);
        }
    }
    if link12 == NO_LINK || !good {
        return NO_LINK;
    }
    // The current vmcs12 must not be the one that makes room.
    cpu.nested.touch(id);
    let linked = active::activate(cpu, at, VmcsKind::Shadow);
    cpu.nested.touch(linked);
    let (target, access, on) = cpu.reach(linked);
    let link = bitmaps.map(|_| {
        access.rest(on, target);
        target.vmcs02.region().at().get()
    });
    cpu.nested.slots[id].linked = Some(linked);
    link.unwrap_or(NO_LINK)
}

/// The encoding in the register operand of L3's VMREAD or VMWRITE; vmcs02 is current.
pub fn encoding(cpu: &mut Cpu) -> u64 {
    let info = operand::field_access_info(cpu);
    operand::second_register(cpu, info)
}

/// L3's VMREAD or VMWRITE that L2's bitmaps let through and the hardware does not; vmcs02 is current.
pub fn of_nested(cpu: &mut Cpu, id: SlotId, access: Access) -> Result<(), KillReason> {
    let linked = cpu.nested.slots[id].linked;
    let access_field = match access {
        Access::Read => fields::read,
        Access::Write => fields::write,
    };
    let result = match (require_cpl0(cpu), linked) {
        (Err(fault), _) => Err(Stop::Fault(fault)),
        (Ok(()), Some(linked)) => access_field(cpu, linked),
        (Ok(()), None) => {
            result::vmx_result(cpu, VmxResult::FailInvalid);
            Ok(Next::Advance)
        }
    };
    match result {
        Ok(Next::Advance) => completion::completed(cpu, id),
        Ok(Next::Stay) => Ok(()),
        Err(Stop::Fault(fault)) => completion::refused(cpu, id, fault),
        Err(Stop::Miss(miss)) => completion::missed(cpu, id, miss),
        Err(Stop::Kill(reason)) => Err(reason),
        Err(Stop::Again) => {
            inject::set_resume_flag(&mut cpu.vmx);
            Ok(())
        }
    }
}
