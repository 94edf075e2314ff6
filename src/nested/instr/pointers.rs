//! VMPTRLD, VMPTRST and VMCLEAR of L2, and the slots behind them.

use super::{done, is_region_address, pointer_operand, require_root};
use crate::addr::Gpa;
use crate::error::{VmxError, VmxResult};
use crate::nested::Operation;
use crate::nested::caps;
use crate::nested::slot::SHADOW_INDICATOR;
use crate::nested::vmcs12::{FieldSet, Vmcs12};
use crate::vcpu::{Cpu, Next, Stop, build, operand};
use crate::vmx::Field;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::instr::Direction;
use l2_protocol::abi::Strategy;

const NO_VMCS: u64 = u64::MAX;

/// VMPTRLD
pub fn vmptrld(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let at = pointer_operand(cpu)?;
    if !is_region_address(&cpu.config.offered, at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldInvalidAddress));
    }
    if cpu.nested.vmxon_ptr() == Some(at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldVmxonPointer));
    }
    // No memory there reads as all ones.
    let revision = Vmcs12::revision(&cpu.guest, at).unwrap_or(u32::MAX);
    let shadow = revision & SHADOW_INDICATOR != 0;
    let may_be_shadow = cpu.config.offered.secondary.allows(SecondaryControls::VMCS_SHADOWING);
    if revision & !SHADOW_INDICATOR != caps::REVISION || shadow && !may_be_shadow {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldIncorrectRevisionId));
    }
    let index = activate(cpu, at, shadow);
    if cpu.nested.current() != Some(index) {
        make_current(cpu, Some(index));
    }
    done(cpu, VmxResult::Succeed)
}

/// VMPTRST
pub fn vmptrst(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let linear = operand::linear(cpu, 8, Direction::Store)?;
    let vmptr = cpu.nested.current().and_then(|i| cpu.nested.slots[i].vmptr);
    operand::write(cpu, linear, &vmptr.map_or(NO_VMCS, Gpa::get).to_le_bytes())?;
    done(cpu, VmxResult::Succeed)
}

/// VMCLEAR
pub fn vmclear(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let at = pointer_operand(cpu)?;
    if !is_region_address(&cpu.config.offered, at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmclearInvalidAddress));
    }
    if cpu.nested.vmxon_ptr() == Some(at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmclearVmxonPointer));
    }
    match cpu.nested.find(at).filter(|index| cpu.nested.slots[*index].active) {
        Some(index) => {
            cpu.nested.slots[index].vmcs12.launched = false;
            if cpu.nested.current() == Some(index) {
                make_current(cpu, None);
            }
            write_back(cpu, index);
        }
        // Where L2 owns no memory the write is lost, as on the bus.
        None => {
            let _ = Vmcs12::clear_region(&cpu.guest, at);
        }
    }
    done(cpu, VmxResult::Succeed)
}

/// Makes a slot current, or none, and links the shadow VMCS.
pub fn make_current(cpu: &mut Cpu, index: Option<usize>) {
    if let Operation::Root { vmxon_ptr, .. } = cpu.nested.operation {
        cpu.nested.operation = Operation::Root { vmxon_ptr, current: index };
    }
    let link = index.map_or(NO_VMCS, |index| {
        cpu.nested.touch(index);
        cpu.nested.slots[index].vmcs02().get()
    });
    if cpu.config.strategy == Strategy::ZeroCopy {
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
    let new = |cpu: &mut Cpu| if inactive < REMEMBERED { build::add_slot(cpu) } else { None };
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
    let (vmx, config) = (&mut cpu.vmx, &cpu.config);
    let slot = &mut cpu.nested.slots[index];
    slot.release();
    if slot.vmcs12.load(&cpu.guest, at).is_err() {
        slot.vmcs12 = Vmcs12::new();
    }
    let revision = config.hardware.basic.revision();
    match (&config.layout, config.strategy) {
        (Some(layout), strategy) => {
            for field in slot.vmcs12.dirty.iter() {
                layout.write(&cpu.phys, slot.vmcs02(), field, slot.vmcs12.get(field));
            }
            slot.vmcs12.dirty = FieldSet::EMPTY;
            slot.vmcs12.valid = FieldSet::CACHED;
            if strategy == Strategy::ZeroCopy {
                slot.become_shadow_in_memory(&cpu.phys, revision);
            }
        }
        (None, Strategy::ZeroCopy) => {
            slot.rest(vmx, &cpu.phys, revision);
            vmx.ptrld(slot.vmcs02());
            slot.flush_dirty(vmx, Strategy::ZeroCopy, &config.exists);
            vmx.ptrld(cpu.vmcs01);
        }
        (None, Strategy::Trapped) => {}
    }
}

/// Stores an active slot to L2's memory and makes it inactive. vmcs01 is current.
pub fn write_back(cpu: &mut Cpu, index: usize) {
    let config = &cpu.config;
    let slot = &mut cpu.nested.slots[index];
    let Some(at) = slot.vmptr else { return };
    if let Some(layout) = &config.layout {
        slot.fetch_image(layout, &cpu.phys, &config.exists);
    } else {
        cpu.vmx.ptrld(slot.vmcs02());
        slot.fetch_all(&mut cpu.vmx, &config.exists);
        cpu.vmx.ptrld(cpu.vmcs01);
    }
    // L2 may have no memory there any more: then nothing could have kept its VMCS either.
    let _ = slot.vmcs12.store(&cpu.guest, at);
    slot.active = false;
    if config.strategy == Strategy::ZeroCopy || config.layout.is_some() {
        slot.vmcs12.valid = FieldSet::CACHED;
    }
}
