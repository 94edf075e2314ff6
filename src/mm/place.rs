//! The right to write to physical memory.

use crate::addr::Hpa;
use core::marker::PhantomData;

/// Physical memory that whoever has this may write: from an address on, as much as its owner has there.
///
/// Only owners make one, for as long as they own: a [`Frame`](super::Frame) or [`FrameRun`](super::FrameRun) of frames, the pool for the tables
/// that it gave away, and L2's memory for what is not nvmx's ([`GuestMemory::place`](super::GuestMemory::place)). So no address that
/// merely turned up leads to a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place<'a> {
    at: Hpa,
    owner: PhantomData<&'a ()>,
}

impl Place<'_> {
    /// For owners.
    #[inline(always)]
    pub(in crate::mm) const fn new(at: Hpa) -> Self {
        Self { at, owner: PhantomData }
    }

    /// Anywhere, for tests and models of a machine.
    #[cfg(not(target_os = "none"))]
    pub const fn anywhere(at: Hpa) -> Self {
        Self::new(at)
    }

    /// Its address.
    #[inline(always)]
    pub const fn hpa(self) -> Hpa {
        self.at
    }

    /// So many bytes behind it, where the owner has that much.
    #[inline(always)]
    pub(in crate::mm) const fn behind(self, bytes: u64) -> Self {
        Self::new(Hpa::new(self.at.get().wrapping_add(bytes)))
    }
}
