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

macro_rules! vmx_errors {
    ($( $name:ident = $number:literal, $text:literal; )*) => {
        /// VM-instruction error numbers (SDM vol. 3C, table "VM-Instruction Error Numbers").
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum VmxError { $( #[doc = $text] $name = $number, )* }

        impl VmxError {
            /// All of them.
            pub const ALL: &'static [VmxError] = &[ $( VmxError::$name, )* ];

            /// The name, for records.
            pub const fn name(self) -> &'static str {
                match self { $( VmxError::$name => stringify!($name), )* }
            }

            /// What was wrong.
            pub const fn text(self) -> &'static str {
                match self { $( VmxError::$name => $text, )* }
            }
        }
    };
}

vmx_errors! {
    VmcallInVmxRootOperation = 1, "VMCALL in VMX root operation, where no SMM monitor takes it";
    VmclearInvalidAddress = 2, "VMCLEAR of an address that is no page of this machine";
    VmclearVmxonPointer = 3, "VMCLEAR of the VMXON region";
    VmlaunchNonClearVmcs = 4, "VMLAUNCH of a VMCS that is launched: VMRESUME it, or VMCLEAR it first";
    VmresumeNonLaunchedVmcs = 5, "VMRESUME of a VMCS that is not launched";
    VmresumeAfterVmxoff = 6, "VMRESUME after VMXOFF";
    EntryInvalidControlField = 7, "VM entry with invalid control fields";
    EntryInvalidHostStateField = 8, "VM entry with invalid host state";
    VmptrldInvalidAddress = 9, "VMPTRLD of an address that is no page of this machine";
    VmptrldVmxonPointer = 10, "VMPTRLD of the VMXON region";
    VmptrldIncorrectRevisionId = 11, "VMPTRLD of a region whose first word is not the revision of this machine";
    UnsupportedVmcsComponent = 12, "VMREAD or VMWRITE of a field that this machine does not have";
    VmwriteReadOnlyComponent = 13, "VMWRITE of a read-only field";
    VmxonInVmxRootOperation = 15, "VMXON in VMX root operation";
    EntryInvalidExecutiveVmcsPointer = 16, "VM entry with an invalid executive-VMCS pointer";
    EntryNonLaunchedExecutiveVmcs = 17, "VM entry with an executive VMCS that is not launched";
    EntryExecutiveVmcsPointerNotVmxon = 18, "VM entry with an executive-VMCS pointer that is not the VMXON pointer";
    VmcallNonClearVmcs = 19, "VMCALL to the SMM monitor with a VMCS that is not clear";
    VmcallInvalidExitControls = 20, "VMCALL to the SMM monitor with invalid VM-exit controls";
    VmcallIncorrectMsegRevision = 22, "VMCALL to the SMM monitor with a wrong revision of the MSEG";
    VmxoffUnderDualMonitor = 23, "VMXOFF under the dual-monitor treatment of SMIs and SMM";
    VmcallInvalidSmmMonitorFeatures = 24, "VMCALL to the SMM monitor with features that are not there";
    EntryInvalidExecutionControlInExecutiveVmcs = 25, "VM entry with invalid controls in the executive VMCS";
    EntryEventsBlockedByMovSs = 26, "VM entry while MOV SS blocks events";
    InvalidOperandToInveptInvvpid = 28, "INVEPT or INVVPID with a type or descriptor that this machine does not take";
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
        }
    }
}
