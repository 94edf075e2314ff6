//! Exceptions that an instruction ends in.

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
