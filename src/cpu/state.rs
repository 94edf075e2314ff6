//! The state of one virtual CPU.

use super::{Startup, Waiting};
use crate::cpu::{Events, Nested};
use crate::ept::{Ept01, Ept02, PoolFrames, StaleLeaf};
use crate::hw::phys::DirectMap;
use crate::hw::vmenter::GuestRegs;
use crate::hw::vmx::{Region, Vmx};
use crate::mm::{Frame, FramePool, GuestMemory};
use crate::trace::Ran;
use crate::trace::ring::Ring;
use crate::vmcs::Config;
use crate::vmcs::access::{MachineParts, VmcsAccess};
use crate::vmcs::msrs::OwnMsrs;
use crate::vmcs::once::Once;
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::SlotId;
use crate::vmcs::tracked::Tracked;
use crate::vmx::bitmap::Words;
use l2_protocol::trace::TracedExit;

/// One virtual CPU. It never moves once it runs: HOST_RSP points into `regs`.
pub struct Cpu {
    /// General-purpose registers of the guest that exited last.
    pub regs: GuestRegs,
    /// The right to execute VMX instructions, and the counters.
    pub vmx: Vmx,
    /// Decided at start.
    pub config: Config,
    /// The VMCS that runs L2.
    pub vmcs01: Region,
    /// Whose exit was the last.
    pub exited: Ran,
    /// vmcs01 entered since its VMCLEAR.
    pub launched01: bool,
    /// What vmcs01 loads with the next entry, and only then.
    pub once01: Once,
    /// MSR bitmap of vmcs01: what nvmx itself must see.
    pub msr_bitmap01: Frame,
    /// What L3 may reach of a shadow VMCS by VMREAD and VMWRITE, to be merged with L2's bitmaps.
    pub shadow_words: [Words; 2],
    /// Stands for memory that is not there: a frame of nvmx.
    pub void: Frame,
    /// MSRs as L2 sees them, where nvmx keeps them for it.
    pub msrs: OwnMsrs,
    /// MSRs of L2 whose values nvmx knows.
    pub tracked: Tracked,
    /// Virtual VMX.
    pub nested: Nested,
    /// The machine one to one, without nvmx.
    pub ept01: Ept01,
    /// Composed tables for L3.
    pub ept02: Ept02,
    /// nvmx's frames.
    pub frames: FramePool,
    /// Physical memory.
    pub phys: DirectMap,
    /// L2's memory.
    pub guest: GuestMemory<DirectMap>,
    /// Events that nvmx holds back.
    pub waiting: Waiting,
    /// What was told of stale translations.
    pub stale: StaleTold,
    /// Where L2 is on its way from an INIT to its first instruction.
    pub start: Startup,
    /// What nvmx has changed in vmcs02 for events of its own.
    pub events: Events,
    /// Where its exits are traced, if they are.
    pub trace: Option<Trace>,
}

/// The trace of a processor.
pub struct Trace {
    /// What is kept of it.
    pub ring: Ring,
    /// I/O bitmaps of vmcs01 with the ports by which L2 ends the machine: the trace is told before.
    pub end_ports: [Frame; 2],
    /// The last exit, as long as nothing was entered since.
    pub open: Option<TracedExit>,
    /// What was counted when it came.
    pub counted: [u64; 6],
}

/// What was told of stale translations: the last one, and how many.
#[derive(Default)]
pub struct StaleTold {
    /// The last one.
    pub last: Option<StaleLeaf>,
    /// How many.
    pub told: u32,
}

impl Cpu {
    /// nvmx's frames as EPT tables, beside the rest of the CPU.
    #[inline(always)]
    pub fn tables<'a>(frames: &'a mut FramePool, phys: &'a DirectMap) -> PoolFrames<'a, &'a DirectMap> {
        PoolFrames { pool: frames, memory: phys }
    }

    /// A slot, how its fields are reached, and the machine to do it with.
    #[inline(always)]
    pub fn reach(&mut self, id: SlotId) -> (&mut Slot, &mut VmcsAccess, MachineParts<'_>) {
        let on = MachineParts { vmx: &mut self.vmx, phys: &self.phys, vmcs01: &self.vmcs01 };
        (&mut self.nested.slots[id], &mut self.config.access, on)
    }

    /// Makes the vmcs02 of a slot the current VMCS, with all that L2 wrote.
    pub fn enter_vmcs02(&mut self, id: SlotId) {
        let (slot, access, on) = self.reach(id);
        // What breaks a rule is judged by L2's next entry.
        let _ = access.enter(on, slot, ());
    }

    /// From the vmcs02 of a slot, which is current, back to vmcs01.
    pub fn leave_vmcs02(&mut self, id: SlotId) {
        let (slot, access, on) = self.reach(id);
        access.leave(on, slot);
    }
}
