//! The outcomes that are never mixed.
//!
//! [`Fault`] goes into the guest, [`VmxResult`] is what a VMX instruction reports in RFLAGS, [`KillReason`] ends the L2
//! machine. A VM entry that fails late is an exit of L3 (`nested::reflect::entry_failure`). A panic is none of them: it
//! means a bug in nvmx.
//!
//! Source: Intel SDM vol. 3C, "VMX Instruction Reference": "Conventions" and "VM Instruction Error Numbers".

use crate::vmx::exit::ExitReason;
use core::fmt;

/// An exception to be delivered to the guest that executed the instruction.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// #UD
    InvalidOpcode,
    /// #GP with an error code
    GeneralProtection(u16),
    /// #SS with an error code
    StackSegment(u16),
    /// #PF: the error code and the linear address for CR2
    Page {
        /// Error code pushed by the fault.
        error_code: u32,
        /// Linear address that faulted; goes to CR2.
        linear: u64,
    },
}

/// VM-instruction error numbers (SDM vol. 3C, table "VM-Instruction Error Numbers").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum VmxError {
    VmcallInVmxRootOperation = 1,
    VmclearInvalidAddress = 2,
    VmclearVmxonPointer = 3,
    VmlaunchNonClearVmcs = 4,
    VmresumeNonLaunchedVmcs = 5,
    VmresumeAfterVmxoff = 6,
    EntryInvalidControlField = 7,
    EntryInvalidHostStateField = 8,
    VmptrldInvalidAddress = 9,
    VmptrldVmxonPointer = 10,
    VmptrldIncorrectRevisionId = 11,
    UnsupportedVmcsComponent = 12,
    VmwriteReadOnlyComponent = 13,
    VmxonInVmxRootOperation = 15,
    EntryInvalidExecutiveVmcsPointer = 16,
    EntryNonLaunchedExecutiveVmcs = 17,
    EntryExecutiveVmcsPointerNotVmxon = 18,
    VmcallNonClearVmcs = 19,
    VmcallInvalidExitControls = 20,
    VmcallIncorrectMsegRevision = 22,
    VmxoffUnderDualMonitor = 23,
    VmcallInvalidSmmMonitorFeatures = 24,
    EntryInvalidExecutionControlInExecutiveVmcs = 25,
    EntryEventsBlockedByMovSs = 26,
    InvalidOperandToInveptInvvpid = 28,
}

/// What a VMX instruction reports in RFLAGS (SDM vol. 3C, "Conventions": VMsucceed, VMfailInvalid, VMfailValid).
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmxResult {
    /// CF, PF, AF, ZF, SF, OF all clear.
    Succeed,
    /// CF set: there is no current VMCS to hold an error number.
    FailInvalid,
    /// ZF set, and the number goes to the VM-instruction error field of the current VMCS.
    FailValid(VmxError),
}

/// Why an L2 machine was ended.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KillReason {
    /// L2 triple-faulted outside VMX non-root operation.
    TripleFault,
    /// L2 touched memory that belongs to nvmx.
    ForbiddenMemory(crate::addr::Gpa),
    /// VMX abort while loading L2's host state (SDM, "VMX Aborts"): the abort indicator.
    VmxAbort(u32),
    /// The processor refused vmcs01: a state that nvmx let through.
    EntryFailed {
        /// Exit reason with bit 31, or the VM-instruction error number.
        reason: u32,
        /// Exit qualification.
        qualification: u64,
    },
    /// An exit that nvmx does not know how to handle for L2.
    UnexpectedExit(u32),
    /// INIT arrived, or another request to reset the machine.
    Reset,
}

impl fmt::Display for KillReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            KillReason::TripleFault => f.write_str("triple fault of L2"),
            KillReason::ForbiddenMemory(at) => {
                write!(f, "access to {at}, where L2 owns no memory (nvmx's own range, or beyond the physical width)")
            }
            KillReason::VmxAbort(indicator) => write!(f, "VMX abort {indicator}: L2's VM-exit state cannot be loaded"),
            KillReason::EntryFailed { reason, qualification } => {
                write!(f, "the processor refused the VM entry: reason {reason:#x}, qualification {qualification:#x}")
            }
            KillReason::UnexpectedExit(reason) => {
                write!(f, "VM exit {:?} that nvmx does not handle", ExitReason(reason))
            }
            KillReason::Reset => f.write_str("INIT: the machine is to be reset"),
        }
    }
}
