//! The emulator's source of machine checks: a write to its port raises one on all CPUs.

use super::cpu;

/// IA32_MCG_STATUS
pub const MCG_STATUS: u32 = 0x17A;
/// What a witness finds there: the program can be restarted, and a machine check is in progress.
pub const WITNESS: u64 = 5;

const PORT: u16 = 0x8901;
const RIPV: u32 = 1;
const CR4_MCE: u64 = 1 << 6;

/// From now on a machine check is an exception on this CPU.
pub fn take() {
    cpu::set_cr4(cpu::cr4() | CR4_MCE);
}

/// Raises one, of which all CPUs are witnesses, so many instructions from here.
pub fn raise(instructions: u32) {
    cpu::out32(PORT, instructions << 8 | RIPV);
}

/// Raises one behind which nothing can go on.
pub fn raise_fatal(instructions: u32) {
    cpu::out32(PORT, instructions << 8);
}

/// In its handler, or behind an exit by it: ends it, and says what the status was.
pub fn end() -> u64 {
    let status = cpu::rdmsr(MCG_STATUS);
    cpu::wrmsr(MCG_STATUS, 0);
    status
}
