//! A leaf of ept02 that ept12 no longer grants, although L2 executed no INVEPT for it: for whoever looks for an L2 that lacks
//! one. Nothing is changed here; what is found is what a processor may have cached, and goes on being used.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Guidelines for Use of the INVEPT Instruction": needed after a change that takes
//! rights away, or changes an address or a memory type; not after one that gives rights.

use super::cache::Ept02;
use super::entry::{self, Level, Meaning, Rights};
use super::flags::Path;
use super::sub_page_table::{Said, Spp02, look_up, reference};
use super::walk::{Walk, walk};
use super::{EptRules, Eptp, GuestView, TableFrames};
use crate::addr::{Gpa, Hpa, Ngpa};

/// What L3 uses, and what ept12 says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StaleLeaf {
    /// Where the first page of L3 that is wrong lies in L3's physical memory.
    pub ngpa: u64,
    /// Where L3 gets to, as a host-physical address, which is L2's physical address too.
    pub used: u64,
    /// The rights with which it does.
    pub rights: Rights,
    /// Where ept12 leads now and with what rights; `None`: to no page.
    pub now: Option<(u64, Rights)>,
    /// It is not the page that is wrong, but the table by whose last level its sub-pages can be written: `used` is that, and `now` what L2's
    /// tables have in its place.
    pub sub_pages: bool,
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// The first leaf of the root that L3 is entered with (`eptp02`) that does not follow from ept12; none if an INVEPT is
    /// pending, after which the root is compared anyway. A walk of ept12 for each leaf.
    pub fn stale_leaf<G: GuestView, F: TableFrames>(&self, eptp02: Eptp, guest: &G, frames: &F) -> Option<StaleLeaf> {
        let root = self.current();
        let in_use = !root.stale && root.tables.count > 0 && root.table.get() == eptp02.ep4ta();
        let role = root.role.filter(|_| in_use)?;
        let rules = self.rules.of_role(role);
        Search { guest, frames, rules: &rules, root: role.root(), spp: root.spp.as_ref() }.table(
            root.table,
            role.top(),
            0,
        )
    }
}

struct Search<'a, G, F> {
    guest: &'a G,
    frames: &'a F,
    rules: &'a EptRules,
    root: (Gpa, Level),
    spp: Option<&'a Spp02>,
}

impl<G: GuestView, F: TableFrames> Search<'_, G, F> {
    fn table(&self, table: Hpa, level: Level, base: u64) -> Option<StaleLeaf> {
        let step = level.bytes();
        (0..512u64).find_map(|number| {
            let entry = self.frames.read(Hpa::new(table.get() | (number * 8)));
            let ngpa = base + number * step;
            match (entry::is_present(entry), entry::is_leaf(entry, level), level.below()) {
                (false, ..) => None,
                (_, false, Some(below)) => self.table(Hpa::new(entry & entry::ADDRESS), below, ngpa),
                _ => self.leaf(entry, level, ngpa),
            }
        })
    }

    /// Holds a leaf against the pages of ept12 that it covers.
    fn leaf(&self, entry: u64, level: Level, ngpa: u64) -> Option<StaleLeaf> {
        let page = entry & entry::ADDRESS & !(level.bytes() - 1);
        let rights = Rights::of(entry) & self.rules.all_rights();
        let mut offset = 0;
        while offset < level.bytes() {
            let used = page + offset;
            let found = StaleLeaf { ngpa: ngpa + offset, used, rights, now: None, sub_pages: false };
            let mut path = Path::new(self.guest);
            let Walk::Leaf(leaf) = walk(&mut path, self.root, ngpa + offset, self.rules) else {
                return Some(found);
            };
            let gpa = leaf.page.get() | leaf.level.offset(ngpa + offset);
            let at = self.guest.block(Gpa::new(gpa), Level::Pt).map(|block| block.hpa.get());
            let now = Some((gpa, leaf.rights));
            let same_type = matches!(entry::decode(entry, level, self.rules), Meaning::Leaf { caching, .. } if caching == leaf.caching);
            if at != Ok(used) || !leaf.rights.contains(rights) || !same_type {
                return Some(StaleLeaf { now, ..found });
            }
            if entry & entry::SUB_PAGES != 0 && !leaf.rights.contains(Rights::WRITE) {
                let allowed = path.last() & entry::SUB_PAGES != 0 && leaf.level == Level::Pt;
                if let Some(found) = self.sub_pages(found, allowed) {
                    return Some(found);
                }
            }
            offset += leaf.level.bytes().min(level.bytes());
        }
        None
    }

    /// A page whose sub-pages the processor may let L3 write: the table that it uses is held against L2's, which may have none for it any
    /// more, or may not ask one (`allowed`). What stands in the table is L2's own word.
    fn sub_pages(&self, found: StaleLeaf, allowed: bool) -> Option<StaleLeaf> {
        let spp = self.spp?;
        let ngpa = Ngpa::new(found.ngpa);
        let used = spp.last(ngpa, self.frames)?;
        let table12 = match look_up(spp.spptp12, ngpa, self.guest) {
            Said::Page { table, .. } if allowed => Some(table),
            _ => None,
        };
        if table12.is_some_and(|table| reference(table, self.guest) == Ok(used)) {
            return None;
        }
        let now = table12.map(|table| (table.get(), Rights::WRITE));
        Some(StaleLeaf { used: used & entry::ADDRESS, now, sub_pages: true, ..found })
    }
}
