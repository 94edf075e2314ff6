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
use super::entry::{self, ACCESSED, Caching, DIRTY, EptRules, LARGE, Level, Meaning, Rights};
use super::reserve::Reserve;
use super::{GuestView, TableFrames};
use crate::addr::{Gpa, Hpa};
use core::slice::from_ref;

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

/// Entries of a table.
const ENTRIES: usize = 512;
/// Entries of a table of pages that are read in one go.
const CHUNK: usize = 64;
/// Entries that are compared in one go; in a group with one that changed each is looked at.
const GROUP: usize = 16;

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
        // Tables of pages are full, those above them nearly empty.
        let chunk = if level == Level::Pt { CHUNK } else { GROUP };
        let (mut left, mut next) = (false, 0);
        let (mut entries02, mut entries12) = ([0; CHUNK], [0; CHUNK]);
        let (entries02, entries12) = (&mut entries02[..chunk], &mut entries12[..chunk]);
        while next < ENTRIES {
            next += self.frames.zeros(Hpa::new(table.get() | (8 * next as u64)), ENTRIES - next);
            if next >= ENTRIES {
                break;
            }
            // The chunk around the first entry that is there.
            let offset = 8 * (next - next % chunk) as u64;
            next += chunk - next % chunk;
            self.frames.read_all(Hpa::new(table.get() | offset), entries02);
            if let Source::Table(table12, _) = source {
                if self.guest.read_entries(Gpa::new(table12.get() | offset), entries12).is_err() {
                    entries12.fill(0);
                }
            }
            let groups = entries02.chunks_exact(GROUP).zip(entries12.chunks_exact(GROUP));
            for (offset, (group02, group12)) in (offset..).step_by(8 * GROUP).zip(groups) {
                if let Source::Table(_, rights) = source {
                    if self.is_unchanged(group02, group12, rights, level) {
                        left = left || group02.iter().any(|entry| entry::is_present(*entry));
                        continue;
                    }
                }
                for (within, (old, entry12)) in (offset..).step_by(8).zip(group02.iter().zip(group12)) {
                    if !entry::is_present(*old) {
                        continue;
                    }
                    let (at, ngpa) = (Hpa::new(table.get() | within), base + (within >> 3) * level.bytes());
                    left |= match source {
                        Source::Table(_, rights)
                            if self.is_unchanged(from_ref(old), from_ref(entry12), rights, level) =>
                        {
                            true
                        }
                        Source::Table(_, rights) => self.entry(at, *old, *entry12, rights, level, ngpa),
                        Source::Page(page) => self.piece(at, *old, &page, level, ngpa),
                    };
                }
            }
        }
        left
    }

    /// True only if `entries02`, out of a table of `level`, are leaves that all say what `entries12` say: without a look at each.
    ///
    /// Where the way to a leaf of ept12 grants all rights, and L2's memory is mapped one to one, that leaf and the one
    /// composed of it have the same bits, apart from those that a processor ignores or sets. Of an entry that is not there
    /// in ept02, but in ept12, the bits differ too: then each is looked at.
    #[inline(always)]
    fn is_unchanged(&self, entries02: &[u64], entries12: &[u64], upper: Rights, level: Level) -> bool {
        if upper != self.rules.all_rights() || level == Level::Pml4 {
            return false;
        }
        let fold = |of: fn(u64, u64) -> u64| entries02.iter().zip(entries12).fold(0, |all, (a, b)| all | of(*a, *b));
        if fold(|e02, e12| e02 ^ e12) & self.rules.leaf_bits(level) != 0 {
            return false;
        }
        // What L2 wrote may look like a reference to a table of nvmx's.
        if level != Level::Pt && fold(|e02, _| entry::present_bit(e02) & !(e02 >> LARGE.trailing_zeros())) & 1 != 0 {
            return false;
        }
        // With flags, what is mapped must be marked accessed, and what can be written must be marked dirty.
        let unmarked = |e02, e12: u64| ((entry::present_bit(e02) * ACCESSED) | ((e02 >> 1 & 1) * DIRTY)) & !e12;
        !self.flags || fold(unmarked) == 0
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
