//! The state of one virtual CPU.

use super::tracked::Tracked;
use crate::addr::Hpa;
use crate::emul::msr::OwnMsrs;
use crate::ept::{Ept01, Ept02, PoolFrames};
use crate::error::{Fault, KillReason};
use crate::hw::phys::DirectMap;
use crate::hw::vmenter::GuestRegs;
use crate::hw::vmx::Vmx;
use crate::mm::linear::AccessError;
use crate::mm::mtrr::Mtrrs;
use crate::mm::{FramePool, GuestMemory};
use crate::nested::Nested;
use crate::nested::events::Events;
use crate::nested::l3_memory::{Failed, Miss};
use crate::nested::merge::MsrIntercepts;
use crate::nested::vmcs12::FieldSet;
use crate::vmx::Capabilities;
use crate::vmx::bitmap::Words;
use crate::vmx::image::Layout;
use bitflags::bitflags;
use l2_protocol::abi::Strategy;

bitflags! {
    /// Events for a guest that cannot take them yet.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Waiting: u8 {
        /// An NMI that arrived in nvmx.
        const NMI = 1 << 0;
        /// An INIT that arrived while L2 was in VMX root operation, where it is blocked.
        const INIT = 1 << 1;
        /// None of these: something of nvmx's own is in the VMCS of the guest, [`Events`] says what.
        const OWN = 1 << 2;
    }
}

/// L2's processor on its way from an INIT to its first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Startup {
    /// It runs, or waits for a start-up message in the state after an INIT.
    Done,
    /// It waits for a start-up message; vmcs01 is not in the state after an INIT yet.
    Waiting,
    /// The message came; L2 has not been entered since.
    Entering,
}

/// What is decided at start and never changes.
pub struct Config {
    /// The processor.
    pub hardware: Capabilities,
    /// The processor that L2 sees.
    pub offered: Capabilities,
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub strategy: Strategy,
    /// Programs of L2 may read the counters.
    pub user_counters: bool,
    /// Where fields lie in memory, under the in-memory strategy.
    pub layout: Option<Layout>,
    /// Fields that the processor has.
    pub exists: FieldSet,
    /// Memory types of the machine.
    pub mtrrs: Mtrrs,
}

/// One virtual CPU. It never moves once it runs: HOST_RSP points into `regs`.
pub struct Cpu {
    /// General-purpose registers of the guest that exited last.
    pub regs: GuestRegs,
    /// The right to execute VMX instructions, and the counters.
    pub vmx: Vmx,
    /// Decided at start.
    pub config: Config,
    /// The VMCS that runs L2.
    pub vmcs01: Hpa,
    /// vmcs01 entered since its VMCLEAR.
    pub launched01: bool,
    /// vmcs01 loads an MSR area with the next entry (L2's VM-exit MSR-load area).
    pub loads_msrs01: bool,
    /// VMREAD and VMWRITE bitmap: what VMCS shadowing lets L2 reach.
    pub shadow_bitmaps: [Hpa; 2],
    /// MSR bitmap of vmcs01: what nvmx itself must see.
    pub msr_bitmap01: Hpa,
    /// What L3 may reach of a shadow VMCS by VMREAD and VMWRITE, to be merged with L2's bitmaps.
    pub shadow_words: [Words; 2],
    /// What nvmx must see of L3, to be merged with L2's bitmap.
    pub msr_intercepts: MsrIntercepts,
    /// Stands for memory that is not there: a frame of nvmx.
    pub void: Hpa,
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
    /// Where L2 is on its way from an INIT to its first instruction.
    pub start: Startup,
    /// What nvmx has changed in vmcs02 for events of its own.
    pub events: Events,
}

impl Cpu {
    /// nvmx's frames as EPT tables, beside the rest of the CPU.
    #[inline(always)]
    pub fn tables<'a>(frames: &'a mut FramePool, phys: &'a DirectMap) -> PoolFrames<'a, &'a DirectMap> {
        PoolFrames { pool: frames, memory: phys }
    }
}

/// How L2 goes on after an exit that nvmx handled.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Behind the instruction.
    Advance,
    /// Where it is: the instruction runs again, or the state was set otherwise.
    Stay,
}

/// What keeps an instruction of L2 from completing.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// L2 gets an exception.
    Fault(Fault),
    /// ept12 does not serve an operand of L3.
    Miss(Miss),
    /// The guest executes the instruction anew.
    Again,
    /// The machine ends.
    Kill(KillReason),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

impl From<KillReason> for Stop {
    fn from(reason: KillReason) -> Self {
        Stop::Kill(reason)
    }
}

impl From<Failed> for Stop {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Access(error) => error.into(),
            Failed::Miss(miss) => Stop::Miss(miss),
        }
    }
}

impl From<AccessError> for Stop {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Fault(fault) => Stop::Fault(fault),
            AccessError::NotOwned(at) => Stop::Kill(KillReason::ForbiddenMemory(at.0)),
            AccessError::Again => Stop::Again,
        }
    }
}
