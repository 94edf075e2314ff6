//! Runs of faults: pages of 4 KiB that lie next to each other fault one after the other, in one page table of ept12
//! and one of ept02. Whoever knows both need not walk to them.
//!
//! Where L3 goes from page to page the run goes ahead: pages behind the one that faulted are filled with it, two, four, up to [`MOST_AHEAD`], as
//! long as they are there in ept12 and no flag would have to be set for them
//! ([ADR 0022](../../docs/adr/0022-filled-before-it-faults.md)).
//!
//! A run is the counterpart of a processor's paging-structure cache: it remembers the way to a page table of ept12, not
//! what stands in it, and only as long as a processor may. L2's INVEPT ends it, and each violation that it does
//! not resolve has the way lost. Then ept12 is walked from its root again; that is three comparisons where the entries above the
//! page table are what they were.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Information That May Be Cached" (guest-physical paging-structure-cache
//! entries, with the rights of all entries on the way), "Operations that Invalidate Cached Mappings", "Guidelines for
//! Use of the INVEPT Instruction".

use super::cache::Ept02;
use super::compose::Outcome;
use super::entry::{self, ACCESSED, DIRTY, Level, Meaning, Rights};
use super::eptp::Eptp;
use super::flags::{Path, Way};
use super::origin::Origin;
use super::violation::Qualification;
use super::walk::Leaf;
use super::{GuestView, TableFrames};
use crate::addr::{Gpa, Hpa, Ngpa, PAGE_SIZE};

/// Pages that are filled beside the one that faulted, at most.
const MOST_AHEAD: u64 = 16;

/// Where the last fill was.
#[derive(Debug)]
pub(super) struct Run {
    /// The role of the root.
    eptp12: Eptp,
    /// What the page tables serve: bits 63:21 of an address.
    region: u64,
    /// The page table of ept12.
    table12: Gpa,
    /// The entries above it.
    way: Option<Way>,
    /// The rights that they grant together; none once the way must be found again.
    rights: Rights,
    /// The page table of ept02, and what it is composed of: the same rights among it.
    table02: Hpa,
    origin: Origin,
    /// The page behind the last one that was filled: its number among all pages.
    next: u64,
    /// Pages that were filled ahead of the last fault; more if the next one is at `next`.
    ahead: u64,
}

impl Run {
    /// Starts at a leaf of ept12 for a 4 KiB page whose counterpart stands in `table02`; it goes on where the one `before` came to its end.
    pub(super) fn new(
        eptp12: Eptp,
        ngpa: Ngpa,
        leaf: &Leaf<Gpa>,
        way: Option<Way>,
        table02: Hpa,
        before: Option<&Self>,
    ) -> Self {
        let page = ngpa.get() >> 12;
        let goes_on = |run: &&Self| run.eptp12 == eptp12 && run.next == page;
        Self {
            eptp12,
            region: ngpa.get() >> 21,
            table12: leaf.entry.page(),
            way,
            rights: leaf.upper,
            table02,
            origin: Origin::table(leaf.entry, leaf.upper),
            next: page + 1,
            ahead: before.filter(goes_on).map_or(0, |run| run.ahead),
        }
    }

    /// A walk of ept12 comes to the same page table by the same entries. If not, `path` knows what was read.
    #[inline(always)]
    fn stands<G: GuestView>(&self, guest: &G, path: &mut Path<'_, G>) -> bool {
        let Some(way) = &self.way else { return false };
        for (n, (at, entry)) in way.iter().enumerate() {
            match guest.read_entry(*at) {
                Ok(now) if now == *entry => {}
                other => {
                    path.has_read(&way[..n], other.ok().map(|now| (*at, now)));
                    return false;
                }
            }
        }
        true
    }

    /// `path` knows the entries of the way, which were read, and then this one.
    #[cold]
    fn was_found<G: GuestView>(&self, path: &mut Path<'_, G>, then: Option<(Gpa, u64)>) {
        if let Some(way) = &self.way {
            path.has_read(way, then);
        }
    }

    /// The page of this entry is marked accessed on the whole way.
    fn is_accessed(&self, entry12: u64) -> bool {
        self.way.iter().flatten().all(|(_, entry)| entry & ACCESSED != 0) && entry12 & ACCESSED != 0
    }

    /// The entry at `offset` in the page table of ept12, and where it lies.
    #[inline(always)]
    fn entry12<G: GuestView>(&self, offset: u64, guest: &G) -> Option<(Gpa, u64)> {
        let at = Gpa::new(self.table12.get() | offset);
        Some((at, guest.read_entry(at).ok()?))
    }

    /// It goes on with a page that was filled.
    #[inline(always)]
    pub(super) fn go_on(&mut self, ngpa: Ngpa) {
        let page = ngpa.get() >> 12;
        if self.next != page {
            self.ahead = 0;
        }
        (self.next, self.rights) = (page + 1, self.origin.rights());
    }

    /// The way was found anew.
    #[inline(always)]
    pub(super) const fn set_way(&mut self, way: Option<Way>) {
        self.way = way;
    }

    /// The page table of ept02 for an address, if this is it and it is still composed of the same.
    #[inline(always)]
    pub(super) fn table02(&self, eptp12: Eptp, ngpa: Ngpa, origin: Origin) -> Option<Hpa> {
        (self.serves(eptp12, ngpa) && self.origin == origin).then_some(self.table02)
    }

    #[inline(always)]
    fn serves(&self, eptp12: Eptp, ngpa: Ngpa) -> bool {
        self.eptp12 == eptp12 && self.region == ngpa.get() >> 21
    }

