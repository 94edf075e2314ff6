//! Why the machine of L2 ends. A panic is none of these reasons: it means a bug in nvmx.

use crate::addr::Gpa;
use crate::vmx::exit::ExitReason;
use core::fmt;

/// Why an L2 machine was ended.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KillReason {
    /// L2 triple-faulted outside VMX non-root operation.
    TripleFault,
    /// L2 touched memory that belongs to nvmx.
    ForbiddenMemory(Gpa),
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
    /// A machine check for L2, which has CR4.MCE clear.
    MachineCheck,
    /// A fault of nvmx: something that its own code makes sure of does not hold. One byte, so that the whole is returned in registers.
    Broken(Promise),
}

/// What nvmx's own code makes sure of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promise {
    /// An entry has its controls prepared.
    ControlsPrepared,
    /// An entry on vmcs02 is one in VMX non-root operation.
    NonRootOnVmcs02,
    /// An entry that fails late has a current vmcs12.
    CurrentVmcs12,
    /// An ept02 that was emptied left frames.
    FrameInReserve,
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
            KillReason::MachineCheck => {
                f.write_str("a machine check while CR4.MCE of L2 is clear: a processor shuts down")
            }
            KillReason::Broken(promise) => write!(f, "a fault of nvmx: {promise:?} does not hold"),
        }
    }
}
