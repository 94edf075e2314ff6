//! VMREAD and VMWRITE that nvmx completes, on the vmcs12 in a slot.

use super::result::done;
use crate::cpu::{Cpu, Operation};
use crate::guest::{Next, Stop, operand};
use crate::hw::vmx::Region;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmx::field::Home;
use crate::vmx::lent::Loan;
use crate::vmx::{Field, VmxError, VmxResult};

/// VMREAD of the vmcs12 in a slot by the guest of the current VMCS.
pub fn read(cpu: &mut Cpu, id: SlotId) -> Result<Next, Stop> {
    let info = operand::field_access_info(cpu);
    let encoding = operand::second_register(cpu, info);
    let Some((field, high)) = offered_field(cpu, encoding) else {
        return done(cpu, VmxResult::FailValid(VmxError::UnsupportedVmcsComponent));
    };
    let value = read_field(cpu, id, field);
    operand::store(cpu, info, if high { value >> 32 } else { value })?;
    done(cpu, VmxResult::Succeed)
}

/// VMWRITE to the vmcs12 in a slot by the guest of the current VMCS.
pub fn write(cpu: &mut Cpu, id: SlotId) -> Result<Next, Stop> {
    let info = operand::field_access_info(cpu);
    let value = operand::load(cpu, info)?;
    let encoding = operand::second_register(cpu, info);
    let Some((field, high)) = offered_field(cpu, encoding) else {
        return done(cpu, VmxResult::FailValid(VmxError::UnsupportedVmcsComponent));
    };
    if field.is_read_only() && !cpu.config.offered.misc.vmwrite_any_field() {
        return done(cpu, VmxResult::FailValid(VmxError::VmwriteReadOnlyComponent));
    }
    // A full write in 32-bit mode clears the upper half of a 64-bit field, a "high" write keeps the lower one.
    let value = if high { read_field(cpu, id, field) & 0xFFFF_FFFF | value << 32 } else { value };
    write_field(cpu, id, field, value);
    done(cpu, VmxResult::Succeed)
}

/// The field of an encoding, if the processor that L2 sees has it.
#[inline(always)]
fn offered_field(cpu: &Cpu, encoding: u64) -> Option<(Field, bool)> {
    let (field, high) = Field::decode(u32::try_from(encoding).ok()?)?;
    cpu.config.fields.contains(field).then_some((field, high))
}

/// The value of a field as L2 sees it.
#[inline(always)]
pub fn read_field(cpu: &mut Cpu, id: SlotId, field: Field) -> u64 {
    let slot = &cpu.nested.slots[id];
    if slot.vmcs12.valid.contains(field) { slot.vmcs12.get(field) } else { read_vmcs02(cpu, id, field) }
}

/// The value of a field that only vmcs02 has.
#[inline(never)]
fn read_vmcs02(cpu: &mut Cpu, id: SlotId, field: Field) -> u64 {
    let current = current_vmcs(cpu);
    let (slot, access, on) = cpu.reach(id);
    access.read(on, slot, current, field)
}

#[inline(always)]
fn write_field(cpu: &mut Cpu, id: SlotId, field: Field, value: u64) {
    if field.home() != Home::Cache {
        return write_vmcs02(cpu, id, field, value);
    }
    let slot = &mut cpu.nested.slots[id];
    match Loan::with(field) {
        // What is lent is not in the copy; the rest of it may be learned.
        Some(least) if least != Loan::All || !slot.vmcs12.valid.contains(field) => {
            write_lent(cpu, id, field, value, least);
        }
        _ => slot.write_copy(field, value, &cpu.config.offered),
    }
}

/// Writes a field whose home is vmcs02.
#[inline(never)]
fn write_vmcs02(cpu: &mut Cpu, id: SlotId, field: Field, value: u64) {
    let current = current_vmcs(cpu);
    let (slot, access, on) = cpu.reach(id);
    access.write(on, slot, current, field, value);
    slot.stale |= Stale::of(field);
}

/// Writes a field that L2 may be lent, with this loan at least: a vmcs12 in use for which L2 does so may see that again
/// ([ADR 0030](../../docs/adr/0030-the-fields-of-a-thread-are-lent.md)).
#[inline(never)]
fn write_lent(cpu: &mut Cpu, id: SlotId, field: Field, value: u64, least: Loan) {
    let in_use = cpu.nested.operation.is_root_with(id) && cpu.nested.slots[id].vmcs12.is_launched();
    let current = current_vmcs(cpu);
    let (slot, access, on) = cpu.reach(id);
    access.write_lent(on, slot, current, |slot, offered| {
        slot.write_copy(field, value, offered);
        if in_use { slot.loan.learn(least, slot.vmcs12.exits) } else { slot.loan.loan }
    });
}

/// The VMCS of the guest that runs.
fn current_vmcs(cpu: &Cpu) -> Region {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => cpu.nested.slots[current].vmcs02.region(),
        _ => cpu.vmcs01,
    }
}
