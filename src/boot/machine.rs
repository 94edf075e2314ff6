//! What boot hands to the hypervisor.

use arrayvec::ArrayVec;
use l2_protocol::abi::Strategy;

use crate::{
    boot::{Options, requirements::Processor},
    hw::phys::DirectMap,
    mm::{FramePool, GuestMemory, MemoryMap, Span, l2_image::Start, mtrr::Mtrrs, paging::PageTables},
};

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

/// The machine as boot leaves it: nvmx sits in its own range under its own page tables, L2 is loaded and has not started.
#[derive(Debug)]
pub struct Machine {
    /// The command line's wishes.
    pub options: Options,
    /// The machine's whole memory map, nvmx's range included as usable RAM.
    pub memory: MemoryMap,
    /// The map that L2 was given: nvmx's range is reserved in it.
    pub l2_memory: MemoryMap,
    /// nvmx's own range: image, stacks, frames. Starts and ends at multiples of 2 MiB.
    pub own: Span,
    /// Frames in nvmx's range that are still free.
    pub frames: FramePool,
    /// Physical memory by host-physical address.
    pub phys: DirectMap,
    /// L2's memory by guest-physical address.
    pub guest: GuestMemory<DirectMap>,
    /// nvmx's own page tables.
    pub tables: PageTables,
    /// Memory types of the machine.
    pub mtrrs: Mtrrs,
    /// What the processor is and what its VMX can do; the same for all processors.
    pub processor: Processor,
    /// How L2's VMREAD and VMWRITE reach vmcs12: the options' wish on this processor.
    pub strategy: Strategy,
    /// All processors; the one with `processor.apic_id` runs.
    pub cpus: CpuList,
    /// How L2 starts.
    pub start: Start,
}
