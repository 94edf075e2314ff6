//! Noticing, without an exit, that L2 wrote one of its pages.
//!
//! The page gets a 4 KiB leaf of its own in ept01, and the processor sets the dirty flag there. The flag is one, those
//! who watch a page may be several: whoever finds it set clears it and gives the page a new version, which the others
//! miss in theirs.
//!
//! Writes that do not go through ept01 are not seen: those of nvmx itself, of L3 through ept02, and of devices.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Accessed and Dirty Flags for EPT".

use super::entry::DIRTY;
use super::identity::Ept01;
use super::{OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa};
use arrayvec::ArrayVec;

/// Pages whose versions are kept. With more than that in turn, a page counts as written more often than it is.
const PAGES: usize = 64;

/// A watched page, and how far its watcher knows it. Stays valid as long as its [`Ept01`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch {
    entry: Hpa,
    place: usize,
    version: u64,
}

/// What [`Ept01::written`] found.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// Nothing was written since this watch was asked last.
    No,
    /// Something was. If `invept` is set, execute INVEPT for ept01, and only then read the page: so each later write
    /// marks it again.
    Yes {
        /// The flag was cleared just now.
        invept: bool,
    },
}

/// Why a page cannot be watched: to be treated as always written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchError {
    /// The processor has no dirty flags for EPT.
    NoDirtyFlags,
    /// ept01 does not map the page.
    NotMapped,
    /// No frames for the smaller pages.
    OutOfFrames,
}

impl From<OutOfFrames> for WatchError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}

/// The pages that are watched, each with the number of the last write that was found in it. Writes of all pages are
/// counted together: so a page that lost its place and comes back with the count of the day is ahead of every watch that
/// missed a write.
#[derive(Debug, Default)]
pub(super) struct Watched {
    pages: ArrayVec<(Hpa, u64), PAGES>,
    versions: u64,
    /// Whose place the next page takes when all are taken.
    next: usize,
}

impl Watched {
    /// Where the page with this leaf stands; it gets a place if it has none.
    fn place(&mut self, entry: Hpa) -> usize {
        if let Some(place) = self.pages.iter().position(|page| page.0 == entry) {
            return place;
        }
        let page = (entry, self.versions);
        if self.pages.try_push(page).is_ok() {
            return self.pages.len() - 1;
        }
        self.next = (self.next + 1) % PAGES;
        if let Some(old) = self.pages.get_mut(self.next) {
            *old = page;
        }
        self.next
    }
}

impl Ept01 {
    /// Starts to watch the page of `gpa`. Before the page is read for the first time, execute INVEPT for ept01: until
    /// then a write may go through a cached translation and leave no mark.
    pub fn watch<F: TableFrames>(&mut self, gpa: Gpa, frames: &mut F) -> Result<Watch, WatchError> {
        if !self.has_dirty_flags() {
            return Err(WatchError::NoDirtyFlags);
        }
        let entry = self.split(gpa, frames)?.ok_or(WatchError::NotMapped)?;
        let place = self.watched.place(entry);
        // A flag that is set already stays: somebody else may wait for it.
        Ok(Watch { entry, place, version: self.watched.pages.get(place).map_or(0, |page| page.1) })
    }

    /// Tells whether the page was written since this watch was asked last.
    #[inline]
    pub fn written<F: TableFrames>(&mut self, watch: &mut Watch, frames: &mut F) -> Written {
        let known = self.watched.pages.get(watch.place) == Some(&(watch.entry, watch.version));
        if known && frames.read(watch.entry) & DIRTY == 0 {
            return Written::No;
        }
        self.written_since(watch, frames)
    }

    #[cold]
    fn written_since<F: TableFrames>(&mut self, watch: &mut Watch, frames: &mut F) -> Written {
        watch.place = self.watched.place(watch.entry);
        let invept = frames.take_bits(watch.entry, DIRTY) != 0;
        if let Some(page) = self.watched.pages.get_mut(watch.place) {
            if invept {
                self.watched.versions += 1;
                page.1 = self.watched.versions;
            }
            watch.version = page.1;
        }
        Written::Yes { invept }
    }
}
