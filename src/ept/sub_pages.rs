//! Sub-page write permissions: a write that ept12 refuses, and spp12 allows.
//!
//! A leaf of ept02 gets the bit of sub-pages with the first write that spp12 allows in its page, and spp02 the way to L2's word for the
//! page with it; from then on the processor judges. Until then, and wherever a dirty flag of ept12 is to be set, nvmx looks into
//! spp12 itself. A leaf with the bit is not writable, so nothing in the rest of ept02 has to know of it but the comparison behind an
//! INVEPT of L2, which takes the bit out of what it looks at: the next write brings it back.
//!
//! A root of ept02 for guests with the control has an spp02 of its own, since the processor keeps what it has cached of both under the
//! same tag. INVEPT of L2 empties it, and so does whatever empties the root.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Sub-Page Write Permissions", "SPP-Induced VM Exits", table "Exit Qualification for
//! SPP-Induced VM Exits", "Operations that Invalidate Cached Mappings".

use super::cache::Ept02;
use super::entry::{self, Level, Rights};
use super::eptp::Eptp;
use super::flags::{Marked, PageLog, Path};
use super::origin::Origin;
use super::reflected::leaf_at;
use super::sub_page_table::{Said, Spp02, look_up, reference};
use super::walk::{Leaf, walk};
use super::{GuestView, OutOfFrames, Outcome, Qualification, TableFrames};
use crate::addr::{Gpa, Hpa, Ngpa};

