//! XSETBV of L2: it always exits (SDM vol. 3C, "Instructions That Cause VM Exits Unconditionally").

use crate::cpu::Cpu;
use crate::guest::operand::require_cpl0;
use crate::hw::cr;
use crate::x86::Fault;

/// Executes XSETBV with L2's registers; the processor itself says what it refuses.
pub fn emulate(cpu: &mut Cpu) -> Result<(), Fault> {
    // Processors look at the privilege level before the exit, emulators may not.
    require_cpl0(cpu)?;
    let value = (cpu.regs.gpr[2] & 0xFFFF_FFFF) << 32 | cpu.regs.gpr[0] & 0xFFFF_FFFF;
    cr::xsetbv_safe(cpu.regs.gpr[1] as u32, value).map_err(|_| Fault::GeneralProtection(0))
}
