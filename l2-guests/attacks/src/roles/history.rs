//! What was changed, in order: with it the oracle knows every value that an entry has had.

use core::{
    cell::UnsafeCell,
    sync::atomic::{AtomicBool, Ordering},
};

/// One change of an entry.
#[derive(Clone, Copy)]
pub struct Change {
    /// Address of the entry
    pub at: u64,
    /// What it was
    pub old: u64,
}

/// Changes that are kept.
const KEPT: usize = 1024;

/// The last changes.
pub struct Log {
    changes: [Change; KEPT],
    length: u64,
}

/// The log, and the lock under which entries are changed.
pub struct History {
    locked: AtomicBool,
    log: UnsafeCell<Log>,
}

impl History {
    pub const fn new() -> Self {
        let log = Log { changes: [Change { at: 0, old: 0 }; KEPT], length: 0 };
        Self { locked: AtomicBool::new(false), log: UnsafeCell::new(log) }
    }

    pub fn clear(&self) {
        self.locked(|log| log.length = 0);
    }

    /// Runs alone with the log.
    pub fn locked<T>(&self, f: impl FnOnce(&mut Log) -> T) -> T {
        while self.locked.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: the lock is ours.
        let value = f(unsafe { &mut *self.log.get() });
        self.locked.store(false, Ordering::Release);
        value
    }
}

impl Log {
    /// Changes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether what came since `epoch` soon does not fit any more.
    pub fn is_filling(&self, epoch: u64) -> bool {
        self.length - epoch > KEPT as u64 / 2
    }

    /// Changes the entry at `at`.
    pub fn change(&mut self, at: u64, new: u64) {
        let place = at as *mut u64;
        // SAFETY: an entry of the arena; the processor, which reads and marks it, does so with single accesses.
        let old = unsafe { place.read_volatile() };
        self.changes[self.length as usize % KEPT] = Change { at, old };
        self.length += 1;
        // SAFETY: as above.
        unsafe { place.write_volatile(new) };
    }

    /// Gives all values that the entry at `at` has had since `epoch`, and whether it had them since `window`.
    pub fn values(&self, at: u64, epoch: u64, window: u64, mut f: impl FnMut(u64, bool)) {
        let first = epoch.max(self.length.saturating_sub(KEPT as u64));
        for i in first..self.length {
            let change = self.changes[i as usize % KEPT];
            if change.at == at {
                f(change.old, i >= window);
            }
        }
        // SAFETY: memory of this image; tables that are not in the arena never change.
        f(unsafe { (at as *const u64).read_volatile() }, true);
    }
}
