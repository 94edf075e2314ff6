//! The start of the other processors, one after the other, by the one that booted.
//!
//! Each comes through the same page of low memory, takes what was laid out for it, and says that it has *arrived*: then the
//! page is free for the next. None goes on before all have arrived and the page belongs to L2 again (*go*): a start-up
//! message that is still on its way would otherwise find a processor that waits for L2's. L2 starts when all are *ready*.

use super::Word;

/// How far the start is.
#[derive(Debug, Default)]
pub struct Start<W> {
    arrived: W,
    go: W,
    ready: W,
}

impl<W: Word> Start<W> {
    /// Nobody has arrived.
    pub const fn new(arrived: W, go: W, ready: W) -> Self {
        Self { arrived, go, ready }
    }

    /// How many have arrived.
    pub fn arrived(&self) -> u32 {
        self.arrived.load()
    }

    /// A started processor has taken what is its own; returns when all may go on.
    pub fn arrive(&self) {
        self.arrived.increment();
        while self.go.load() == 0 {
            self.go.pause();
        }
    }

    /// All have arrived.
    pub fn go(&self) {
        self.go.store(1);
    }

    /// A started processor will enter L2 next, or is parked for good.
    pub fn ready(&self) {
        self.ready.increment();
    }

    /// Waits until `count` are ready.
    pub fn wait_ready(&self, count: u32) {
        while self.ready.load() < count {
            self.ready.pause();
        }
    }
}
