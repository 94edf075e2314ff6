//! Tables of sub-page write permissions: what L2's (spp12) say, and the one that the processor looks into for L3 (spp02).
//!
//! A table has four levels. The first three hold physical addresses, the last a word for each page of 4 KiB, with a bit for each 128
//! bytes of it. spp12 holds L2's addresses, so it is composed as ept12 is; its last tables hold none, and spp02 references them where
//! they lie ([ADR 0031](../../docs/adr/0031-sub-page-tables-where-they-lie.md)).
//!
//! Source: Intel SDM vol. 3C (December 2024), "Sub-Page Write Permissions", with the formats of the tables' entries.

use super::entry::{ADDRESS, Level};
use super::reserve::Reserve;
use super::{GuestView, NotOwned, OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa, Ngpa, PAGE_SIZE};

/// An entry of any table but the last references the next one.
const VALID: u64 = 1 << 0;
/// Each second bit of a word for a page belongs to no sub-page.
const NO_SUB_PAGE: u64 = 0xAAAA_AAAA_AAAA_AAAA;
/// Bytes of a sub-page.
const SUB_PAGE: u64 = 128;
/// The tables that hold addresses, from the first on.
const UPPER: [Level; 3] = [Level::Pml4, Level::Pdpt, Level::Pd];

/// Where an entry lies in a table of four levels.
const fn entry_at(table: u64, level: Level, ngpa: Ngpa) -> u64 {
    table & ADDRESS | level.entry_offset(ngpa.get())
}

/// What spp12 says of a page.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Said {
    /// Which of its sub-pages can be written.
    Page {
        /// The bit of sub-page n is bit 2n.
        bits: u64,
        /// The last table of L2's, in which they stand.
        table: Gpa,
    },
    /// A table is missing.
    Miss,
    /// A reserved bit is set. A table where L2 owns no memory, or beyond the physical-address width, is that too: nothing answers there, and
    /// all ones is not a valid entry.
    Misconfigured,
}

impl Said {
    /// Each sub-page can be written that so many bytes from an address on lie in; they lie in one page.
    pub const fn allows(self, ngpa: Ngpa, bytes: u64) -> bool {
        let Self::Page { bits, .. } = self else { return false };
        let (mut at, last) =
            (ngpa.get() % PAGE_SIZE / SUB_PAGE, (ngpa.get() % PAGE_SIZE + bytes.saturating_sub(1)) / SUB_PAGE);
        let mut all = last < PAGE_SIZE / SUB_PAGE;
        while all && at <= last {
            all = bits >> (2 * at) & 1 != 0;
            at += 1;
        }
        all
    }
}

/// Looks a page up in spp12; each entry is read once.
pub fn look_up<G: GuestView>(spptp12: Gpa, ngpa: Ngpa, guest: &G) -> Said {
    let read = |table: Gpa, level| guest.read_entry(Gpa::new(entry_at(table.get(), level, ngpa))).unwrap_or(u64::MAX);
    let mut table = spptp12;
    for level in UPPER {
        match read(table, level) {
            entry if entry & VALID == 0 => return Said::Miss,
            entry if entry & !(ADDRESS | VALID) != 0 => return Said::Misconfigured,
            entry => table = Gpa::new(entry & ADDRESS),
        }
    }
    match read(table, Level::Pt) {
        bits if bits & NO_SUB_PAGE != 0 => Said::Misconfigured,
        bits => Said::Page { bits, table },
    }
}

/// The entry for a last table of L2's in spp02.
pub(super) fn reference<G: GuestView>(table12: Gpa, guest: &G) -> Result<u64, NotOwned> {
    Ok(guest.block(table12, Level::Pt)?.hpa.get() | VALID)
}

/// spp02 of a root of ept02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Spp02 {
    /// Its first table.
    pub(super) table: Hpa,
    /// What it is composed of.
    pub(super) spptp12: Gpa,
    /// Tables below the first.
    below: u32,
}

impl Spp02 {
    /// Of a first table, which is empty.
    pub(super) const fn new(table: Hpa, spptp12: Gpa) -> Self {
        Self { table, spptp12, below: 0 }
    }

    /// How many tables it has.
    pub(super) const fn tables(&self) -> u32 {
        self.below + 1
    }

    /// Whether the way to a page ends with this entry.
    pub(super) fn has<F: TableFrames>(&self, ngpa: Ngpa, last: u64, frames: &F) -> bool {
        self.last(ngpa, frames) == Some(last)
    }

    /// The entry with which the way to a page ends, if there is one.
    pub(super) fn last<F: TableFrames>(&self, ngpa: Ngpa, frames: &F) -> Option<u64> {
        let valid = |entry: &u64| entry & VALID != 0;
        UPPER.into_iter().try_fold(self.table.get(), |table, level| {
            Some(frames.read(Hpa::new(entry_at(table, level, ngpa)))).filter(valid)
        })
    }

    /// Writes the way to a page, which ends with the entry `last`. True if that is in the place of another, which the processor may have
    /// cached.
    pub(super) fn fill<const N: usize, F: TableFrames>(
        &mut self,
        ngpa: Ngpa,
        last: u64,
        reserve: &mut Reserve<N>,
        frames: &mut F,
    ) -> Result<bool, OutOfFrames> {
        let mut table = self.table;
        for level in [Level::Pml4, Level::Pdpt] {
            let at = Hpa::new(entry_at(table.get(), level, ngpa));
            let old = frames.read(at);
            table = if old & VALID != 0 {
                Hpa::new(old & ADDRESS)
            } else {
                let new = reserve.alloc(frames).ok_or(OutOfFrames)?;
                frames.write(at, new.get() | VALID);
                self.below += 1;
                new
            };
        }
        let at = Hpa::new(entry_at(table.get(), Level::Pd, ngpa));
        let old = frames.read(at);
        frames.write(at, last);
        Ok(old & VALID != 0 && old != last)
    }

    /// Frees all tables below the first; the last of them reference L2's.
    pub(super) fn clear<const N: usize, F: TableFrames>(&mut self, reserve: &mut Reserve<N>, frames: &mut F) {
        if self.below > 0 {
            free_below(self.table, Level::Pml4, reserve, frames);
            self.below = 0;
        }
    }
}

/// Empties a table and frees what it references of nvmx's.
fn free_below<const N: usize, F: TableFrames>(table: Hpa, level: Level, reserve: &mut Reserve<N>, frames: &mut F) {
    for index in 0..512 {
        let at = Hpa::new(table.get() | index << 3);
        let value = frames.read(at);
        if value & VALID == 0 {
            continue;
        }
        frames.write(at, 0);
        if let Some(below) = level.below().filter(|_| level > Level::Pd) {
            let next = Hpa::new(value & ADDRESS);
            free_below(next, below, reserve, frames);
            reserve.free(next, frames);
        }
    }
}
