//! RDMSR and WRMSR that exit.

use crate::cpu::Cpu;
use crate::vmcs::msrs::answer;
use crate::x86::Fault;

/// RDMSR that exited.
pub fn read(cpu: &mut Cpu) -> Result<(), Fault> {
    let index = cpu.regs.gpr[1] as u32;
    let value = answer(&cpu.config.offered, &cpu.msrs, index).ok_or(Fault::GeneralProtection(0))?;
    cpu.regs.gpr[0] = value & 0xFFFF_FFFF;
    cpu.regs.gpr[2] = value >> 32;
    Ok(())
}

/// WRMSR of L2 that exited; vmcs01 is current.
pub fn guest_write(cpu: &mut Cpu) -> Result<(), Fault> {
    let (index, value) = written(cpu);
    let canonical = cpu.config.offered.is_canonical(value);
    cpu.tracked.wrmsr(&mut cpu.vmx, index, value, canonical).unwrap_or_else(|| write(cpu))
}

/// WRMSR that nvmx answers or refuses.
pub fn write(cpu: &mut Cpu) -> Result<(), Fault> {
    let (index, value) = written(cpu);
    cpu.msrs.write(&cpu.guest, index, value)
}

/// ECX and EDX:EAX.
pub fn written(cpu: &Cpu) -> (u32, u64) {
    let [rax, rcx, rdx, ..] = cpu.regs.gpr;
    (rcx as u32, (rdx & 0xFFFF_FFFF) << 32 | rax & 0xFFFF_FFFF)
}