/// What to run L3 with, whose ept02 has sub-pages.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubPages {
    /// The pointer to spp02.
    pub spptp02: Hpa,
    /// Execute INVEPT, single-context with the EPTP of ept02, before the VM entry.
    pub invept: bool,
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// The spp02 composed of the one that L2 set up, for the root that [`Ept02::activate`] has just made the current one. To be called
    /// before every VM entry under the control. `None` if there is no frame at all, which the reserve prevents.
    #[cold]
    pub fn sub_pages<F: TableFrames>(&mut self, spptp12: Gpa, frames: &mut F) -> Option<SubPages> {
        const { assert!(RESERVE >= 8, "a page needs up to four tables of ept02, and three of spp02") };
        if self.current().spp.is_none() {
            let table = self.with_room(frames, |ept, frames| ept.reserve.alloc(frames).ok_or(OutOfFrames))?;
            let root = self.current_mut().0;
            root.spp = Some(Spp02::new(table, spptp12));
            root.tables.count += 1;
        }
        let (root, reserve) = self.current_mut();
        let spp = root.spp.as_mut()?;
        if spp.spptp12 != spptp12 {
            root.invept |= spp.tables() > 1;
            root.tables.count -= spp.tables() - 1;
            spp.clear(reserve, frames);
            spp.spptp12 = spptp12;
        }
        let spptp02 = spp.table;
        Some(SubPages { spptp02, invept: core::mem::take(&mut root.invept) })
    }

    /// Handles an SPP-related event of L3 at `ngpa` under `eptp12`: spp02 has nothing there, or L2's table is wrong.
    #[cold]
    pub fn sub_page_event<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        let miss = match self.said(ngpa, guest) {
            Said::Page { table, .. } => {
                let index = self.enter(eptp12, guest, frames);
                if let Ok(last) = reference(table, guest) {
                    self.fill_spp(index, ngpa, last, frames);
                    return Outcome::Filled;
                }
                false
            }
            said => said == Said::Miss,
        };
        // As a violation does, though the processor drops nothing for such an event.
        self.forget_page(eptp12, ngpa, frames);
        self.found_violation(eptp12);
        Outcome::ReflectSubPageEvent { qualification: qualification.of_sub_page_event(miss) }
    }

    /// An access came to something that L2 sees, and may be a write that ept12 refuses and spp12 allows.
    ///
    /// If ept02 and spp02 have all of it, it is the processor that does not let this access make use of sub-pages: L2 sees what it
    /// would see of that. A dirty flag that had to be set for it stays.
    #[cold]
    #[inline(never)]
    #[allow(clippy::too_many_arguments)]
    pub(super) fn refused_by_page<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        refused: Outcome,
        log: Option<&mut PageLog>,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        let mut path = Path::new(guest);
        let leaf = self.leaf_with_sub_pages(eptp12, ngpa, qualification, &mut path);
        let Some(leaf) = leaf else { return refused };
        match self.said(ngpa, guest) {
            said @ Said::Page { table, .. } if said.allows(ngpa, 1) => {
                self.fill_for_write(eptp12, ngpa, &leaf, table, refused, log, &path, guest, frames)
            }
            Said::Page { .. } => refused,
            said => {
                let qualification = qualification.of_sub_page_event(said == Said::Miss);
                Outcome::ReflectSubPageEvent { qualification }
            }
        }
    }

    /// The page that an access is about, if the access is one that sub-pages can allow: a write by a linear address to a page of 4 KiB
    /// that can be read, and not be written.
    fn leaf_with_sub_pages<G: GuestView>(
        &self,
        eptp12: Eptp,
        ngpa: Ngpa,
        qualification: Qualification,
        path: &mut Path<'_, G>,
    ) -> Option<Leaf<Gpa>> {
        const WRITE: Qualification =
            Qualification::WRITE.union(Qualification::LINEAR_VALID).union(Qualification::LINEAR_TRANSLATED);
        // Four levels do not tell addresses of more bits apart.
        if !qualification.contains(WRITE) || !Level::Pml4.reaches(ngpa.get()) {
            return None;
        }
        let rules = self.rules.of_role(eptp12);
        let leaf = walk(path, eptp12.root(), ngpa.get(), &rules).leaf()?;
        let read_only = leaf.rights & (Rights::READ | Rights::WRITE) == Rights::READ;
        (leaf.level == Level::Pt && read_only && path.last() & entry::SUB_PAGES != 0).then_some(leaf)
    }

    #[allow(clippy::too_many_arguments)]
    fn fill_for_write<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        ngpa: Ngpa,
        leaf: &Leaf<Gpa>,
        table12: Gpa,
        refused: Outcome,
        log: Option<&mut PageLog>,
        path: &Path<'_, G>,
        guest: &G,
        frames: &mut F,
    ) -> Outcome {
        let gpa = leaf.page;
        let (Ok(block), Ok(last)) = (guest.block(gpa, Level::Pt), reference(table12, guest)) else {
            return Outcome::Forbidden { gpa };
        };
        // Of a page that L2 itself could not write no part becomes writable.
        if !block.rights.contains(Rights::WRITE) {
            return Outcome::Forbidden { gpa };
        }
        let composed = entry::leaf_entry(block.hpa, Level::Pt, leaf.rights & block.rights, leaf.caching);
        let composed = composed | entry::SUB_PAGES;
        let index = self.enter(eptp12, guest, frames);
        let root = self.current();
        let has_way = root.spp.is_some_and(|spp| spp.has(ngpa, last, frames));
        let leaf02 = leaf_at((root.table, root.top()), ngpa, frames).map(|(at, _)| frames.read(at));
        if has_way && leaf02.is_some_and(|old| entry::is_same(old, composed)) {
            return refused;
        }
        if eptp12.accessed_dirty() {
            match path.mark(ngpa, Rights::WRITE, log) {
                Marked::Done { .. } => {}
                Marked::LogFull => return Outcome::ReflectLogFull,
                Marked::Changed => return Outcome::Filled,
            }
        }
        self.exposed.add_page(block.hpa.get(), frames);
        self.stats.fills += 1;
        let origin = Origin::table(leaf.entry, leaf.upper);
        self.install_with_room(index, ngpa, Level::Pt, composed, origin, frames);
        self.fill_spp(index, ngpa, last, frames);
        Outcome::Filled
    }

    /// What the spp12 of the current root says.
    fn said<G: GuestView>(&self, ngpa: Ngpa, guest: &G) -> Said {
        self.current().spp.map_or(Said::Miss, |spp| look_up(spp.spptp12, ngpa, guest))
    }

    /// Writes the way to a page into spp02.
    fn fill_spp<F: TableFrames>(&mut self, index: usize, ngpa: Ngpa, last: u64, frames: &mut F) {
        self.with_room(frames, |ept, frames| {
            let root = &mut ept.roots[index % ROOTS];
            let Some(spp) = &mut root.spp else { return Ok(()) };
            let before = spp.tables();
            let replaced = spp.fill(ngpa, last, &mut ept.reserve, frames);
            root.tables.count += spp.tables() - before;
            root.invept |= replaced?;
            Ok(())
        });
    }

    /// Does what needs frames, making room until there are enough. Each attempt starts anew.
    fn with_room<T, F: TableFrames>(
        &mut self,
        frames: &mut F,
        mut attempt: impl FnMut(&mut Self, &mut F) -> Result<T, OutOfFrames>,
    ) -> Option<T> {
        // The other roots are emptied, and then the current one; after that the reserve suffices.
        for _ in 0..=ROOTS {
            if let Ok(done) = attempt(self, frames) {
                return Some(done);
            }
            self.make_room(frames);
        }
        None
    }
}
