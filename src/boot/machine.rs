//! The processors of the machine.

use arrayvec::ArrayVec;

/// Most processors that nvmx lists.
pub const MAX_CPUS: usize = 512;

/// The processors of the machine that can be started, in the order of firmware's table; the one that booted is among them. By
/// the ids of their local APICs (x2APIC ids where they have no shorter ones).
pub type CpuList = ArrayVec<u32, MAX_CPUS>;
