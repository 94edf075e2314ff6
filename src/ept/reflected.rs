//! What a violation that L2 sees takes out of ept02.
//!
//! A violation drops what the processor has cached for its address: the guest-physical mappings of the EP4TA, and the
//! combined ones of the linear address under the current VPID and PCID. L2 relies on that: it maps another page there and
//! resumes L3 without INVEPT. ept02 is what nvmx has cached of ept12, so its leaf goes too, in each root of the EP4TA.
//! The same is done where L2 sees a misconfiguration, a full page-modification log or a #VE in place of the violation.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Operations that Invalidate Cached Mappings".

use super::TableFrames;
use super::cache::Ept02;
use super::entry::{self, Level};
use super::eptp::Eptp;
use crate::addr::{Hpa, Ngpa};

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// L2 sees the violation of L3 at `ngpa` under `eptp12`, which the processor had in the root of this role.
    #[cold]
    pub(super) fn forget_page<F: TableFrames>(&mut self, eptp12: Eptp, ngpa: Ngpa, frames: &mut F) {
        self.for_each_of(eptp12, |role, root| {
            if root.tables.count == 0 {
                return;
            }
            let Some((at, level)) = leaf_at((root.table, role.top()), ngpa, frames) else { return };
            frames.write(at, 0);
            // Of a 4 KiB page in its root the processor keeps at most what it may keep on L2's machine as well, until the
            // INVEPT that follows one of L2. Of other roots, and of the rest of a large page, it does not know.
            root.invept |= role != eptp12 || level != Level::Pt;
        });
    }

    /// The same, where the entry for the address in the page table of this role is known.
    #[inline(always)]
    pub(super) fn forget_in_table<F: TableFrames>(&mut self, eptp12: Eptp, ngpa: Ngpa, entry: Hpa, frames: &mut F) {
        if !self.is_alone(eptp12) {
            return self.forget_page(eptp12, ngpa, frames);
        }
        if entry::is_present(frames.read(entry)) {
            frames.write(entry, 0);
        }
    }

    /// nvmx found a violation under `eptp12` that the processor did not have: it still has cached what that would have
    /// dropped.
    #[cold]
    pub fn found_violation(&mut self, eptp12: Eptp) {
        self.in_use_mut().iter_mut().filter(|root| root.role == Some(eptp12)).for_each(|root| root.invept = true);
    }
}

/// The leaf of nvmx's own tables for an address, and the level it is at.
#[inline(always)]
pub(super) fn leaf_at<F: TableFrames>((root, top): (Hpa, Level), ngpa: Ngpa, frames: &F) -> Option<(Hpa, Level)> {
    // Beyond what the levels translate there is none, and no leaf of another address is to go.
    if !top.reaches(ngpa.get()) {
        return None;
    }
    let mut table = if top == Level::Pml5 { below_fifth_level(root, ngpa, frames)? } else { root };
    // A loop over a constant, as in a walk.
    for level in [Level::Pml4, Level::Pdpt, Level::Pd, Level::Pt] {
        let at = Hpa::new(table.get() | level.entry_offset(ngpa.get()));
        let value = frames.read(at);
        if !entry::is_present(value) {
            return None;
        }
        if entry::is_leaf(value, level) {
            return Some((at, level));
        }
        table = Hpa::new(value & entry::ADDRESS);
    }
    None
}

#[cold]
#[inline(never)]
fn below_fifth_level<F: TableFrames>(root: Hpa, ngpa: Ngpa, frames: &F) -> Option<Hpa> {
    let value = frames.read(Hpa::new(root.get() | Level::Pml5.entry_offset(ngpa.get())));
    entry::is_present(value).then_some(Hpa::new(value & entry::ADDRESS))
}
