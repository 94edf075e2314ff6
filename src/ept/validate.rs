//! ept02 after an INVEPT of L2: each leaf is held against ept12 and stays if it still follows from it.
//!
//! INVEPT tells that something in ept12 may have changed, not what; L2 executes it far more often than it changes much.
//! So contents are not thrown away but compared, table by table, the next time the root is used. What ept12 no longer
//! says goes; what it says otherwise is written anew; what is as it was costs one look at each of two entries and no
//! fault of L3.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Operations that Invalidate Cached Mappings" and "Use of the INVEPT
//! Instruction".

use super::cache::{Ept02, Keep, Owner};
use super::entry::{self, ACCESSED, Caching, DIRTY, EptRules, LARGE, Level, Meaning, Rights};
use super::exposed::Exposed;
use super::identity::Ept01;
use super::origin::{FirstRecord, Origin};
use super::{GuestView, TableFrames};
use crate::addr::{Gpa, Hpa};
use arrayvec::ArrayVec;
use core::slice::from_ref;

/// When a table was looked at last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Since {
    /// In the round of watches that still runs.
    SameRound,
    /// In another, or never.
    OtherRound,
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// Holds the contents of a root against ept12: all of them, or with `ept01` those whose tables in ept12 were written. True
    /// if INVEPT is to be executed for ept01 before L2 runs.
    #[cold]
    pub(super) fn validate<G: GuestView, F: TableFrames>(
        &mut self,
        index: usize,
        guest: &G,
        ept01: Option<&mut Ept01>,
        frames: &mut F,
    ) -> bool {
        self.run = None;
        let root = &mut self.roots[index % ROOTS];
        root.stale = false;
        let Some(role) = root.role.filter(|_| root.tables.count > 0) else { return false };
        // L2's INVEPT also concerns what the processor combined from ept02 and L3's own page tables.
        root.invept = true;
        let rules = self.rules.of_role(role);
        // Bit by bit nothing is compared where leaves have bits that are no leaf's of ept12: no way grants these rights.
        let mut all_rights = rules.all_rights();
        if role.sub_pages() {
            all_rights = Rights::from_bits_retain(!0);
            root.drop_sub_pages(Keep::First, &mut self.reserve, frames);
        }
        let watched = self.origins.are_kept() && !root.tables.unrecorded;
        let mut check = Check {
            rules: &rules,
            all_rights,
            flags: role.accessed_dirty(),
            guest,
            ept01: ept01.filter(|_| watched),
            exposed: &mut self.exposed,
            splits: &mut self.splits,
            frames,
            owner: Owner { tables: &mut root.tables, origins: &mut self.origins, reserve: &mut self.reserve },
            invept01: false,
        };
        if check.ept01.is_none() {
            check.table(root.table, role.top(), 0, TableSource::Table(role.guest_root(), rules.all_rights()));
        } else {
            let mut changed = Changed::default();
            check.find_changed(&mut root.known, &mut changed);
            check.all_marked(root.table, &changed);
        }
        check.invept01
    }
}

/// What a table of ept02 was composed of.
#[derive(Clone, Copy)]
enum TableSource {
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
    /// Below entries that grant these, leaves of ept12 and of ept02 have the same bits.
    all_rights: Rights,
    /// ept12 has accessed and dirty flags.
    flags: bool,
    guest: &'a G,
    /// Where writes of ept12 leave a mark; without it all is compared.
    ept01: Option<&'a mut Ept01>,
    exposed: &'a mut Exposed,
    /// Tables by which ept01 may still grow.
    splits: &'a mut u32,
    frames: &'a mut F,
    owner: Owner<'a, N>,
    invept01: bool,
}

/// From `place` on, the first record of the list whose watch does not say that nothing was written.
#[inline(always)]
fn first_unclean<F: TableFrames>(place: FirstRecord, frames: &F) -> Option<FirstRecord> {
    let mut place = place;
    loop {
        let (watch, next) = place.unmarked_watch_and_next(frames);
        if !watch.is_some_and(|watch| watch.is_clean(frames)) {
            return Some(place);
        }
        place = next?;
    }
}

