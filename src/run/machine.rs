//! What boot hands to the hypervisor.

use crate::boot::guest_image::Start;
use crate::boot::info::Rsdp;
use crate::boot::layout::Layout;
use crate::boot::{CpuList, FoundProcessor, Options};
use crate::hw::phys::DirectMap;
use crate::mm::mtrr::Mtrrs;
use crate::mm::paging::PageTables;
use crate::mm::{FramePool, GuestMemory, MemoryMap};
use l2_protocol::abi::Strategy;

/// The machine as boot leaves it: nvmx sits in its own range under its own page tables, L2 is loaded and has not started.
#[derive(Debug)]
pub struct Machine {
    /// The command line's wishes.
    pub options: Options,
    /// The machine's whole memory map, nvmx's range included as usable RAM.
    pub memory: MemoryMap,
    /// The map that L2 was given: nvmx's range is reserved in it.
    pub guest_memory: MemoryMap,
    /// nvmx's own range: image, stacks, frames, by processors.
    pub layout: Layout,
    /// Frames of the processor that booted, as far as they are free.
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
    pub processor: FoundProcessor,
    /// How L2's VMREAD and VMWRITE reach vmcs12: the options' wish on this processor.
    pub strategy: Strategy,
    /// All processors; the one with `processor.apic_id` runs.
    pub cpus: CpuList,
    /// The ACPI root pointer, if there is one.
    pub rsdp: Option<Rsdp>,
    /// How L2 starts.
    pub start: Start,
}
