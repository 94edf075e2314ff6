//! Active vmcs12s: which slot holds one, how it gets there, and how it goes back to L2's memory.

use crate::addr::Gpa;
use crate::cpu::{Cpu, Operation, vmcs02};
use crate::vmcs::access::MachineParts;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::Field;
use crate::vmx::region::NO_LINK;

/// Makes a slot current, or none, and links the shadow VMCS.
pub fn make_current(cpu: &mut Cpu, index: Option<usize>) {
    if let Operation::Root { vmxon_ptr, .. } = cpu.nested.operation {
        cpu.nested.operation = Operation::Root { vmxon_ptr, current: index };
    }
    let link = index.map_or(NO_LINK, |index| {
        cpu.nested.touch(index);
        cpu.nested.slots[index].vmcs02().get()
    });
    if cpu.config.access.vmcs01_links() {
        cpu.vmx.write(Field::VMCS_LINK_POINTER, link);
    }
}

/// Makes the vmcs12 at `at` active; returns its slot. vmcs01 is current.
pub fn activate(cpu: &mut Cpu, at: Gpa, shadow: bool) -> usize {
    let found = cpu.nested.find(at);
    let index = found.unwrap_or_else(|| free_slot(cpu));
    let slot = &mut cpu.nested.slots[index];
    if slot.active {
        return index;
    }
    if found.is_none() || !slot.vmcs12.is_stored_at(&cpu.guest, at) {
        load(cpu, index, at);
    }
    let slot = &mut cpu.nested.slots[index];
    (slot.vmptr, slot.active, slot.shadow12) = (Some(at), true, shadow);
    index
}

/// Inactive vmcs12s that keep their slots while others could be made.
const REMEMBERED: usize = 8;

/// A slot for another vmcs12: a free one, else a new one unless enough vmcs12s are inactive, else that of the vmcs12 longest
/// out of use, inactive ones first.
#[cold]
fn free_slot(cpu: &mut Cpu) -> usize {
    let slots = &cpu.nested.slots;
    let (free, inactive) = (slots.find(|slot| slot.vmptr.is_none()), slots.iter().filter(|slot| !slot.active).count());
    let new = |cpu: &mut Cpu| if inactive < REMEMBERED { vmcs02::add_slot(cpu) } else { None };
    if let Some(index) = free.or_else(|| new(cpu)) {
        return index;
    }
    let slots = &cpu.nested.slots;
    let age = |index: &usize| slots.get(*index).map(|slot| (slot.active, slot.used));
    let index = (0..slots.len()).min_by_key(age).unwrap_or(0);
    if slots[index].active {
        if cpu.nested.current() == Some(index) {
            make_current(cpu, None);
        }
        write_back(cpu, index);
    }
    index
}

/// Fills a slot from the region at `at`.
#[cold]
fn load(cpu: &mut Cpu, index: usize, at: Gpa) {
    let slot = &mut cpu.nested.slots[index];
    slot.release();
    if slot.vmcs12.load(&cpu.guest, at).is_err() {
        slot.vmcs12 = Vmcs12::new();
    }
    let (slot, access, on) = cpu.reach(index);
    access.load(on, slot);
}

/// Stores an active slot to L2's memory and makes it inactive. vmcs01 is current.
pub fn write_back(cpu: &mut Cpu, index: usize) {
    let Some(at) = cpu.nested.slots[index].vmptr else { return };
    let slot = &mut cpu.nested.slots[index];
    let on = MachineParts { vmx: &mut cpu.vmx, phys: &cpu.phys, vmcs01: cpu.vmcs01 };
    cpu.config.access.store(on, slot);
    // L2 may have no memory there any more: then nothing could have kept its VMCS either.
    let _ = slot.vmcs12.store(&cpu.guest, at);
    slot.active = false;
    cpu.config.access.stored(slot);
}
