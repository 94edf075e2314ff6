//! Noticing, without an exit, that L2 wrote one of its pages.
//!
//! The page gets a 4 KiB leaf of its own in ept01, and the processor sets the dirty flag there. Writes that do not go
//! through ept01 are not seen: those of nvmx itself, of L3 through ept02, and of devices.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Accessed and Dirty Flags for EPT".

use super::entry::DIRTY;
use super::identity::Ept01;
use super::{OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa};

/// A watched page. Stays valid as long as its [`Ept01`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch {
    entry: Hpa,
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

impl Ept01 {
    /// Starts to watch the page of `gpa`. Before the page is read for the first time, execute INVEPT for ept01: until
    /// then a write may go through a cached translation and leave no mark.
    pub fn watch<F: TableFrames>(&mut self, gpa: Gpa, frames: &mut F) -> Result<Watch, WatchError> {
        if !self.has_dirty_flags() {
            return Err(WatchError::NoDirtyFlags);
        }
        let entry = self.split(gpa, frames)?.ok_or(WatchError::NotMapped)?;
        frames.take_bits(entry, DIRTY);
        Ok(Watch { entry })
    }
}

impl Watch {
    /// True when the page was written since the last call; the flag is cleared. After `true`: execute INVEPT for ept01,
    /// then read the page, in this order, so that each later write marks it again.
    #[inline]
    #[must_use]
    pub fn take_dirty<F: TableFrames>(&self, frames: &mut F) -> bool {
        frames.read(self.entry) & DIRTY != 0 && frames.take_bits(self.entry, DIRTY) != 0
    }
}
