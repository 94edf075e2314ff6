//! One instruction, what came out, and what the SDM asks for.

use core::fmt;
use l2_kit::{
    Check,
    protocol::{Hex, Value},
    serial::Serial,
    trap::{self, Trap},
    vmx::Outcome,
};

/// What came out of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Got {
    /// It was executed
    Outcome(Outcome),
    /// It trapped: vector and error code
    Fault(u8, u64),
}

/// VMsucceed
pub const SUCCEED: Got = Got::Outcome(Outcome::Succeed);
/// VMfailInvalid
pub const INVALID: Got = Got::Outcome(Outcome::FailInvalid);
/// #UD
pub const UD: Got = Got::Fault(trap::UD, 0);
/// #GP(0)
pub const GP: Got = Got::Fault(trap::GP, 0);
/// #SS(0)
pub const SS: Got = Got::Fault(trap::SS, 0);
/// #PF on a read of a page that is not there
pub const PF_READ: Got = Got::Fault(trap::PF, 0);
/// #PF on a write to a page that is not there
pub const PF_WRITE: Got = Got::Fault(trap::PF, 2);
/// #PF on a write to a read-only page
pub const PF_READ_ONLY: Got = Got::Fault(trap::PF, 3);

/// VMfailValid with an error
pub const fn fail(error: u32) -> Got {
    Got::Outcome(Outcome::FailValid(error))
}

impl From<Trap> for Got {
    fn from(trap: Trap) -> Self {
        Got::Fault(trap.vector, trap.error)
    }
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Got::Outcome(outcome) => write!(f, "{outcome}"),
            Got::Fault(trap::BP, _) => f.write_str("executed"),
            Got::Fault(trap::UD, _) => f.write_str("#UD"),
            Got::Fault(trap::SS, error) => write!(f, "#SS({error:#x})"),
            Got::Fault(trap::GP, error) => write!(f, "#GP({error:#x})"),
            Got::Fault(trap::PF, error) => write!(f, "#PF({error:#x})"),
            Got::Fault(vector, error) => write!(f, "trap-{vector}({error:#x})"),
        }
    }
}

impl Value for Got {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

/// Runs an instruction.
pub fn got(instruction: impl FnOnce() -> Outcome) -> Got {
    match trap::catch(instruction) {
        Ok(outcome) => Got::Outcome(outcome),
        Err(trap) => trap.into(),
    }
}

/// Prints what came out and what should.
pub fn expect(name: impl Value, got: Got, wanted: Got) {
    Check::new(&mut Serial, name).expect("result", got, wanted).end();
}

/// [`expect`] for an instruction whose memory operand faults: where, too.
pub fn expect_fault(name: impl Value, instruction: impl FnOnce() -> Outcome, wanted: Got, address: u64) {
    match trap::catch(instruction) {
        Ok(outcome) => expect(name, Got::Outcome(outcome), wanted),
        Err(trap) => Check::new(&mut Serial, name)
            .expect("result", trap.into(), wanted)
            .expect("address", Hex(trap.address), Hex(address))
            .end(),
    }
}
