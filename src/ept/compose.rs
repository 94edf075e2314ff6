//! Composing ept02, one leaf at a time, when L3 faults.
//!
//! leaf of ept02 = leaf of ept12, its address translated by ept01; rights are ANDed, the page is the smaller of the
//! two. The memory type and "ignore PAT" are ept12's alone: on the bare machine too, a guest under EPT gets its type
//! from EPT and PAT while the MTRRs, which are what ept01 stands in for, have no say.
//!
//! With accessed and dirty flags in ept12 they are set first, and a page that is not dirty is composed without the right
//! to write: see [`flags`](super::flags).
//!
//! ept12 is walked afresh, each entry fetched once, since L2 may change it at any moment without a trap; only the way to
//! the page table of the last fill is remembered, in `ept::run`. Rights stand in the leaves of ept02; its upper entries grant everything.
//!
//! Source: Intel SDM vol. 3C (December 2024), "EPT Violations", "EPT Misconfigurations", "EPT and Memory Typing",
//! "Operations that Invalidate Cached Mappings" (a violation drops what is cached for its address), "Guidelines for Use
//! of the INVEPT Instruction".

use super::cache::{Ept02, Owner};
use super::entry::{self, Level, Rights};
use super::eptp::Eptp;
use super::flags::{Marked, PageLog, Path, Way};
use super::origin::Origin;
use super::run::Run;
use super::violation::Qualification;
use super::walk::{Leaf, Walk, walk};
use super::{GuestView, NotOwned, OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa, Ngpa};

