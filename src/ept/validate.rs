//! ept02 after an INVEPT of L2: each leaf is held against ept12 and stays if it still follows from it.
//!
//! INVEPT tells that something in ept12 may have changed, not what; L2 executes it far more often than it changes much.
//! So contents are not thrown away but compared, table by table, the next time the root is used. What ept12 no longer
//! says goes; what it says otherwise is written anew; what is as it was costs one look at each of two entries and no
//! fault of L3.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Operations that Invalidate Cached Mappings" and "Use of the INVEPT
//! Instruction".

use super::cache::{Ept02, free_below};
use super::entry::{self, ACCESSED, Caching, DIRTY, EptRules, Level, Meaning, Rights};
use super::reserve::Reserve;
use super::{GuestView, TableFrames};
use crate::addr::{Gpa, Hpa};

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// Holds the contents of a root against ept12.
    #[cold]
    pub(super) fn validate<G: GuestView, F: TableFrames>(&mut self, index: usize, guest: &G, frames: &mut F) {
        self.run = None;
        let root = &mut self.roots[index % ROOTS];
        root.stale = false;
        let Some(role) = root.role.filter(|_| root.tables > 0) else { return };
        // L2's INVEPT also concerns what the processor combined from ept02 and L3's own page tables.
        root.invept = true;
        let rules = self.rules.mode_based(role.mode_based());
        let mut check = Check {
            rules: &rules,
            flags: role.accessed_dirty(),
            guest,
            frames,
            reserve: &mut self.reserve,
            tables: &mut root.tables,
        };
        check.table(root.table, Level::Pml4, 0, Source::Table(role.guest_root(), rules.all_rights()));
    }
}

/// What a table of ept02 was composed of.
#[derive(Clone, Copy)]
enum Source {
    /// A table of ept12 of the same level, and the rights that the entries above it grant.
    Table(Gpa, Rights),
    /// A page of ept12, which nvmx's own memory cuts in pieces.
    Page(Page),
}

/// A page of ept12.
#[derive(Clone, Copy)]
struct Page {
    at: Gpa,
    level: Level,
    rights: Rights,
    caching: Caching,
}

/// One root being compared.
struct Check<'a, G, F, const N: usize> {
    rules: &'a EptRules,
    /// ept12 has accessed and dirty flags.
    flags: bool,
    guest: &'a G,
    frames: &'a mut F,
    reserve: &'a mut Reserve<N>,
    /// Tables of the root.
    tables: &'a mut u32,
}

/// Entries that are looked at in one go.
const CHUNK: usize = 64;

impl<G: GuestView, F: TableFrames, const N: usize> Check<'_, G, F, N> {
    /// Compares a table of ept02 for the addresses from `base` on, and tells whether anything is left in it.
    fn table(&mut self, table: Hpa, level: Level, base: u64, source: Source) -> bool {
        // The level is a constant in each.
        match level {
            Level::Pt => self.scan(table, Level::Pt, base, source),
            Level::Pd => self.scan(table, Level::Pd, base, source),
            Level::Pdpt => self.scan(table, Level::Pdpt, base, source),
            Level::Pml4 => self.scan(table, Level::Pml4, base, source),
        }
    }

    #[inline(always)]
    fn scan(&mut self, table: Hpa, level: Level, base: u64, source: Source) -> bool {
        let mut left = false;
        let (mut entries02, mut entries12) = ([0; CHUNK], [0; CHUNK]);
        for offset in (0..4096).step_by(8 * CHUNK) {
            self.frames.read_all(Hpa::new(table.get() | offset), &mut entries02);
            if !entry::is_present(entries02.iter().fold(0, |all, entry| all | entry)) {
                continue;
            }
            if let Source::Table(table12, _) = source {
                if self.guest.read_entries(Gpa::new(table12.get() | offset), &mut entries12).is_err() {
                    entries12.fill(0);
                }
            }
            for (n, (old, entry12)) in (0..).zip(entries02.iter().zip(&entries12)) {
                if !entry::is_present(*old) {
                    continue;
                }
                let within = offset + 8 * n;
                let (at, ngpa) = (Hpa::new(table.get() | within), base + (within >> 3) * level.bytes());
                left |= match source {
                    Source::Table(_, rights) => self.entry(at, *old, *entry12, rights, level, ngpa),
                    Source::Page(page) => self.piece(at, *old, &page, level, ngpa),
                };
            }
        }
        left
    }

    /// Compares an entry with its counterpart in ept12, and tells whether it stays.
    #[inline(always)]
    fn entry(&mut self, at: Hpa, old: u64, entry12: u64, upper: Rights, level: Level, ngpa: u64) -> bool {
        let mut rights = upper & Rights::of(entry12);
        let meaning = match entry::decode(entry12, level, self.rules) {
            // The next access has to set the flag.
            _ if self.flags && entry12 & ACCESSED == 0 => Meaning::NotPresent,
            meaning => meaning,
        };
        match meaning {
            Meaning::Leaf { address, caching } => {
                if self.flags && entry12 & DIRTY == 0 {
                    rights -= Rights::WRITE;
                }
                self.piece(at, old, &Page { at: Gpa::new(address), level, rights, caching }, level, ngpa)
            }
            Meaning::Table(next) if !entry::is_leaf(old, level) => {
                self.subtree(at, old, level, ngpa, Source::Table(Gpa::new(next), rights))
            }
            _ => self.drop(at, old, level),
        }
    }

    /// Compares an entry for a page of ept12, or for a part of one.
    #[inline(always)]
    fn piece(&mut self, at: Hpa, old: u64, page: &Page, level: Level, ngpa: u64) -> bool {
        if !entry::is_leaf(old, level) {
            return self.subtree(at, old, level, ngpa, Source::Page(*page));
        }
        let gpa = Gpa::new(page.at.get() | page.level.offset(ngpa));
        let Ok(block) = self.guest.block(gpa, page.level) else { return self.drop(at, old, level) };
        let rights = page.rights & block.rights;
        if block.level != level || rights.is_empty() {
            return self.drop(at, old, level);
        }
        let new = entry::leaf_entry(block.hpa, level, rights, page.caching);
        if !entry::is_same(old, new) {
            self.frames.write(at, new);
        }
        true
    }

    /// Compares a table below; one that is empty afterwards goes.
    fn subtree(&mut self, at: Hpa, old: u64, level: Level, ngpa: u64, source: Source) -> bool {
        let child = Hpa::new(old & entry::ADDRESS);
        let stays = level.below().is_some_and(|below| self.table(child, below, ngpa, source));
        stays || self.drop(at, old, level)
    }

    /// Takes out an entry, and the tables below it.
    #[cold]
    fn drop(&mut self, at: Hpa, old: u64, level: Level) -> bool {
        self.frames.write(at, 0);
        if !entry::is_leaf(old, level) {
            let child = Hpa::new(old & entry::ADDRESS);
            *self.tables = self.tables.saturating_sub(1);
            if let Some(below) = level.below() {
                free_below(child, below, self.tables, self.reserve, self.frames);
            }
            self.reserve.free(child, self.frames);
        }
        false
    }
}
