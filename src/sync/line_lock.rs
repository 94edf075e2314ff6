//! Who writes to the serial line: one processor at a time, and once one of them dies, that one only.
//!
//! The dying processor cannot wait for ever: the holder of the lock may be itself, hit by an exception in mid-line, or
//! another one that died a moment later and has stopped for good. So it waits for a bounded time and then writes all the
//! same. Everybody else stops at the lock and says nothing any more: the epitaph is the last record.
//!
//! Nothing can deadlock on one processor: nvmx takes no interrupt while it holds the lock, its NMI handler writes nothing,
//! and every other exception is a death.

use super::Word;

/// A lock on the line. Processors are known by a number that is not 0.
#[derive(Debug, Default)]
pub struct LineLock<W> {
    /// Who writes; 0: nobody.
    holder: W,
    /// Who dies; 0: nobody.
    dying: W,
}

/// What [`LineLock::lock`] and [`LineLock::die`] decided.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LineTurn {
    /// The line is the caller's: to be given back by [`LineLock::unlock`].
    Held,
    /// The caller dies and did not get the lock: it writes without it.
    Through,
    /// Another processor dies: the caller must stop for good.
    Never,
}

impl<W: Word> LineLock<W> {
    /// Nobody writes, nobody dies.
    pub const fn new(holder: W, dying: W) -> Self {
        Self { holder, dying }
    }

    /// Waits for the line, as processor `me`; a dying one looks `patience` times.
    pub fn lock(&self, me: u32, patience: u32) -> LineTurn {
        let mut left = patience;
        loop {
            let dying = self.dying.load();
            if dying != 0 && dying != me {
                return LineTurn::Never;
            }
            match self.holder.compare_exchange(0, me) {
                // Somebody may have begun to die since: then this line is the last but the epitaph.
                0 => return LineTurn::Held,
                holder if dying == me && (holder == me || left == 0) => return LineTurn::Through,
                _ => {}
            }
            left = left.saturating_sub(1);
            self.holder.pause();
        }
    }

    /// Gives the line back.
    pub fn unlock(&self) {
        self.holder.store(0);
    }

    /// Processor `me` begins to die: [`LineTurn::Through`] for the first one, which may write its epitaph, and
    /// [`LineTurn::Never`] for one that comes later.
    pub fn die(&self, me: u32) -> LineTurn {
        match self.dying.compare_exchange(0, me) {
            0 => LineTurn::Through,
            who if who == me => LineTurn::Through,
            _ => LineTurn::Never,
        }
    }

    /// Some processor dies or has died.
    pub fn is_over(&self) -> bool {
        self.dying.load() != 0
    }
}
