//! What is the same in every vmcs02.

use super::Cpu;
use crate::vmcs::host;
use crate::vmx::Field;

/// A further slot for L2, if frames are left for it; vmcs01 is current.
#[cold]
pub fn add_slot(cpu: &mut Cpu) -> Option<usize> {
    let index = cpu.nested.slots.add(&mut cpu.frames, &cpu.phys, cpu.config.hardware.basic.revision())?;
    set_up(cpu, index);
    cpu.vmx.ptrld(cpu.vmcs01);
    Some(index)
}

/// Writes the constant parts of the vmcs02 of a slot, which then is clear.
pub fn set_up(cpu: &mut Cpu, index: usize) {
    let vmcs02 = cpu.nested.slots[index].vmcs02();
    cpu.vmx.clear(vmcs02);
    cpu.vmx.ptrld(vmcs02);
    host::write(&mut cpu.vmx, &cpu.regs);
    for field in [Field::VM_EXIT_MSR_STORE_COUNT, Field::VM_EXIT_MSR_LOAD_COUNT, Field::VM_ENTRY_MSR_LOAD_COUNT] {
        cpu.vmx.write(field, 0);
    }
    cpu.vmx.write(Field::VMCS_LINK_POINTER, u64::MAX);
    // VM functions are nvmx's to emulate (`nested::vmfunc`).
    if cpu.config.access.has(Field::VM_FUNCTION_CONTROLS) {
        cpu.vmx.write(Field::VM_FUNCTION_CONTROLS, 0);
    }
    cpu.vmx.clear(vmcs02);
}
