//! Active vmcs12s: which slot holds one, how it gets there, and how it goes back to L2's memory.

use crate::addr::Gpa;
use crate::cpu::{Cpu, Operation};
use crate::vmcs::access::MachineParts;
use crate::vmcs::slot::VmcsKind;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::vmcs12::Vmcs12;

/// Makes a slot current, or none.
pub fn make_current(cpu: &mut Cpu, id: Option<SlotId>) {
    if matches!(cpu.nested.operation, Operation::Root { .. }) {
        cpu.nested.operation = Operation::Root { current: id };
    }
    let slot = id.map(|id| {
        cpu.nested.touch(id);
        &cpu.nested.slots[id]
    });
    cpu.config.access.link(&mut cpu.vmx, slot);
}

/// Makes the vmcs12 at `at` active; returns its slot. vmcs01 is current.
pub fn activate(cpu: &mut Cpu, at: Gpa, kind: VmcsKind) -> SlotId {
    let found = cpu.nested.find(at);
    let id = found.unwrap_or_else(|| free_slot(cpu));
    let slot = &mut cpu.nested.slots[id];
    if slot.active {
        return id;
    }
    if found.is_none() || !slot.vmcs12.is_stored_at(&cpu.guest, at) {
        load(cpu, id, at);
    }
    let slot = &mut cpu.nested.slots[id];
    (slot.vmptr, slot.active, slot.kind) = (Some(at), true, kind);
    slot.stale |= Stale::WAY;
    id
}

/// Inactive vmcs12s that keep their slots while others could be made.
const REMEMBERED: usize = 8;

/// A slot for another vmcs12: a free one, else a new one unless enough vmcs12s are inactive, else that of the vmcs12 longest
/// out of use, inactive ones first.
#[cold]
fn free_slot(cpu: &mut Cpu) -> SlotId {
    let slots = &cpu.nested.slots;
    let (free, inactive) = (slots.find(|slot| slot.vmptr.is_none()), slots.iter().filter(|slot| !slot.active).count());
    let new = |cpu: &mut Cpu| if inactive < REMEMBERED { add_slot(cpu) } else { None };
    if let Some(id) = free.or_else(|| new(cpu)) {
        return id;
    }
    let id = cpu.nested.slots.least_used();
    if cpu.nested.slots[id].active {
        if cpu.nested.current() == Some(id) {
            make_current(cpu, None);
        }
        write_back(cpu, id);
    }
    id
}

/// A further slot for L2, if frames are left for it; vmcs01 is current.
#[cold]
fn add_slot(cpu: &mut Cpu) -> Option<SlotId> {
    let id = cpu.nested.slots.add(&mut cpu.frames, &cpu.phys, cpu.config.hardware.basic.revision())?;
    let has = |field| cpu.config.access.has(field);
    cpu.nested.slots[id].vmcs02.set_up(&mut cpu.vmx, &mut cpu.regs, has);
    cpu.vmx.ptrld(cpu.vmcs01);
    Some(id)
}

/// Fills a slot from the region at `at`.
#[cold]
fn load(cpu: &mut Cpu, id: SlotId, at: Gpa) {
    let slot = &mut cpu.nested.slots[id];
    slot.release();
    if slot.vmcs12.load(&cpu.guest, at).is_err() {
        slot.vmcs12 = Vmcs12::new();
    }
    let (slot, access, on) = cpu.reach(id);
    access.load(on, slot);
}

/// Stores an active slot to L2's memory and makes it inactive. vmcs01 is current.
pub fn write_back(cpu: &mut Cpu, id: SlotId) {
    let Some(at) = cpu.nested.slots[id].vmptr else { return };
    let slot = &mut cpu.nested.slots[id];
    let on = MachineParts { vmx: &mut cpu.vmx, phys: &cpu.phys, vmcs01: &cpu.vmcs01 };
    cpu.config.access.store(on, slot);
    // L2 may have no memory there any more: then nothing could have kept its VMCS either.
    let _ = slot.vmcs12.store(&cpu.guest, at);
    slot.active = false;
}
