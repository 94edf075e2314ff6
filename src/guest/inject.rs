//! What a guest sees of an instruction that nvmx completed or refused: RIP, RFLAGS, exceptions. The guest is that of the
//! current VMCS.
//!
//! Source: SDM vol. 3C, "Event Injection", table "Format of the VM-Entry Interruption-Information Field", and
//! "Conventions" of the VMX instruction reference.

use crate::cpu::Cpu;
use crate::guest::events;
use crate::guest::operand::is_64_bit_code;
use crate::hw::cr;
use crate::hw::vmx::Vmx;
use crate::vmx::Field;
use crate::vmx::event::Exception;
use crate::vmx::instr::behind;
use crate::vmx::state::interruptibility;
use crate::x86::RFlags;
use crate::x86::debug::{DEBUGCTL_BTF, PENDING_BS};
use crate::x86::{Cr0, Fault};

const RFLAGS_TF: u64 = RFlags::TRAP_FLAG.bits();
const RFLAGS_RF: u64 = RFlags::RESUME_FLAG.bits();

/// Moves the guest behind the instruction that exited.
#[inline(always)]
pub fn advance(cpu: &mut Cpu) {
    let (rip, length) = (cpu.vmx.read(Field::GUEST_RIP), cpu.vmx.read(Field::VM_EXIT_INSTRUCTION_LEN));
    let next = behind(rip, length, || is_64_bit_code(cpu));
    let vmx = &mut cpu.vmx;
    vmx.write(Field::GUEST_RIP, next);
    let blocking = vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    if blocking & interruptibility::STI_OR_MOV_SS != 0 {
        vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, blocking & !interruptibility::STI_OR_MOV_SS);
    }
    let flags = vmx.read(Field::GUEST_RFLAGS);
    if flags & (RFLAGS_TF | RFLAGS_RF) != 0 {
        end_of_instruction(vmx, flags);
    }
}

/// Behind an instruction RF is 0, and a single step over one that nvmx emulates traps. With IA32_DEBUGCTL.BTF only branches
/// are stepped, and none is emulated.
#[cold]
fn end_of_instruction(vmx: &mut Vmx, flags: u64) {
    vmx.write(Field::GUEST_RFLAGS, flags & !RFLAGS_RF);
    if flags & RFLAGS_TF != 0 && vmx.read(Field::GUEST_IA32_DEBUGCTL) & DEBUGCTL_BTF == 0 {
        pend_debug(vmx, PENDING_BS);
    }
}

/// Adds to the debug exceptions that wait for the end of the instruction. Those that MOV SS holds back stay pending.
#[cold]
pub fn pend_debug(vmx: &mut Vmx, bits: u64) {
    let pending = vmx.read(Field::GUEST_PENDING_DBG_EXCEPTIONS);
    vmx.write(Field::GUEST_PENDING_DBG_EXCEPTIONS, pending | bits);
}

/// The instruction that exited starts again, or its fault is delivered: its breakpoint, which comes before both, does not
/// fire a second time. An exit by an instruction saves RF as 0 (SDM vol. 3C, "Saving RIP, RSP, RFLAGS, and SSP"; vol. 3B,
/// "Instruction-Breakpoint Exception Condition").
#[cold]
pub fn set_resume_flag(vmx: &mut Vmx) {
    let flags = vmx.read(Field::GUEST_RFLAGS);
    vmx.write(Field::GUEST_RFLAGS, flags | RFLAGS_RF);
}

/// The exception that a fault is in the guest's mode.
pub fn exception(cpu: &mut Cpu, fault: Fault) -> Exception {
    Exception::of(fault, cpu.vmx.read(Field::GUEST_CR0) & Cr0::PE.bits() != 0)
}

/// Delivers an exception to the guest with the next entry, whatever L2 asked for.
pub fn fault(cpu: &mut Cpu, fault: Fault) {
    let Exception { info, error, address } = exception(cpu, fault);
    if let Some(address) = address {
        cr::set_cr2(address);
    }
    set_resume_flag(&mut cpu.vmx);
    events::inject(cpu, info, error, None);
}
