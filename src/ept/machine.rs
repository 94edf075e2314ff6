//! The EPT traits on top of `mm`: L2's memory, and tables in frames of nvmx's pool.

use super::entry::{Level, Rights};
use super::{Block, GuestView, NotOwned, TableFrames};
use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::mm::{FramePool, GuestMemory, PhysMem};

impl<P: PhysMem> GuestView for GuestMemory<P> {
    #[inline]
    fn read_entry(&self, at: Gpa) -> Result<u64, NotOwned> {
        Ok(self.phys().read_u64(self.translate(at)?))
    }

    #[inline]
    fn read_entries(&self, at: Gpa, into: &mut [u64]) -> Result<(), NotOwned> {
        self.phys().read_words(self.translate(at)?, into);
        Ok(())
    }

    fn equal_words<F: TableFrames>(&self, at: Gpa, _: &F, first: Hpa, most: usize) -> usize {
        // Both lie in the same physical memory.
        self.translate(at).map_or(0, |at| self.phys().equal_words(at, first, most))
    }

    fn set_flags(&self, at: Gpa, entry: u64, flags: u64) -> bool {
        self.place(at).is_ok_and(|at| self.phys().compare_exchange(at, entry, entry | flags))
    }

    fn write_word(&self, at: Gpa, value: u64) {
        // What L2 does not own swallows it.
        let _ = GuestMemory::write_u64(self, at, value);
    }

    // The level is a constant for small pages.
    #[inline(always)]
    fn block(&self, gpa: Gpa, at_most: Level) -> Result<Block, NotOwned> {
        Block::largest(gpa, at_most, Rights::all(), |start, bytes| {
            // L2 owns whole pages or nothing of them.
            if bytes > PAGE_SIZE {
                self.owns(start, bytes).ok()?;
            }
            self.translate(start).ok()
        })
    }
}

/// Frames of a pool, and the memory they lie in.
#[derive(Debug)]
pub struct PoolFrames<'a, P> {
    /// Where frames come from.
    pub pool: &'a mut FramePool,
    /// How they are reached.
    pub memory: P,
}

impl<P: PhysMem> TableFrames for PoolFrames<'_, P> {
    #[inline]
    fn alloc(&mut self) -> Option<Hpa> {
        self.pool.alloc_table(&self.memory)
    }
    #[inline]
    fn free(&mut self, table: Hpa) {
        self.pool.free_table(table);
    }
    #[inline]
    fn clear(&mut self, table: Hpa) {
        self.memory.zero_page(self.pool.table_entry(table));
    }
    #[inline]
    fn read(&self, entry: Hpa) -> u64 {
        self.memory.read_u64(entry)
    }
    #[inline(always)]
    fn read_pair(&self, first: Hpa) -> [u64; 2] {
        self.memory.read_pair(first)
    }
    #[inline]
    fn read_all(&self, first: Hpa, into: &mut [u64]) {
        self.memory.read_words(first, into);
    }
    #[inline]
    fn zeros(&self, first: Hpa, most: usize) -> usize {
        self.memory.zeros(first, most)
    }
    #[inline]
    fn write(&mut self, entry: Hpa, value: u64) {
        self.memory.write_u64(self.pool.table_entry(entry), value);
    }
    #[inline]
    fn take_bits(&mut self, entry: Hpa, bits: u64) -> u64 {
        self.memory.take_bits(self.pool.table_entry(entry), bits)
    }
}
