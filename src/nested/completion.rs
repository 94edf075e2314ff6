//! An instruction of L3 that exited to nvmx alone, and that nvmx completes or refuses: L3, and L2 behind it, see what they
//! would of an instruction that ran in the processor. vmcs02 is current throughout.
//!
//! Source: SDM vol. 3C, "Other Causes of VM Exits" (exceptions), "Monitor Trap Flag", "Information for VM Exits Due to Vectored
//! Events".

use super::{reflect, violation};
use crate::cpu::Cpu;
use crate::guest::inject;
use crate::guest::nested_memory::Miss;
use crate::trace::KillReason;
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use crate::vmx::controls::PrimaryControls;
use crate::vmx::event::ExceptionControls;
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::x86::Fault;

/// L3 goes on behind the instruction. Under L2's monitor trap flag an exit is due there, before any debug exception: those
/// stay pending.
#[inline]
pub fn completed(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    inject::advance(cpu);
    let primary12 = cpu.nested.slots[id].vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32;
    if PrimaryControls::from_bits_retain(primary12).contains(PrimaryControls::MONITOR_TRAP_FLAG) {
        let reason = ExitReason::exit(BasicReason::MONITOR_TRAP_FLAG);
        return reflect::reflect(cpu, id, Some((reason, 0)));
    }
    Ok(())
}

/// L3 gets an exception, or L2 an exit if it asked for that; then CR2 keeps its value. Under the monitor trap flag the
/// processor exits behind the delivery.
#[cold]
pub fn refused(cpu: &mut Cpu, id: SlotId, fault: Fault) -> Result<(), KillReason> {
    let exception = inject::exception(cpu, fault);
    let wanted = ExceptionControls {
        bitmap: cpu.vmx.read(Field::EXCEPTION_BITMAP) as u32,
        mask: cpu.vmx.read(Field::PAGE_FAULT_ERROR_CODE_MASK) as u32,
        matches: cpu.vmx.read(Field::PAGE_FAULT_ERROR_CODE_MATCH) as u32,
    };
    if !wanted.exits(&exception) {
        inject::fault(cpu, fault);
        return Ok(());
    }
    inject::set_resume_flag(&mut cpu.vmx);
    reflect::exception(cpu, id, exception.info.0, exception.error, exception.address.unwrap_or(0))
}

/// ept12 does not serve an operand of the instruction: as if the access had been L3's own, which starts again when there is
/// something. Where this is offered the processor lets exit information be written.
#[cold]
pub fn missed(cpu: &mut Cpu, id: SlotId, miss: Miss) -> Result<(), KillReason> {
    for (field, value) in [
        (Field::GUEST_PHYSICAL_ADDRESS, miss.at),
        (Field::GUEST_LINEAR_ADDRESS, miss.linear),
        (Field::EXIT_QUALIFICATION, miss.qualification.bits()),
    ] {
        cpu.vmx.write(field, value);
    }
    inject::set_resume_flag(&mut cpu.vmx);
    cpu.ept02.found_violation(cpu.nested.slots[id].eptp12());
    violation::violation(cpu, id)
}
