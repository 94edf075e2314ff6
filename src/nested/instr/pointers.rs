//! VMPTRLD, VMPTRST and VMCLEAR of L2, and the slots behind them.

use super::{done, is_region_address, pointer_operand, require_root};
use crate::addr::Gpa;
use crate::error::{VmxError, VmxResult};
use crate::nested::caps;
use crate::nested::vmcs12::{FieldSet, Vmcs12};
use crate::nested::{Operation, SLOTS};
use crate::vcpu::{Cpu, Next, Stop, operand};
use crate::vmx::Field;
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
    // Bit 31 asks for a shadow VMCS, which is not offered. No memory there reads as all ones.
    let revision = Vmcs12::revision(&cpu.guest, at).unwrap_or(u32::MAX);
    if revision != caps::REVISION {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldIncorrectRevisionId));
    }
    if cpu.nested.current().is_none_or(|i| cpu.nested.slots[i].vmptr != Some(at)) {
        let index = match cpu.nested.find(at) {
            Some(index) => index,
            None => activate(cpu, at),
        };
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
    match cpu.nested.find(at) {
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
    cpu.nested.uses += 1;
    let uses = cpu.nested.uses;
    let slot = index.and_then(|i| cpu.nested.slots.get_mut(i));
    let link = slot.map_or(NO_VMCS, |slot| {
        slot.used = uses;
        slot.vmcs02().get()
    });
    if cpu.config.strategy == Strategy::ZeroCopy {
        cpu.vmx.write(Field::VMCS_LINK_POINTER, link);
    }
}

/// Takes a slot for the vmcs12 at `at`: a free one, or the least recently used.
fn activate(cpu: &mut Cpu, at: Gpa) -> usize {
    const { assert!(SLOTS > 0) };
    let age = |i: &usize| cpu.nested.slots[*i].vmptr.map_or(0, |_| cpu.nested.slots[*i].used + 1);
    let index = (0..cpu.nested.slots.len()).min_by_key(age).unwrap_or(0);
    if cpu.nested.slots[index].vmptr.is_some() {
        if cpu.nested.current() == Some(index) {
            make_current(cpu, None);
        }
        write_back(cpu, index);
    }
    let revision = cpu.config.hardware.basic.revision();
    let slot = &mut cpu.nested.slots[index];
    slot.vmptr = Some(at);
    if slot.vmcs12.load(&cpu.guest, at).is_err() {
        slot.vmcs12 = Vmcs12::new();
    }
    if let Some(layout) = &cpu.config.layout {
        for field in slot.vmcs12.dirty.iter() {
            layout.write(&cpu.phys, slot.vmcs02(), field, slot.vmcs12.get(field));
        }
        slot.vmcs12.dirty = FieldSet::EMPTY;
        slot.vmcs12.valid = FieldSet::CACHED;
        if cpu.config.strategy == Strategy::ZeroCopy {
            slot.become_shadow_in_memory(&cpu.phys, revision);
        }
    } else if cpu.config.strategy == Strategy::ZeroCopy {
        slot.load_vmcs02(&mut cpu.vmx, &cpu.phys, revision);
        slot.flush_dirty(&mut cpu.vmx, Strategy::ZeroCopy, &cpu.config.exists);
        slot.leave_vmcs02(&mut cpu.vmx, &cpu.phys, &cpu.config, cpu.vmcs01);
    }
    index
}

/// Stores a slot to L2's memory and frees it; it is not current.
pub fn write_back(cpu: &mut Cpu, index: usize) {
    let revision = cpu.config.hardware.basic.revision();
    let slot = &mut cpu.nested.slots[index];
    let Some(at) = slot.vmptr else { return };
    slot.load_vmcs02(&mut cpu.vmx, &cpu.phys, revision);
    slot.fetch_all(&mut cpu.vmx, &cpu.config.exists);
    // L2 may have no memory there any more: then nothing could have kept its VMCS either.
    let _ = slot.vmcs12.store(&cpu.guest, at);
    slot.release(&mut cpu.vmx);
    cpu.vmx.ptrld(cpu.vmcs01);
}
