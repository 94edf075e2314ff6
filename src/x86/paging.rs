//! Entries of page tables, and what a page fault says.
//!
//! Source: Intel SDM vol. 3A, "4-Level Paging and 5-Level Paging", tables "Format of a Page-Table Entry ..."; figure "Page-Fault Error
//! Code". The bits are those of the crate `x86_64`. Its `PageTableEntry` does not serve: it panics on an address that is not aligned, and
//! a guest's entry may have any bits. Nor does its `PhysAddr`, which refuses more than 52 bits: whether an address of a guest is too wide
//! is what the walk has to find out.

use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::PageTableFlags;

/// P
pub const PRESENT: u64 = PageTableFlags::PRESENT.bits();
/// R/W
pub const WRITABLE: u64 = PageTableFlags::WRITABLE.bits();
/// U/S
pub const USER: u64 = PageTableFlags::USER_ACCESSIBLE.bits();
/// PCD and PWT: strong uncacheable, by the entry of IA32_PAT that they choose after reset.
pub const UNCACHEABLE: u64 = PageTableFlags::NO_CACHE.union(PageTableFlags::WRITE_THROUGH).bits();
/// A
pub const ACCESSED: u64 = PageTableFlags::ACCESSED.bits();
/// D
pub const DIRTY: u64 = PageTableFlags::DIRTY.bits();
/// PS: the entry maps a large page.
pub const LARGE: u64 = PageTableFlags::HUGE_PAGE.bits();
/// XD
pub const NO_EXECUTE: u64 = PageTableFlags::NO_EXECUTE.bits();
/// The address of the next table or of a page of 4 KiB.
pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// [`ADDRESS`] on a processor with this physical-address width (32 to 52 bits); what is left of it is reserved.
#[inline(always)]
pub const fn address(physical_width: u32) -> u64 {
    ((1 << physical_width) - 1) & !0xFFF
}

/// Bits of a page fault's error code.
pub mod error {
    use super::PageFaultErrorCode as Code;

    /// P: the entries are present.
    pub const PRESENT: u32 = Code::PROTECTION_VIOLATION.bits() as u32;
    /// W/R
    pub const WRITE: u32 = Code::CAUSED_BY_WRITE.bits() as u32;
    /// U/S
    pub const USER: u32 = Code::USER_MODE.bits() as u32;
    /// RSVD
    pub const RESERVED: u32 = Code::MALFORMED_TABLE.bits() as u32;
    /// PK
    pub const KEY: u32 = Code::PROTECTION_KEY.bits() as u32;
}
