//! What a task switch works on: the registers of the processor, by value, and how it can end.

use crate::mm::guest::NotOwned;
use crate::mm::linear::Paging;
use crate::vmx::event::vector;
use crate::x86::{RFlags, selector};

/// Indexes of [`State::segments`], as the VMCS orders them.
pub const ES: usize = 0;
#[allow(missing_docs)]
pub const CS: usize = 1;
#[allow(missing_docs)]
pub const SS: usize = 2;
#[allow(missing_docs)]
pub const DS: usize = 3;
#[allow(missing_docs)]
pub const FS: usize = 4;
#[allow(missing_docs)]
pub const GS: usize = 5;

/// RFLAGS.NT
pub const NT: u32 = RFlags::NESTED_TASK.bits() as u32;
/// RFLAGS.RF
pub const RF: u32 = RFlags::RESUME_FLAG.bits() as u32;
/// RFLAGS.VM
pub const VM: u32 = RFlags::VIRTUAL_8086_MODE.bits() as u32;

/// A segment register in the form of the VMCS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentState {
    /// Selector
    pub selector: u16,
    /// Base
    pub base: u32,
    /// Limit in bytes
    pub limit: u32,
    /// Access rights (SDM vol. 3C, table "Format of Access Rights")
    pub rights: u32,
}

impl SegmentState {
    /// Unusable, with a selector all the same, and a privilege level, which counts in SS.
    pub const fn unusable(selector: u16, level: u8) -> Self {
        Self { selector, base: 0, limit: 0, rights: 1 << 16 | (level as u32) << 5 }
    }

    /// As virtual-8086 mode has it.
    pub const fn of_8086(selector: u16) -> Self {
        Self { selector, base: (selector as u32) << 4, limit: 0xFFFF, rights: 0xF3 }
    }

    /// Flat code of a level: what CS is while it could not be loaded, since a VM entry takes no unusable CS. An exception is
    /// delivered before anything is fetched through it.
    pub const fn unloaded_code(selector: u16, level: u8) -> Self {
        Self { selector, base: 0, limit: u32::MAX, rights: 0xC09B | (level as u32) << 5 }
    }
}

/// The registers.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// CR0, CR3, CR4, IA32_EFER, the PDPTE registers; its RFLAGS is not used.
    pub paging: Paging,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI
    pub gprs: [u32; 8],
    /// EIP: where the task goes on that is left
    pub eip: u32,
    /// EFLAGS
    pub eflags: u32,
    /// ES, CS, SS, DS, FS, GS
    pub segments: [SegmentState; 6],
    /// LDTR
    pub ldtr: SegmentState,
    /// TR
    pub tr: SegmentState,
    /// Base of the GDT
    pub gdt_base: u32,
    /// Limit of the GDT
    pub gdt_limit: u32,
    /// DR7
    pub dr7: u32,
}

/// What switches (SDM vol. 3C, table "Exit Qualification for Task Switches").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// CALL, by TSS descriptor or task gate
    Call,
    /// IRET with NT
    Iret,
    /// JMP, by TSS descriptor or task gate
    Jump,
    /// An event through a task gate of the IDT.
    Gate {
        /// INT n, INT3 and INTO are not: a fault has EXT only for the others.
        external: bool,
        /// The event's error code, pushed on the new task's stack.
        error_code: Option<u32>,
    },
}

impl Source {
    /// From bits 31:30 of the qualification.
    pub const fn of(qualification: u64, external: bool, error_code: Option<u32>) -> Self {
        match qualification >> 30 & 3 {
            0 => Self::Call,
            1 => Self::Iret,
            2 => Self::Jump,
            _ => Self::Gate { external, error_code },
        }
    }

    /// The new task is linked to the old one.
    pub const fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Gate { .. })
    }

    /// EXT of an error code.
    pub const fn ext(self) -> u32 {
        matches!(self, Self::Gate { external: true, .. }) as u32
    }
}

/// An exception with an error code.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskException {
    /// Vector
    pub vector: u8,
    /// Error code
    pub error: u32,
    /// CR2, of a page fault.
    pub linear: Option<u64>,
}

impl TaskException {
    /// One that is about a selector; `source` gives EXT.
    pub const fn of(vector: u8, selector: u16, source: Source) -> Self {
        Self { vector, error: selector::error_code(selector) | source.ext(), linear: None }
    }

    /// #DF
    pub const DOUBLE: Self = Self { vector: vector::DF, error: 0, linear: None };
}

/// Why there is no switch.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SwitchFailure {
    /// An exception in the old task; registers and memory are as they were.
    Exception(TaskException),
    /// A table or a TSS lies where L2 owns no memory.
    NotOwned(NotOwned),
    /// The instruction is to be executed anew.
    Again,
}

/// A switch that was made.
#[derive(Clone, Copy, Debug)]
pub struct TaskSwitched {
    /// The registers of the new task.
    pub state: State,
    /// An exception in the new task, before its first instruction.
    pub exception: Option<TaskException>,
    /// The T flag of the new TSS: a debug exception before the first instruction.
    pub trap: bool,
}
