//! Bits of EPT entries that more than the EPT code needs.
//!
//! Source: Intel SDM vol. 3C, "EPT Translation Mechanism", tables "Format of an EPT ... Entry".

/// Address of a table or page.
pub const ADDRESS: u64 = crate::x86::paging::ADDRESS;
/// The entry maps a page, in a table that is not the last.
pub const LARGE: u64 = 1 << 7;
/// Accessed
pub const ACCESSED: u64 = 1 << 8;
/// Dirty
pub const DIRTY: u64 = 1 << 9;
