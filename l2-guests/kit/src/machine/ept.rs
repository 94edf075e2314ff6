//! EPT tables of a guest (SDM "The Extended Page Table Mechanism").

use super::pages::{self, LARGE, PAGE};

/// Rights of an entry.
pub mod rights {
    #![allow(missing_docs, reason = "plain words")]
    pub const NONE: u64 = 0;
    pub const R: u64 = 1;
    pub const W: u64 = 2;
    pub const X: u64 = 4;
    pub const RWX: u64 = 7;
    /// Fetches of user mode, under mode-based execute control
    pub const XU: u64 = 1 << 10;
    /// No right: violations are not converted to #VE
    pub const SUPPRESS_VE: u64 = 1 << 63;
    /// In entries for tables
    pub(super) const ALL: u64 = RWX | XU;
}

/// In an entry of level 1 or 2: it maps a page.
pub const LARGE_BIT: u64 = 1 << 7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Memory types in a leaf.
pub const WRITE_BACK: u64 = 6 << 3;
/// An entry was used (with flags enabled in the EPTP).
pub const ACCESSED: u64 = 1 << 8;
/// A page was written.
pub const DIRTY: u64 = 1 << 9;
/// Uncacheable
pub const UNCACHEABLE: u64 = 0;

/// A tree of four levels.
#[derive(Clone, Copy, Debug)]
pub struct Ept {
    root: u64,
}

impl Default for Ept {
    fn default() -> Self {
        Self::new()
    }
}

impl Ept {
    /// An empty tree.
    pub fn new() -> Self {
        Self { root: pages::address(pages::page()) }
    }

    /// A tree that maps memory up to [`pages::mapped_end`] one to one in 2 MiB pages; the fourth GiB, where devices are, uncacheable.
    pub fn identity() -> Self {
        let ept = Self::new();
        for page in 0..pages::mapped_end() >> 21 {
            let kind = if (page << 21) >> 30 == 3 { UNCACHEABLE } else { WRITE_BACK };
            let address = page * LARGE;
            ept.set(address, LARGE, address | kind | LARGE_BIT | rights::RWX);
        }
        ept
    }

    /// EPTP: four levels, write-back.
    pub fn pointer(&self) -> u64 {
        self.root | 3 << 3 | 6
    }

    /// EPTP: the same, with accessed and dirty flags.
    pub fn pointer_with_flags(&self) -> u64 {
        self.pointer() | 1 << 6
    }

    /// Clears the accessed and dirty flags of all entries.
    pub fn clear_flags(&self) {
        clear_flags(self.root, 3);
    }

    /// Sets the entry that maps `address` by a page of `size` (4 KiB or 2 MiB); a 2 MiB page in the way is split.
    pub fn set(&self, address: u64, size: u64, entry: u64) {
        let last = if size == PAGE { 0 } else { 1 };
        for level in (last + 1..4).rev() {
            let upper = self.entry(address, level);
            if upper & rights::RWX == 0 {
                self.set_entry(address, level, pages::address(pages::page()) | rights::ALL);
            } else if upper & LARGE_BIT != 0 {
                self.set_entry(address, level, split(upper) | rights::ALL);
            }
        }
        self.set_entry(address, last, entry);
    }

    /// The entry for `address` in the table of a level (0: the one that maps 4 KiB pages), whose tables exist.
    pub fn entry(&self, address: u64, level: u32) -> u64 {
        // SAFETY: the tree is this image's memory, and nobody holds a reference to its pages.
        let table = unsafe { pages::at(self.table(address, level)) };
        table[index(address, level)]
    }

    /// Sets the entry that [`Ept::entry`] reads.
    pub fn set_entry(&self, address: u64, level: u32, entry: u64) {
        // SAFETY: as above.
        let table = unsafe { pages::at(self.table(address, level)) };
        table[index(address, level)] = entry;
    }

    fn table(&self, address: u64, level: u32) -> u64 {
        (level + 1..4).rev().fold(self.root, |table, upper| {
            // SAFETY: as above.
            let table = unsafe { pages::at(table) };
            table[index(address, upper)] & ADDRESS
        })
    }

    /// Maps a page of `size` one to one with these rights, write-back.
    pub fn map(&self, address: u64, size: u64, rights: u64) {
        let large = if size == PAGE { 0 } else { LARGE_BIT };
        self.set(address, size, address | WRITE_BACK | large | rights);
    }

    /// Leaves a hole of `size`.
    pub fn unmap(&self, address: u64, size: u64) {
        self.set(address, size, 0);
    }
}

fn index(address: u64, level: u32) -> usize {
    (address >> (12 + 9 * level)) as usize & 511
}

fn clear_flags(table: u64, level: u32) {
    for index in 0..512 {
        // SAFETY: the tree is this image's memory; the reference ends before the next table is looked at.
        let entry = &mut unsafe { pages::at(table) }[index];
        *entry &= !(ACCESSED | DIRTY);
        let entry = *entry;
        if level > 0 && entry & LARGE_BIT == 0 && entry & rights::RWX != 0 {
            clear_flags(entry & ADDRESS, level - 1);
        }
    }
}

/// A table of 4 KiB pages that maps what the 2 MiB entry mapped.
fn split(large: u64) -> u64 {
    let table = pages::page();
    for (small, slot) in (0..).step_by(PAGE as usize).zip(table.iter_mut()) {
        *slot = (large & !LARGE_BIT) + small;
    }
    pages::address(table)
}
