//! What a VMX instruction of L2 reports.
//!
//! Source: SDM vol. 3C, "Conventions" of the VMX instruction reference.

use super::tell::refuse;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop};
use crate::rules::explain::Refusal;
use crate::vmx::{Field, VmxError, VmxResult};
use crate::x86::RFlags;

const RFLAGS_CF: u64 = RFlags::CARRY_FLAG.bits();
const RFLAGS_ZF: u64 = RFlags::ZERO_FLAG.bits();
const RFLAGS_ARITHMETIC: u64 = RFlags::CARRY_FLAG
    .union(RFlags::PARITY_FLAG)
    .union(RFlags::AUXILIARY_CARRY_FLAG)
    .union(RFlags::ZERO_FLAG)
    .union(RFlags::SIGN_FLAG)
    .union(RFlags::OVERFLOW_FLAG)
    .bits();

/// Reports the result of a VMX instruction in RFLAGS and, if it failed with a current vmcs12, in its error field.
#[inline(never)]
pub fn vmx_result(cpu: &mut Cpu, result: VmxResult) {
    let current = cpu.nested.current();
    // Without a current VMCS there is no field for the number (SDM, "Conventions": VMfail).
    let (flag, error): (u64, Option<VmxError>) = match (result, current) {
        (VmxResult::Succeed, _) => (0, None),
        (VmxResult::FailInvalid, _) | (VmxResult::FailValid(_), None) => (RFLAGS_CF, None),
        (VmxResult::FailValid(error), Some(_)) => (RFLAGS_ZF, Some(error)),
    };
    match result {
        VmxResult::Succeed => {}
        // Whoever checks an entry has said more.
        VmxResult::FailValid(VmxError::EntryInvalidControlField | VmxError::EntryInvalidHostStateField) => {}
        VmxResult::FailValid(error) => refuse(cpu, Refusal::Instruction(Some(error))),
        VmxResult::FailInvalid => refuse(cpu, Refusal::Instruction(None)),
    }
    set_flags(cpu, flag);
    if let (Some(error), Some(id)) = (error, current) {
        cpu.nested.slots[id].vmcs12.set(Field::VM_INSTRUCTION_ERROR, error as u64);
    }
}

#[inline(always)]
fn set_flags(cpu: &mut Cpu, arithmetic: u64) {
    let flags = cpu.vmx.read(Field::GUEST_RFLAGS);
    cpu.vmx.write(Field::GUEST_RFLAGS, flags & !RFLAGS_ARITHMETIC | arithmetic);
}

/// Reports a result in RFLAGS and goes on behind the instruction.
#[inline(always)]
pub fn done(cpu: &mut Cpu, result: VmxResult) -> Result<Next, Stop> {
    match result {
        VmxResult::Succeed => set_flags(cpu, 0),
        failed => vmx_result(cpu, failed),
    }
    Ok(Next::Advance)
}
