//! Exit qualifications, decoded.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Exit Qualification for ..." tables: debug exceptions, task switches,
//! control-register accesses, MOV DR, I/O instructions, EPT violations (the last one is in `ept::violation`).

/// What a control-register access did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrAccess {
    /// MOV to CRn from the general-purpose register
    Write {
        /// Number of the control register.
        cr: u8,
        /// Number of the general-purpose register.
        gpr: u8,
    },
    /// MOV from CRn to the general-purpose register
    Read {
        /// Number of the control register.
        cr: u8,
        /// Number of the general-purpose register.
        gpr: u8,
    },
    /// CLTS
    Clts,
    /// LMSW with its source; `memory` tells whether the operand was in memory
    Lmsw {
        /// The operand.
        source: u16,
        /// True for a memory operand.
        memory: bool,
    },
}

impl CrAccess {
    /// From the exit qualification of exit reason 28.
    #[inline]
    pub const fn decode(qualification: u64) -> Self {
        let cr = (qualification & 0xF) as u8;
        let gpr = ((qualification >> 8) & 0xF) as u8;
        match (qualification >> 4) & 3 {
            0 => Self::Write { cr, gpr },
            1 => Self::Read { cr, gpr },
            2 => Self::Clts,
            _ => Self::Lmsw { source: (qualification >> 16) as u16, memory: qualification & 1 << 6 != 0 },
        }
    }
}

/// MOV DR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DrAccess {
    /// Number of the debug register.
    pub dr: u8,
    /// Number of the general-purpose register.
    pub gpr: u8,
    /// True for MOV from DR.
    pub read: bool,
}

impl DrAccess {
    /// From the exit qualification of exit reason 29.
    pub const fn decode(qualification: u64) -> Self {
        Self {
            dr: (qualification & 7) as u8,
            gpr: ((qualification >> 8) & 0xF) as u8,
            read: qualification & 1 << 4 != 0,
        }
    }
}

/// An I/O instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoAccess {
    /// Port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// True for IN and INS.
    pub input: bool,
    /// True for INS and OUTS.
    pub string: bool,
    /// True with a REP prefix.
    pub rep: bool,
    /// True if the port is an immediate operand.
    pub immediate: bool,
}

impl IoAccess {
    /// From the exit qualification of exit reason 30.
    #[inline]
    pub const fn decode(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            size: (qualification & 7) as u8 + 1,
            input: qualification & 1 << 3 != 0,
            string: qualification & 1 << 4 != 0,
            rep: qualification & 1 << 5 != 0,
            immediate: qualification & 1 << 6 != 0,
        }
    }
}

/// Where a task switch came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum TaskSwitchSource {
    Call,
    Iret,
    Jmp,
    /// A task gate in the IDT
    Gate,
}

/// A task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskSwitch {
    /// Selector of the new task-state segment.
    pub selector: u16,
    /// What started it.
    pub source: TaskSwitchSource,
}

impl TaskSwitch {
    /// From the exit qualification of exit reason 9.
    pub const fn decode(qualification: u64) -> Self {
        let source = match (qualification >> 30) & 3 {
            0 => TaskSwitchSource::Call,
            1 => TaskSwitchSource::Iret,
            2 => TaskSwitchSource::Jmp,
            _ => TaskSwitchSource::Gate,
        };
        Self { selector: qualification as u16, source }
    }
}

/// What a debug exception reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DebugException {
    /// B3..B0: which breakpoint conditions were met.
    pub breakpoints: u8,
    /// BD: access to a debug register.
    pub register_access: bool,
    /// BS: single step.
    pub single_step: bool,
    /// A bus lock was taken.
    pub bus_lock: bool,
    /// In a transactional region with advanced debugging.
    pub rtm: bool,
}

impl DebugException {
    /// From the exit qualification of a #DB (exit reason 0).
    pub const fn decode(qualification: u64) -> Self {
        Self {
            breakpoints: (qualification & 0xF) as u8,
            bus_lock: qualification & 1 << 11 != 0,
            register_access: qualification & 1 << 13 != 0,
            single_step: qualification & 1 << 14 != 0,
            rtm: qualification & 1 << 16 != 0,
        }
    }
}

/// Why a VM entry failed with reason 33: the exit qualification ("VM-Entry Failures During or After Loading Guest State").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum EntryFailure {
    /// Any other rule
    General = 0,
    /// PDPTEs could not be loaded
    Pdptes = 2,
    /// Injection of an NMI while STI blocks
    NmiBlockedBySti = 3,
    /// Invalid VMCS link pointer
    LinkPointer = 4,
}
