//! The processors of the machine.

use arrayvec::ArrayVec;

/// Most processors that nvmx lists.
pub const MAX_CPUS: usize = 256;

/// A processor that firmware reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    /// Its local APIC's id (x2APIC id where it has no shorter one).
    pub apic_id: u32,
    /// Firmware says that it can be started.
    pub enabled: bool,
}

/// The processors of the machine, in the order of firmware's table; the one that booted is among them.
pub type CpuList = ArrayVec<Cpu, MAX_CPUS>;
