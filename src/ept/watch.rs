//! Noticing, without an exit, that L2 wrote one of its pages.
//!
//! The page gets a 4 KiB leaf of its own in ept01, and the processor sets the dirty flag there. The flag is one, those
//! who watch a page may be many: whoever finds it set clears it and gives the page a new version, which stands in bits of
//! the leaf that the processor ignores. So one look at the leaf tells a watcher all: the flag is clear, and the version is
//! the one that it knows.
//!
//! A version has 11 bits. When that of any page comes round to zero, a count of rounds goes up, and every watch of an
//! earlier round counts as written: no version is ever taken for an older one.
//!
//! Writes that do not go through ept01 are not seen: those of L3 through ept02, and of devices. nvmx's own set the flag
//! too ([`GuestMemory::marking`](crate::mm::GuestMemory::marking)).
//!
//! Source: Intel SDM vol. 3C (December 2024), "Accessed and Dirty Flags for EPT", and table "Format of an EPT Page-Table
//! Entry that Maps a 4-KByte Page" (bits 62:52 are ignored without the controls that nvmx does not use for L2).

use super::entry::{DIRTY, memory_type};
use super::identity::Ept01;
use super::{MemoryType, OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa};

/// The version in a leaf.
pub(super) const VERSION: u64 = 0x7ff << 52;
const ONE: u64 = 1 << 52;

/// Why a page cannot be watched: to be treated as always written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchError {
    /// The processor has no dirty flags for EPT.
    NoDirtyFlags,
    /// ept01 does not map the page.
    NotMapped,
    /// It is no ordinary memory, and may change by itself.
    NotMemory,
    /// No frames for the smaller pages.
    OutOfFrames,
}

impl From<OutOfFrames> for WatchError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}

/// A watched page, and how far its watcher knows it, in one word: the address of the leaf, which is aligned to 8, and in bits
/// 62:52 the version that is known. Of the round that [`Ept01::round`] gave; stays valid as long as its [`Ept01`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(u64);

impl Watch {
    const ENTRY: u64 = !VERSION & !7;

    /// A word that [`raw`](Self::raw) gave; one with any of bits 2:0 set is none.
    #[inline(always)]
    pub(super) const fn from_raw(raw: u64) -> Option<Self> {
        if raw & 7 == 0 { Some(Self(raw)) } else { None }
    }

    pub(super) const fn raw(self) -> u64 {
        self.0
    }

    const fn entry(self) -> Hpa {
        Hpa::new(self.0 & Self::ENTRY)
    }

    /// Nothing was written since the version that is known.
    #[inline(always)]
    pub fn is_clean<F: TableFrames>(self, frames: &F) -> bool {
        let leaf = frames.read(self.entry());
        (leaf ^ self.0) & VERSION | leaf & DIRTY == 0
    }
}

impl Ept01 {
    /// Starts to watch the page of `gpa`, ordinary memory, as it is now. Execute INVEPT for ept01 before L2 runs again, and read
    /// the page before that.
    pub fn watch<F: TableFrames>(&mut self, gpa: Gpa, frames: &mut F) -> Result<Watch, WatchError> {
        let entry = self.own_leaf(gpa, frames)?;
        if memory_type(frames.read(entry)) != MemoryType::WriteBack {
            return Err(WatchError::NotMemory);
        }
        self.take_mark(entry, frames);
        Ok(Watch(entry.get() | frames.read(entry) & VERSION))
    }

    /// The watch of the page as it is now, of one that is no longer clean; true if the flag was cleared: as with `watch`.
    pub fn watch_again<F: TableFrames>(&mut self, watch: Watch, frames: &mut F) -> (Watch, bool) {
        let entry = watch.entry();
        let cleared = self.take_mark(entry, frames);
        (Watch(entry.get() | frames.read(entry) & VERSION), cleared)
    }

    /// How often versions came round: a watch of another round knows nothing.
    pub const fn round(&self) -> u64 {
        self.round
    }

    /// All watches end.
    pub(super) const fn end_watches(&mut self) {
        self.round += 1;
    }

    /// The 4 KiB leaf of a page.
    fn own_leaf<F: TableFrames>(&mut self, gpa: Gpa, frames: &mut F) -> Result<Hpa, WatchError> {
        if !self.has_dirty_flags() {
            return Err(WatchError::NoDirtyFlags);
        }
        self.split(gpa, frames)?.ok_or(WatchError::NotMapped)
    }

    /// Clears the dirty flag of a leaf and gives the page a new version if it was set. This processor, whose map this is, does
    /// not run L2 meanwhile.
    fn take_mark<F: TableFrames>(&mut self, entry: Hpa, frames: &mut F) -> bool {
        if frames.take_bits(entry, DIRTY) == 0 {
            return false;
        }
        let leaf = frames.read(entry);
        let version = (leaf & VERSION).wrapping_add(ONE) & VERSION;
        if version == 0 {
            self.end_watches();
        }
        frames.write(entry, leaf & !VERSION | version);
        true
    }
}