/// Tables that must be looked at, those above before those below; or too many to say.
#[derive(Default)]
struct Changed {
    found: ArrayVec<(FirstRecord, Level), 64>,
    more: bool,
}

/// Entries of a table.
const ENTRIES: usize = 512;
/// Entries of a table of pages that are read in one go.
const CHUNK: usize = 64;
/// Entries that are compared in one go; in a group with one that changed each is looked at.
const GROUP: usize = 16;

impl<G: GuestView, F: TableFrames, const N: usize> Check<'_, G, F, N> {
    /// Marks the tables whose origin was written or cannot be watched. `known` is what the watches of this root know of rounds
    /// and of what is exposed.
    fn find_changed(&mut self, known: &mut (u64, u64), changed: &mut Changed) {
        let round = |check: &Self| check.ept01.as_ref().map_or(0, |ept01| ept01.round());
        let at_first = round(self);
        let same_exposed = known.1 == self.exposed.growths();
        for level in Level::DOWN {
            let mut next = self.owner.tables.first(level);
            while let Some(mut place) = next {
                // Taking a mark may begin another round.
                if same_exposed && round(self) == known.0 {
                    match first_unclean(place, self.frames) {
                        Some(unclean) => place = unclean,
                        None => break,
                    }
                }
                let record = self.owner.origins.number(place, self.frames);
                if self.look_again(record, if round(self) == known.0 { Since::SameRound } else { Since::OtherRound }) {
                    changed.more |= changed.found.try_push((place, level)).is_err();
                }
                next = place.next(self.frames);
            }
        }
        *known = (at_first, self.exposed.growths());
    }

    /// A table that a look at its watch did not clear: true if it must be looked at.
    #[cold]
    fn look_again(&mut self, record: u16, since: Since) -> bool {
        // Others than a table of ept12 are found by the table above.
        let Some(page) = self.owner.origins.origin(record, self.frames).page() else { return false };
        let watch = self.owner.origins.watch(record, self.frames).filter(|_| since == Since::SameRound);
        let is_clean = watch.is_some_and(|watch| watch.is_clean(self.frames));
        if is_clean && !self.exposed.contains(page.get(), self.frames) {
            return self.owner.origins.is_marked(record, self.frames);
        }
        self.owner.origins.mark(record, self.frames);
        self.watch(record, since);
        true
    }

    /// Watches the origin of a table from now on, before it is read.
    fn watch(&mut self, record: u16, since: Since) {
        let Some(ept01) = self.ept01.as_deref_mut() else { return };
        let Some(page) = self.owner.origins.origin(record, self.frames).page() else { return };
        let old = self.owner.origins.watch(record, self.frames).filter(|_| since == Since::SameRound);
        let new = if self.exposed.contains(page.get(), self.frames) {
            None
        } else if let Some(old) = old {
            let (new, cleared) = ept01.watch_again(old, self.frames);
            self.invept01 |= cleared;
            Some(new)
        } else if *self.splits > 0 {
            let before = ept01.tables();
            let new = ept01.watch(page, self.frames).ok();
            *self.splits = self.splits.saturating_sub(ept01.tables() - before);
            self.invept01 = true;
            new
        } else {
            None
        };
        self.owner.origins.set_watch(record, new, self.frames);
    }

    /// Looks at every table that is marked, those above before those below.
    fn all_marked(&mut self, root: Hpa, changed: &Changed) {
        for &(place, level) in &changed.found {
            // A look at one above may have taken it away.
            if place.is_marked(self.frames) {
                self.marked(self.owner.origins.number(place, self.frames), level, root);
            }
        }
        if changed.more {
            self.all_lists(root);
        }
    }

    #[cold]
    fn all_lists(&mut self, root: Hpa) {
        for level in Level::DOWN {
            let mut next = self.owner.tables.first(level);
            while let Some(place) = next {
                // What a look takes away lies below, or is this table, or is above it.
                next = place.next(self.frames);
                if place.is_marked(self.frames) {
                    self.marked(self.owner.origins.number(place, self.frames), level, root);
                }
            }
        }
    }

    fn marked(&mut self, record: u16, level: Level, root: Hpa) {
        let origins = &mut self.owner.origins;
        let origin = origins.origin(record, self.frames);
        let Some(page) = origin.page() else { return };
        origins.unmark(record, self.frames);
        let (base, entry) = (origins.base(record, self.frames), origins.entry(record, self.frames));
        let table = entry.map_or(root, |entry| Hpa::new(self.frames.read(entry) & entry::ADDRESS));
        if !self.table(table, level, base, TableSource::Table(page, origin.rights())) {
            self.take_empty(record);
        }
    }

    /// A table is empty: it goes, and so does each above it that is empty then, but for the root.
    #[cold]
    fn take_empty(&mut self, record: u16) {
        let mut record = record;
        for above in [Level::Pd, Level::Pdpt, Level::Pml4, Level::Pml5] {
            let Some(entry) = self.owner.origins.entry(record, self.frames) else { return };
            let next = self.owner.origins.above(record, self.frames);
            let old = self.frames.read(entry);
            self.frames.write(entry, 0);
            self.owner.free(old, above, self.frames);
            if self.frames.zeros(entry.page(), ENTRIES) < ENTRIES {
                return;
            }
            record = next;
        }
    }

    /// Compares a table of ept02 for the addresses from `base` on, and tells whether anything is left in it.
    fn table(&mut self, table: Hpa, level: Level, base: u64, source: TableSource) -> bool {
        // The level is a constant in each.
        match level {
            Level::Pt => self.scan(table, Level::Pt, base, source),
            Level::Pd => self.scan(table, Level::Pd, base, source),
            Level::Pdpt => self.scan(table, Level::Pdpt, base, source),
            Level::Pml4 => self.scan(table, Level::Pml4, base, source),
            Level::Pml5 => self.scan(table, Level::Pml5, base, source),
        }
    }

    /// Compares a table of pages where most entries are as L2 wrote them, bit by bit: one string instruction over what is
    /// equal. Tells how far it came, and whether anything is left in what it looked at.
    ///
    /// Equal entries of a page table say the same where the way there grants all rights, see `is_unchanged`. Where L2 sets bits
    /// that the processor ignores no entry is equal, and this gives up.
    fn scan_equal(&mut self, table: Hpa, base: u64, table12: Gpa) -> (usize, bool) {
        /// Entries that differ and say the same, before this gives up.
        const PATIENCE: usize = 4;
        let rights = self.all_rights;
        let at = |next: usize| Hpa::new(table.get() | (8 * next as u64));
        let (mut next, mut left, mut in_vain) = (0, false, 0);
        while next < ENTRIES && in_vain < PATIENCE {
            next += self.guest.equal_words(
                Gpa::new(table12.get() | (8 * next as u64)),
                self.frames,
                at(next),
                ENTRIES - next,
            );
            if next >= ENTRIES {
                break;
            }
            let old = self.frames.read(at(next));
            if entry::is_present(old) {
                let entry12 = self.guest.read_entry(Gpa::new(table12.get() | (8 * next as u64))).unwrap_or(0);
                if self.is_unchanged(from_ref(&old), from_ref(&entry12), rights, Level::Pt) {
                    left = true;
                    in_vain += 1;
                } else {
                    left |= self.entry(at(next), old, entry12, rights, Level::Pt, base + ((next as u64) << 12));
                }
            } else {
                in_vain += 1;
            }
            next += 1;
        }
        // Nothing is known of those that were equal.
        left = left || self.frames.zeros(table, next) < next;
        (next, left)
    }

    #[inline(always)]
    fn scan(&mut self, table: Hpa, level: Level, base: u64, source: TableSource) -> bool {
        // Tables of pages are full, those above them nearly empty.
        let chunk = if level == Level::Pt { CHUNK } else { GROUP };
        let (mut left, mut next) = (false, 0);
        if let (TableSource::Table(table12, rights), Level::Pt, false) = (source, level, self.flags) {
            if rights == self.all_rights {
                (next, left) = self.scan_equal(table, base, table12);
                if next >= ENTRIES {
                    return left;
                }
            }
        }
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
            if let TableSource::Table(table12, _) = source {
                if self.guest.read_entries(Gpa::new(table12.get() | offset), entries12).is_err() {
                    entries12.fill(0);
                }
            }
            let groups = entries02.chunks_exact(GROUP).zip(entries12.chunks_exact(GROUP));
            for (offset, (group02, group12)) in (offset..).step_by(8 * GROUP).zip(groups) {
                if let TableSource::Table(_, rights) = source {
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
                        TableSource::Table(_, rights)
                            if self.is_unchanged(from_ref(old), from_ref(entry12), rights, level) =>
                        {
                            true
                        }
                        TableSource::Table(_, rights) => self.entry(at, *old, *entry12, rights, level, ngpa),
                        TableSource::Page(page) => self.piece(at, *old, &page, level, ngpa),
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
        if upper != self.all_rights || level >= Level::Pml4 {
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
                self.subtree(at, old, level, ngpa, TableSource::Table(Gpa::new(next), rights))
            }
            _ => self.drop(at, old, level),
        }
    }

    /// Compares an entry for a page of ept12, or for a part of one.
    #[inline(always)]
    fn piece(&mut self, at: Hpa, old: u64, page: &Page, level: Level, ngpa: u64) -> bool {
        if !entry::is_leaf(old, level) {
            return self.subtree(at, old, level, ngpa, TableSource::Page(*page));
        }
        let gpa = Gpa::new(page.at.get() | page.level.offset(ngpa));
        let Ok(block) = self.guest.block(gpa, page.level) else { return self.drop(at, old, level) };
        let rights = page.rights & block.rights;
        if block.level != level || rights.is_empty() {
            return self.drop(at, old, level);
        }
        let new = entry::leaf_entry(block.hpa, level, rights, page.caching);
        if !entry::is_same(old, new) {
            if rights.contains(Rights::WRITE) {
                match level {
                    Level::Pt => self.exposed.add_page(block.hpa.get(), self.frames),
                    _ => self.exposed.add(block.hpa.get(), level.bytes(), self.frames),
                }
            }
            self.frames.write(at, new);
        }
        true
    }

    /// Compares a table below; one that is empty afterwards goes.
    fn subtree(&mut self, at: Hpa, old: u64, level: Level, ngpa: u64, source: TableSource) -> bool {
        let record = entry::number(old);
        if record != 0 && self.is_still(record, source) {
            return true;
        }
        let child = Hpa::new(old & entry::ADDRESS);
        let stays = level.below().is_some_and(|below| self.table(child, below, ngpa, source));
        stays || self.drop(at, old, level)
    }

    /// Takes out an entry, and the tables below it.
    #[cold]
    fn drop(&mut self, at: Hpa, old: u64, level: Level) -> bool {
        self.frames.write(at, 0);
        if !entry::is_leaf(old, level) {
            self.owner.free(old, level, self.frames);
        }
        false
    }

    /// True if the origin of a table is what its record says, and the record is enough; else it is noted.
    fn is_still(&mut self, record: u16, source: TableSource) -> bool {
        let origin = match source {
            TableSource::Table(table, rights) => Origin::table(table, rights),
            TableSource::Page(_) => Origin::PIECES,
        };
        let same = self.owner.origins.origin(record, self.frames) == origin;
        if !same {
            self.owner.origins.set_origin(record, origin, self.frames);
        }
        if self.ept01.is_none() || origin == Origin::PIECES {
            return false;
        }
        if !same {
            self.owner.origins.unmark(record, self.frames);
            // Without a watch there is no round that it could be of.
            self.watch(record, Since::OtherRound);
        }
        same
    }
}
