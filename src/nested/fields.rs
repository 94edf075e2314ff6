//! VMREAD and VMWRITE that nvmx completes, on the vmcs12 in a slot.

use super::result::done;
use crate::cpu::{Cpu, Operation};
use crate::guest::{Next, Stop, operand};
use crate::vmcs::stale::Stale;
use crate::vmx::field::Home;
use crate::vmx::{Field, VmxError, VmxResult};
use l2_protocol::abi::Strategy;

/// VMREAD of the vmcs12 in a slot by the guest of the current VMCS.
pub fn read(cpu: &mut Cpu, index: usize) -> Result<Next, Stop> {
    let info = operand::field_access_info(cpu);
    let encoding = operand::field_encoding(cpu, info);
    let Some((field, high)) = offered_field(cpu, encoding) else {
        return done(cpu, VmxResult::FailValid(VmxError::UnsupportedVmcsComponent));
    };
    let value = read_field(cpu, index, field);
    operand::store(cpu, info, if high { value >> 32 } else { value })?;
    done(cpu, VmxResult::Succeed)
}

/// VMWRITE to the vmcs12 in a slot by the guest of the current VMCS.
pub fn write(cpu: &mut Cpu, index: usize) -> Result<Next, Stop> {
    let info = operand::field_access_info(cpu);
    let value = operand::load(cpu, info)?;
    let encoding = operand::field_encoding(cpu, info);
    let Some((field, high)) = offered_field(cpu, encoding) else {
        return done(cpu, VmxResult::FailValid(VmxError::UnsupportedVmcsComponent));
    };
    if field.is_read_only() && !cpu.config.offered.misc.vmwrite_any_field() {
        return done(cpu, VmxResult::FailValid(VmxError::VmwriteReadOnlyComponent));
    }
    // A full write in 32-bit mode clears the upper half of a 64-bit field, a "high" write keeps the lower one.
    let value = if high { read_field(cpu, index, field) & 0xFFFF_FFFF | value << 32 } else { value };
    write_field(cpu, index, field, value);
    done(cpu, VmxResult::Succeed)
}

/// The field of an encoding, if the processor that L2 sees has it.
fn offered_field(cpu: &Cpu, encoding: u64) -> Option<(Field, bool)> {
    let (field, high) = Field::decode(u32::try_from(encoding).ok()?)?;
    // A hypervisor below may lack fields that nvmx would have to keep in vmcs02.
    let kept = field.home() == Home::Cache || cpu.config.exists.contains(field);
    (kept && cpu.config.offered.has_field(field)).then_some((field, high))
}

/// The value of a field as L2 sees it.
pub fn read_field(cpu: &mut Cpu, index: usize, field: Field) -> u64 {
    let slot = &cpu.nested.slots[index];
    if slot.vmcs12.valid.contains(field) {
        return slot.vmcs12.get(field);
    }
    if let Some(layout) = &cpu.config.layout {
        return layout.read(&cpu.phys, slot.vmcs02(), field);
    }
    let value = on_vmcs02(cpu, index, |vmx| vmx.read(field));
    // A shadow VMCS changes without an exit, so that its values are never kept.
    if cpu.config.strategy == Strategy::Trapped {
        cpu.nested.slots[index].vmcs12.fetched(field, value);
    }
    value
}

fn write_field(cpu: &mut Cpu, index: usize, field: Field, value: u64) {
    let slot = &mut cpu.nested.slots[index];
    match (field.home(), cpu.config.strategy) {
        (Home::Cache, _) => {
            let (old, value) = (slot.vmcs12.get(field), value & field.mask());
            if old != value {
                slot.vmcs12.set(field, value);
                if !slot.stays_good(field, old, value, &cpu.config.offered) {
                    slot.stale |= Stale::of(field);
                }
            }
            return;
        }
        _ if cpu.config.layout.is_some() => {
            // What nvmx reported in place of the processor, if it did, is overwritten.
            slot.vmcs12.valid.remove(field);
            if let Some(layout) = &cpu.config.layout {
                layout.write(&cpu.phys, slot.vmcs02(), field, value);
            }
        }
        (_, Strategy::Trapped) => slot.vmcs12.written(field, value),
        (_, Strategy::ZeroCopy) => on_vmcs02(cpu, index, |vmx| vmx.write(field, value & field.mask())),
    }
    cpu.nested.slots[index].stale |= Stale::of(field);
}

/// Runs `f` with the slot's vmcs02 as the current VMCS, in whichever form it is, and goes back to the one that was.
fn on_vmcs02<T>(cpu: &mut Cpu, index: usize, f: impl FnOnce(&mut crate::hw::vmx::Vmx) -> T) -> T {
    cpu.vmx.ptrld(cpu.nested.slots[index].vmcs02());
    let result = f(&mut cpu.vmx);
    let before = match cpu.nested.operation {
        Operation::NonRoot { current, .. } => cpu.nested.slots[current].vmcs02(),
        _ => cpu.vmcs01,
    };
    cpu.vmx.ptrld(before);
    result
}
