//! What a guest sees of an instruction that nvmx completed or refused: RIP, RFLAGS, exceptions. The guest is that of the
//! current VMCS; results of VMX instructions are L2's alone.
//!
//! Source: SDM vol. 3C, "Event Injection", table "Format of the VM-Entry Interruption-Information Field", and
//! "Conventions" of the VMX instruction reference.

use super::Cpu;
use crate::emul::cr::Cr0;
use crate::error::{Fault, VmxError, VmxResult};
use crate::hw::cr;
use crate::hw::vmx::Vmx;
use crate::nested::events;
use crate::nested::explain::Refusal;
use crate::vmx::Field;
use crate::vmx::event::{EventInfo, EventKind, vector};

const RFLAGS_CF: u64 = 1 << 0;
const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_TF: u64 = 1 << 8;
/// CF, PF, AF, ZF, SF, OF
const RFLAGS_ARITHMETIC: u64 = 0x8D5;
const BLOCKING_BY_STI_OR_MOV_SS: u64 = 0b11;
const PENDING_BS: u64 = 1 << 14;
const DEBUGCTL_BTF: u64 = 1 << 1;

/// Moves the guest behind the instruction that exited.
#[inline(always)]
pub fn advance(cpu: &mut Cpu) {
    let vmx = &mut cpu.vmx;
    let rip = vmx.read(Field::GUEST_RIP).wrapping_add(vmx.read(Field::VM_EXIT_INSTRUCTION_LEN));
    vmx.write(Field::GUEST_RIP, rip);
    let blocking = vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    if blocking & BLOCKING_BY_STI_OR_MOV_SS != 0 {
        vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, blocking & !BLOCKING_BY_STI_OR_MOV_SS);
    }
    // A single step over an instruction that nvmx emulates must still trap.
    if vmx.read(Field::GUEST_RFLAGS) & RFLAGS_TF != 0 {
        pend_single_step(vmx);
    }
}

/// With IA32_DEBUGCTL.BTF only branches are stepped, and none is emulated. Breakpoints that MOV SS holds back stay pending.
#[cold]
fn pend_single_step(vmx: &mut Vmx) {
    if vmx.read(Field::GUEST_IA32_DEBUGCTL) & DEBUGCTL_BTF == 0 {
        let pending = vmx.read(Field::GUEST_PENDING_DBG_EXCEPTIONS);
        vmx.write(Field::GUEST_PENDING_DBG_EXCEPTIONS, pending | PENDING_BS);
    }
}

/// Delivers an exception to the guest with the next entry.
pub fn fault(cpu: &mut Cpu, fault: Fault) {
    let (vector, error_code) = match fault {
        Fault::InvalidOpcode => (vector::UD, None),
        Fault::StackSegment(code) => (vector::SS, Some(code as u32)),
        Fault::GeneralProtection(code) => (vector::GP, Some(code as u32)),
        Fault::Page { error_code, linear } => {
            cr::set_cr2(linear);
            (vector::PF, Some(error_code))
        }
    };
    let mut info = EventInfo::new(EventKind::HardwareException, vector);
    // Real mode pushes no error codes.
    let error_code = error_code.filter(|_| cpu.vmx.read(Field::GUEST_CR0) & Cr0::PE.bits() != 0);
    if error_code.is_some() {
        info = info.with_error_code();
    }
    events::inject(cpu, info, error_code, None);
}

/// Reports the result of a VMX instruction in RFLAGS and, if it failed with a current vmcs12, in its error field.
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
        VmxResult::FailValid(error) => cpu.nested.refusals.note(Refusal::Instruction(Some(error))),
        VmxResult::FailInvalid => cpu.nested.refusals.note(Refusal::Instruction(None)),
    }
    let flags = cpu.vmx.read(Field::GUEST_RFLAGS);
    cpu.vmx.write(Field::GUEST_RFLAGS, flags & !RFLAGS_ARITHMETIC | flag);
    if let (Some(error), Some(slot)) = (error, current.and_then(|i| cpu.nested.slots.get_mut(i))) {
        slot.vmcs12.set(Field::VM_INSTRUCTION_ERROR, error as u64);
    }
}
