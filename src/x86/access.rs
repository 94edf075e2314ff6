//! Accesses to memory.

/// A data access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataAccess {
    /// Load
    Read,
    /// Store
    Write,
}
