//! How an instruction of a guest ends in nvmx.

use super::nested_memory::{Failed, Miss};
use crate::mm::linear::AccessError;
use crate::trace::KillReason;
use crate::x86::Fault;

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
