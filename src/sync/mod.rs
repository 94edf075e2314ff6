//! The little that processors share.
//!
//! Each processor has its own [`Cpu`](crate::cpu::Cpu): VMCSs, slots, EPT tables, frames, counters. What is left is the
//! serial line ([`line_lock`]) and the moment in which processors are started ([`start`]). Both are written against
//! [`Word`], so that a host test can run them on a model of memory and try every interleaving.

pub mod line_lock;
pub mod start;

use core::sync::atomic::{AtomicU32, Ordering};

/// A shared 32-bit word. Loads acquire, stores release.
pub trait Word {
    /// Reads it.
    fn load(&self) -> u32;
    /// Writes it.
    fn store(&self, value: u32);
    /// Replaces `old` by `new` if it is `old`; returns what was there.
    fn compare_exchange(&self, old: u32, new: u32) -> u32;
    /// Adds one.
    fn increment(&self);
    /// Lets time pass in a loop that waits for another processor.
    fn pause(&self);
}

impl Word for AtomicU32 {
    #[inline]
    fn load(&self) -> u32 {
        self.load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, value: u32) {
        self.store(value, Ordering::Release);
    }

    #[inline]
    fn compare_exchange(&self, old: u32, new: u32) -> u32 {
        match self.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(there) | Err(there) => there,
        }
    }

    #[inline]
    fn increment(&self) {
        self.fetch_add(1, Ordering::AcqRel);
    }

    #[inline]
    fn pause(&self) {
        core::hint::spin_loop();
    }
}