    /// Forgets the way to the page table of ept12.
    #[inline(always)]
    pub(super) const fn lose_way(&mut self) {
        self.rights = Rights::empty();
    }
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// Handles an EPT violation of L3 if it goes on where the last fill was: both page tables allow it, and L3 can be
    /// entered again as it was, or there is no page in that of ept12, to which a walk still comes, and L2 sees that. Otherwise nothing
    /// happened, and [`Ept02::violation`] is to be asked.
    #[inline(always)]
    pub fn refill<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        guest: &G,
        frames: &mut F,
    ) -> Option<Outcome> {
        let access = qualification.access();
        let run = self.run.as_ref().filter(|run| run.rights.contains(access) && run.serves(eptp12, ngpa))?;
        let page = ngpa.get() >> 12;
        let (goes_on, ahead, rights) = (run.next == page, run.ahead, run.rights);
        let offset = Level::Pt.entry_offset(ngpa.get());
        let (_, entry12) = run.entry12(offset, guest)?;
        if !Rights::of(entry12).intersects(Rights::RWX) {
            return self.not_present_in_run(eptp12, ngpa, qualification, entry12, guest, frames);
        }
        if !self.put_in_run(entry12, rights, offset, access, guest, frames) {
            return None;
        }
        self.stats.fills += 1;
        let more = if goes_on { self.fill_ahead((2 * ahead).clamp(1, MOST_AHEAD), offset, guest, frames) } else { 0 };
        if let Some(run) = &mut self.run {
            (run.next, run.ahead) = (page + 1 + more, more);
        }
        Some(Outcome::Filled)
    }

    /// The run's page table of ept12 has nothing for the page, as `entry12` says: L2 sees a violation, if a walk comes there.
    #[inline(never)]
    fn not_present_in_run<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        entry12: u64,
        guest: &G,
        frames: &mut F,
    ) -> Option<Outcome> {
        let run = self.run.as_mut().filter(|run| run.stands(guest, &mut Path::new(guest)))?;
        run.lose_way();
        let entry02 = Hpa::new(run.table02.get() | Level::Pt.entry_offset(ngpa.get()));
        self.forget_in_table(eptp12, ngpa, entry02, frames);
        Some(self.refused(Rights::empty(), qualification, entry12))
    }

    /// Fills at most so many pages behind the one at `offset`, within its table; answers how many.
    #[inline(never)]
    fn fill_ahead<G: GuestView, F: TableFrames>(&mut self, most: u64, offset: u64, guest: &G, frames: &mut F) -> u64 {
        let left = (PAGE_SIZE - 8 - offset) / 8;
        let most = most.min(left);
        (1..=most).find(|n| !self.fill_in_run(offset + 8 * n, Rights::empty(), guest, frames)).map_or(most, |n| n - 1)
    }

    /// [`Ept02::fill_expected`] where a walk comes to the run's page table. False if nothing was written, and `path` knows what was read.
    #[inline(always)]
    pub(super) fn fill_found_again<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        access: Rights,
        path: &mut Path<'_, G>,
        guest: &G,
        frames: &mut F,
    ) -> bool {
        let Some(run) = &self.run else { return false };
        if !run.serves(eptp12, ngpa) || !run.stands(guest, path) {
            return false;
        }
        let (rights, offset) = (run.origin.rights(), Level::Pt.entry_offset(ngpa.get()));
        let Some((at, entry12)) = run.entry12(offset, guest) else {
            run.was_found(path, None);
            return false;
        };
        if eptp12.accessed_dirty() && !run.is_accessed(entry12)
            || !self.put_in_run(entry12, rights, offset, access, guest, frames)
        {
            if let Some(run) = &self.run {
                run.was_found(path, Some((at, entry12)));
            }
            return false;
        }
        self.stats.fills += 1;
        if let Some(run) = &mut self.run {
            run.go_on(ngpa);
        }
        true
    }

    /// Composes the leaf at `offset` in the page tables of the run, if it allows the access. False if nothing was written.
    #[inline(always)]
    fn fill_in_run<G: GuestView, F: TableFrames>(
        &mut self,
        offset: u64,
        access: Rights,
        guest: &G,
        frames: &mut F,
    ) -> bool {
        let Some(run) = &self.run else { return false };
        let rights = run.rights;
        let Some((_, entry12)) = run.entry12(offset, guest) else { return false };
        self.put_in_run(entry12, rights, offset, access, guest, frames)
    }

    /// The same, of this entry of ept12, below others that grant these rights.
    #[inline(always)]
    fn put_in_run<G: GuestView, F: TableFrames>(
        &mut self,
        entry12: u64,
        upper: Rights,
        offset: u64,
        access: Rights,
        guest: &G,
        frames: &mut F,
    ) -> bool {
        let Some(run) = &self.run else { return false };
        let Meaning::Leaf { address, caching } = entry::decode(entry12, Level::Pt, &self.rules) else { return false };
        let Ok(block) = guest.block(Gpa::new(address), Level::Pt) else { return false };
        let rights = upper & Rights::of(entry12) & block.rights;
        // Who has flags to set walks; a dirty page has none.
        if run.eptp12.accessed_dirty() && entry12 & (ACCESSED | DIRTY) != ACCESSED | DIRTY {
            return false;
        }
        if !rights.contains(access) || rights.is_empty() {
            return false;
        }
        let entry02 = Hpa::new(run.table02.get() | offset);
        let (old, new) = (frames.read(entry02), entry::leaf_entry(block.hpa, Level::Pt, rights, caching));
        // What is there already ends what is filled ahead.
        if entry::is_present(old) && (access.is_empty() || !entry::is_upgrade(old, new)) {
            return false;
        }
        if rights.contains(Rights::WRITE) {
            self.exposed.add_page(block.hpa.get(), frames);
        }
        frames.write(entry02, new);
        true
    }
}