/// What an EPT violation of L3 comes to.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// ept02 has the page now, or L2 changed ept12 while it was looked at: enter L3 again, through [`Ept02::activate`].
    Filled,
    /// ept12 does not allow the access: L2 sees an EPT violation.
    ReflectViolation {
        /// What it is told.
        qualification: Qualification,
        /// The entry that maps the page, or is not present, does not keep the violation from becoming a #VE.
        convertible: bool,
    },
    /// ept12 is misconfigured for this address: L2 sees an EPT misconfiguration. A table of ept12 where L2 owns no
    /// memory is one, too: on the machine that L2 sees nothing answers there, and all ones is not a valid entry.
    ReflectMisconfig,
    /// L2's table of sub-page write permissions has nothing for the page, or is wrong: L2 sees an SPP-related event.
    ReflectSubPageEvent {
        /// What it is told.
        qualification: Qualification,
    },
    /// A flag has to be set in ept12 and the page-modification log is full: L2 sees that.
    ReflectLogFull,
    /// ept12 leads to memory that L2 does not own. Nothing was mapped.
    Forbidden {
        /// The address that L3 would have reached.
        gpa: Gpa,
    },
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// Handles an EPT violation of L3 at `ngpa` under `eptp12`. `qualification` is the hardware's; `log` is L2's
    /// page-modification log, if it keeps one.
    #[inline(never)] // Whoever continues a run does without.
    pub fn violation<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        mut log: Option<&mut PageLog>,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        let access = qualification.access_in(eptp12.mode_based());
        let mut path = Path::new(guest);
        if let Some(run) = &mut self.run {
            run.lose_way();
        }
        let rules = self.rules.of_role(eptp12);
        let walk = walk(&mut path, eptp12.root(), ngpa.get(), &rules);
        let mut reached = self.reached(walk, access, qualification, path.last());
        if let (true, Ok(leaf)) = (eptp12.accessed_dirty(), reached) {
            reached = Self::mark(leaf, ngpa, access, log.as_deref_mut(), &path);
        }
        let mut outcome = match reached {
            Ok(leaf) if leaf.level == Level::Pt => {
                self.fill(eptp12, ngpa, (leaf, path.way()), Level::Pt, access, guest, frames)
            }
            Ok(leaf) => self.fill_large(eptp12, ngpa, leaf, access, guest, frames),
            Err(outcome) => outcome,
        };
        if outcome != Outcome::Filled {
            if eptp12.sub_pages() {
                outcome = self.refused_by_page(eptp12, ngpa, qualification, outcome, log, guest, frames);
            }
            if outcome != Outcome::Filled {
                self.forget_page(eptp12, ngpa, frames);
            }
        }
        outcome
    }

    /// L2 goes on with L3 behind a violation at `ngpa` that it saw: the page that it has mapped there now is filled if the
    /// access is allowed, so that it does not fault again. A processor may cache a translation at any time
    /// (SDM vol. 3C, "Information That May Be Cached"); flags of ept12 that are not set yet are left to the access itself.
    ///
    /// To be followed by [`Ept02::activate`] if it answers true.
    #[inline(never)]
    pub fn fill_expected<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        guest: &G,
        frames: &mut F,
    ) -> bool {
        let access = qualification.access_in(eptp12.mode_based());
        let mut path = Path::new(guest);
        if self.fill_found_again(eptp12, ngpa, access, &mut path, guest, frames) {
            return true;
        }
        let rules = self.rules.of_role(eptp12);
        let walk = walk(path.again(), eptp12.root(), ngpa.get(), &rules);
        let Some(mut leaf) = walk.leaf() else { return false };
        if eptp12.accessed_dirty() {
            // No flag may be to be set for a load, and a clean page is not writable.
            let Some(dirty) = path.marked() else { return false };
            leaf.rights.set(Rights::WRITE, dirty && leaf.rights.contains(Rights::WRITE));
        }
        let outcome = if !leaf.rights.contains(access) {
            return false;
        } else if leaf.level == Level::Pt {
            self.fill(eptp12, ngpa, (leaf, path.way()), Level::Pt, access, guest, frames)
        } else {
            self.fill_large(eptp12, ngpa, leaf, access, guest, frames)
        };
        outcome == Outcome::Filled
    }

    /// The page that an access reaches, or what becomes of the access; `entry` is the last of the walk.
    #[inline(always)]
    fn reached(
        &self,
        walk: Walk<Gpa, NotOwned>,
        access: Rights,
        qualification: Qualification,
        entry: u64,
    ) -> Result<Leaf<Gpa>, Outcome> {
        match walk {
            Walk::Leaf(leaf) if leaf.rights.contains(access) => Ok(leaf),
            Walk::Leaf(leaf) => Err(self.refused(leaf.rights, qualification, entry)),
            Walk::NotPresent(_) => Err(self.refused(Rights::empty(), qualification, entry)),
            Walk::Misconfigured(..) | Walk::Unreadable(_) => Err(Outcome::ReflectMisconfig),
        }
    }

    /// A violation that L2 sees; `entry` is the last of the walk.
    #[inline(always)]
    pub(super) fn refused(&self, rights: Rights, qualification: Qualification, entry: u64) -> Outcome {
        let qualification = qualification.reflected(rights, self.advanced_information);
        Outcome::ReflectViolation { qualification, convertible: entry & entry::SUPPRESS_VE == 0 }
    }

    /// The access reaches a page in an ept12 with accessed and dirty flags: they are set, and a clean page is not writable.
    #[inline(never)]
    fn mark<G: GuestView>(
        mut leaf: Leaf<Gpa>,
        ngpa: Ngpa,
        access: Rights,
        log: Option<&mut PageLog>,
        path: &Path<'_, G>,
    ) -> Result<Leaf<Gpa>, Outcome> {
        match path.mark(ngpa, access, log) {
            Marked::Done { dirty } => leaf.rights.set(Rights::WRITE, dirty && leaf.rights.contains(Rights::WRITE)),
            Marked::LogFull => return Err(Outcome::ReflectLogFull),
            // As a processor walks again when the entry that it wants to mark has changed.
            Marked::Changed => return Err(Outcome::Filled),
        }
        Ok(leaf)
    }

    #[inline(never)]
    fn fill_large<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        leaf: Leaf<Gpa>,
        access: Rights,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        self.fill(eptp12, ngpa, (leaf, None), leaf.level, access, guest, frames)
    }

    /// Composes the leaf of ept12 at `level`, found by `way`, with ept01 and writes what comes out. Called with a constant level for small
    /// pages, where it melts down to little.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn fill<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        (leaf, way): (Leaf<Gpa>, Option<Way>),
        level: Level,
        access: Rights,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        let gpa = Gpa::new(leaf.page.get() | level.offset(ngpa.get()));
        let Ok(block) = guest.block(gpa, level) else {
            return Outcome::Forbidden { gpa };
        };
        let rights = leaf.rights & block.rights;
        if !rights.contains(access) {
            return Outcome::Forbidden { gpa };
        }
        let composed = entry::leaf_entry(block.hpa, block.level, rights, leaf.caching);
        let index = self.enter(eptp12, guest, frames);
        self.stats.fills += 1;
        let origin = Origin::table(leaf.entry, leaf.upper);
        if level == Level::Pt {
            if rights.contains(Rights::WRITE) {
                self.exposed.add_page(block.hpa.get(), frames);
            }
            if let Some(table) = self.run.as_ref().and_then(|run| run.table02(eptp12, ngpa, origin)) {
                self.put(index, table, Level::Pt, ngpa, composed, frames);
                if let Some(run) = &mut self.run {
                    run.set_way(way);
                    run.go_on(ngpa);
                }
                return Outcome::Filled;
            }
            let table = self.install_with_room(index, ngpa, Level::Pt, composed, origin, frames);
            // A run asks for the rights of plain entries.
            let plain = table.filter(|_| !eptp12.mode_based());
            self.run = plain.map(|table| Run::new(eptp12, ngpa, &leaf, way, table, self.run.as_ref()));
        } else {
            if rights.contains(Rights::WRITE) {
                self.exposed.add(block.hpa.get(), block.level.bytes(), frames);
            }
            let origin = if block.level == level { origin } else { Origin::UNKNOWN };
            self.install_with_room(index, ngpa, block.level, composed, origin, frames);
        }
        Outcome::Filled
    }

    /// Writes a leaf, making room until its tables fit, and returns the table it is in. Each attempt starts at the root: making room may free any table.
    #[inline(never)]
    pub(super) fn install_with_room<F: TableFrames>(
        &mut self,
        index: usize,
        ngpa: Ngpa,
        target: Level,
        leaf: u64,
        origin: Origin,
        frames: &mut F,
    ) -> Option<Hpa> {
        // The other roots are emptied, and then the current one; after that the reserve suffices.
        for _ in 0..=ROOTS {
            if let Ok(table) = self.install(index, ngpa, target, leaf, origin, frames) {
                return Some(table);
            }
            self.make_room(frames);
        }
        None
    }

    /// Writes a leaf into a table of `target`, which it returns, and the tables above it that are missing.
    #[inline]
    fn install<F: TableFrames>(
        &mut self,
        index: usize,
        ngpa: Ngpa,
        target: Level,
        leaf: u64,
        origin: Origin,
        frames: &mut F,
    ) -> Result<Hpa, OutOfFrames> {
        // Step by step rather than in a loop: the level is a constant in each.
        let root = &self.roots[index % ROOTS];
        let (mut pml4, top) = ((root.table, root.record), root.top());
        if top == Level::Pml5 {
            pml4 = self.descend_from_fifth_level(index, pml4, ngpa, frames)?;
        }
        let pdpt = self.descend(index, pml4, Level::Pml4, ngpa, frames)?;
        if target == Level::Pdpt {
            return Ok(self.put_new(index, pdpt, Level::Pdpt, ngpa, leaf, origin, frames));
        }
        let pd = self.descend(index, pdpt, Level::Pdpt, ngpa, frames)?;
        if target == Level::Pd {
            return Ok(self.put_new(index, pd, Level::Pd, ngpa, leaf, origin, frames));
        }
        let pt = self.descend(index, pd, Level::Pd, ngpa, frames)?;
        Ok(self.put_new(index, pt, Level::Pt, ngpa, leaf, origin, frames))
    }

    #[cold]
    #[inline(never)]
    fn descend_from_fifth_level<F: TableFrames>(
        &mut self,
        index: usize,
        pml5: (Hpa, u16),
        ngpa: Ngpa,
        frames: &mut F,
    ) -> Result<(Hpa, u16), OutOfFrames> {
        self.descend(index, pml5, Level::Pml5, ngpa, frames)
    }

    /// Writes a leaf into a table, whose record learns where it comes from.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn put_new<F: TableFrames>(
        &mut self,
        index: usize,
        (table, record): (Hpa, u16),
        level: Level,
        ngpa: Ngpa,
        leaf: u64,
        origin: Origin,
        frames: &mut F,
    ) -> Hpa {
        self.origins.filled(record, origin, frames);
        self.put(index, table, level, ngpa, leaf, frames);
        table
    }

    /// The table below `table` on the way to `ngpa`, made if there is none, and its record.
    #[inline(always)]
    fn descend<F: TableFrames>(
        &mut self,
        index: usize,
        (table, record): (Hpa, u16),
        level: Level,
        ngpa: Ngpa,
        frames: &mut F,
    ) -> Result<(Hpa, u16), OutOfFrames> {
        let at = Hpa::new(table.get() | level.entry_offset(ngpa.get()));
        let old = frames.read(at);
        if entry::is_own_table(old) {
            return Ok((Hpa::new(old & entry::ADDRESS), entry::number(old)));
        }
        self.grow(index, at, old, level, ngpa, record, frames)
    }

    /// Writes the leaf of `ngpa` into its table.
    #[inline(always)]
    fn put<F: TableFrames>(&mut self, index: usize, table: Hpa, level: Level, ngpa: Ngpa, leaf: u64, frames: &mut F) {
        let at = Hpa::new(table.get() | level.entry_offset(ngpa.get()));
        let old = frames.read(at);
        frames.write(at, leaf);
        if entry::is_present(old) && !entry::is_upgrade(old, leaf) {
            self.replaced(index, level, old, frames);
        }
    }

    /// Hangs an empty table into the entry at `at`, which was `old`.
    #[cold]
    #[allow(clippy::too_many_arguments)]
    fn grow<F: TableFrames>(
        &mut self,
        index: usize,
        at: Hpa,
        old: u64,
        level: Level,
        ngpa: Ngpa,
        above: u16,
        frames: &mut F,
    ) -> Result<(Hpa, u16), OutOfFrames> {
        let table = self.reserve.alloc(frames).ok_or(OutOfFrames)?;
        let root = &mut self.roots[index % ROOTS];
        let base = ngpa.get() & !(level.bytes() - 1);
        let below = level.below().unwrap_or(Level::Pt);
        let record = self.origins.add(&mut root.tables, below, base, at, above, frames);
        self.origins.mark_finder(above, frames);
        frames.write(at, entry::with_number(entry::table_entry(table), record));
        root.tables.count += 1;
        // A large page gives way to a table: the rest of it faults in again.
        root.invept |= entry::is_present(old);
        Ok((table, record))
    }

    /// A present entry of a table of `level` is gone: so is what hung in it.
    #[cold]
    fn replaced<F: TableFrames>(&mut self, index: usize, level: Level, old: u64, frames: &mut F) {
        self.run = None;
        let root = &mut self.roots[index % ROOTS];
        root.invept = true;
        if !entry::is_leaf(old, level) {
            let mut owner = Owner { tables: &mut root.tables, origins: &mut self.origins, reserve: &mut self.reserve };
            owner.free(old, level, frames);
        }
    }
}
