//! Faults inside: memory whose k-th access nothing answers, a pool whose k-th frame is not there, and the sweep over k.

use nvmx::addr::Hpa;
use nvmx::ept::TableFrames;
use nvmx::mm::phys::VecMem;
use nvmx::mm::{PhysMem, Place};
use std::cell::{Cell, RefCell};

/// Memory that counts accesses. To the one with number `fail` nothing answers: it reads all ones, it writes nothing.
pub struct Failing {
    pub memory: VecMem,
    pub fail: Option<usize>,
    /// The address of each access.
    pub touched: RefCell<Vec<u64>>,
}

impl Failing {
    pub fn new(memory: VecMem, fail: Option<usize>) -> Self {
        Self { memory, fail, touched: RefCell::default() }
    }

    pub fn accesses(&self) -> usize {
        self.touched.borrow().len()
    }

    fn answers(&self, at: Hpa) -> bool {
        self.touched.borrow_mut().push(at.get());
        Some(self.accesses() - 1) != self.fail
    }
}

impl PhysMem for Failing {
    fn read_u64(&self, at: Hpa) -> u64 {
        if self.answers(at) { self.memory.read_u64(at) } else { u64::MAX }
    }
    fn write_u64(&self, at: Place<'_>, value: u64) {
        if self.answers(at.hpa()) {
            self.memory.write_u64(at.hpa(), value);
        }
    }
    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        if self.answers(at) { self.memory.read_bytes(at, into) } else { into.fill(0xFF) }
    }
    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        if self.answers(at.hpa()) {
            self.memory.write_bytes(at.hpa(), bytes);
        }
    }
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        if self.answers(at.hpa()) { self.memory.take_bits(at, bits) } else { 0 }
    }
    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        self.answers(at.hpa()) && self.memory.compare_exchange(at, old, new)
    }
    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        self.answers(at.hpa()) && self.memory.compare_exchange_u32(at, old, new)
    }
}

/// Frames of another pool, but for the allocation with number `fail`.
pub struct FailingFrames<F> {
    pub frames: F,
    pub fail: Option<usize>,
    pub allocations: Cell<usize>,
}

impl<F> FailingFrames<F> {
    pub fn new(frames: F, fail: Option<usize>) -> Self {
        Self { frames, fail, allocations: Cell::new(0) }
    }
}

impl<F: TableFrames> TableFrames for FailingFrames<F> {
    fn alloc(&mut self) -> Option<Hpa> {
        let number = self.allocations.replace(self.allocations.get() + 1);
        if Some(number) == self.fail { None } else { self.frames.alloc() }
    }
    fn free(&mut self, table: Hpa) {
        self.frames.free(table);
    }
    fn clear(&mut self, table: Hpa) {
        self.frames.clear(table);
    }
    fn read(&self, entry: Hpa) -> u64 {
        self.frames.read(entry)
    }
    fn read_all(&self, first: Hpa, into: &mut [u64]) {
        self.frames.read_all(first, into);
    }
    fn write(&mut self, entry: Hpa, value: u64) {
        self.frames.write(entry, value);
    }
    fn zeros(&self, first: Hpa, count: usize) -> usize {
        self.frames.zeros(first, count)
    }
    fn take_bits(&mut self, entry: Hpa, bits: u64) -> u64 {
        self.frames.take_bits(entry, bits)
    }
}

/// Runs a handler with each k in turn until it ends without having reached it; `run` says how far it came. The number of
/// runs in which something failed.
pub fn sweep(mut run: impl FnMut(usize) -> usize) -> usize {
    const FAR: usize = 1_000_000;
    (0..FAR).find(|k| run(*k) <= *k).expect("it ends")
}
