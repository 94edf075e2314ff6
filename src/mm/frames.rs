//! nvmx's own frames: a bounded pool that lies in nvmx's range, so L2 can never reach one.

use crate::{
    addr::{Hpa, PAGE_SIZE},
    mm::{PhysMem, Span},
};

/// Most frames a pool can hold (64 MiB).
pub const MAX_FRAMES: usize = 16384;
const WORDS: usize = MAX_FRAMES / 64;

/// An owned 4 KiB frame: exactly one of these exists for a frame in use. It is not freed on drop; give it back with
/// [`FramePool::free`] or keep it.
#[must_use]
#[derive(PartialEq, Eq, Debug)]
pub struct Frame(Hpa);

impl Frame {
    /// Gives up ownership for a bare address: the frame is then what an entry of a page table says it is. [`FramePool::free_at`] takes
    /// it back.
    #[inline]
    pub const fn into_hpa(self) -> Hpa {
        self.0
    }

    /// Where the frame starts; 4 KiB aligned.
    #[inline]
    pub const fn hpa(&self) -> Hpa {
        self.0
    }
}

/// Frames of nvmx, zeroed when handed out. There is one pool for a frame: a copy would give each frame out twice.
#[derive(Debug)]
pub struct FramePool {
    base: u64,
    frames: usize,
    free: usize,
    /// The word where the last search ended: most allocations need one look.
    hint: usize,
    used: [u64; WORDS],
    /// On a host a test counts allocations down, and the one at 0 fails.
    #[cfg(not(target_os = "none"))]
    fails: Option<u64>,
}

impl FramePool {
    /// A pool of the whole frames in `span`, at most [`MAX_FRAMES`] of them.
    pub fn new(span: Span) -> Self {
        let span = span.inner_pages();
        let frames = usize::try_from(span.len() / PAGE_SIZE).unwrap_or(MAX_FRAMES).min(MAX_FRAMES);
        let mut used = [u64::MAX; WORDS];
        for (i, word) in used.iter_mut().enumerate() {
            *word = match frames.saturating_sub(i * 64) {
                0 => u64::MAX,
                n if n >= 64 => 0,
                n => u64::MAX << n,
            };
        }
        Self {
            base: span.start(),
            frames,
            free: frames,
            hint: 0,
            used,
            #[cfg(not(target_os = "none"))]
            fails: None,
        }
    }

    /// Lets the allocation behind so many further ones fail, for tests of what follows; `None` takes it back.
    #[cfg(not(target_os = "none"))]
    pub fn fail_behind(&mut self, allocations: Option<u64>) {
        self.fails = allocations;
    }

    /// The allocations that are left until one fails: `None` if it has, or if none is to.
    #[cfg(not(target_os = "none"))]
    pub const fn until_failure(&self) -> Option<u64> {
        self.fails
    }

    /// A test wants this allocation to fail.
    #[inline(always)]
    fn is_to_fail(&mut self) -> bool {
        #[cfg(not(target_os = "none"))]
        if let Some(left) = self.fails {
            self.fails = left.checked_sub(1);
            return self.fails.is_none();
        }
        false
    }

    /// Takes a frame and fills it with zeros; `None` when all are in use.
    pub fn alloc(&mut self, memory: &impl PhysMem) -> Option<Frame> {
        if self.free == 0 || self.is_to_fail() {
            return None;
        }
        for step in 0..WORDS {
            let index = (self.hint + step) % WORDS;
            let word = self.used.get_mut(index)?;
            if *word != u64::MAX {
                let bit = word.trailing_ones();
                *word |= 1 << bit;
                self.hint = index;
                self.free -= 1;
                let hpa = self.hpa(index * 64 + bit as usize);
                memory.zero_page(hpa);
                return Some(Frame(hpa));
            }
        }
        None
    }

    /// Takes `count` frames in a row, zeroed; the address of the first. They go back one by one, if at all.
    pub fn alloc_contiguous(&mut self, memory: &impl PhysMem, count: usize) -> Option<Hpa> {
        if count == 0 || count > self.free || self.is_to_fail() {
            return None;
        }
        let first = (0..=self.frames - count).find(|first| (*first..first + count).all(|i| !self.is_used(i)))?;
        for index in first..first + count {
            *self.used.get_mut(index / 64)? |= 1 << (index % 64);
        }
        self.free -= count;
        let hpa = self.hpa(first);
        memory.zero(hpa, count as u64 * PAGE_SIZE);
        Some(hpa)
    }

    /// Takes a frame back. A frame of another pool is ignored.
    pub fn free(&mut self, frame: Frame) {
        self.free_at(frame.into_hpa());
    }

    /// Takes back a frame that [`Frame::into_hpa`] gave up, or one of several in a row: whoever knew it by its address forgets it.
    /// What is not of this pool, or not in use, is ignored.
    pub fn free_at(&mut self, at: Hpa) {
        let Some(index) = at.get().checked_sub(self.base).map(|offset| (offset / PAGE_SIZE) as usize) else {
            return;
        };
        if index < self.frames && self.is_used(index) {
            if let Some(word) = self.used.get_mut(index / 64) {
                *word &= !(1 << (index % 64));
                self.free += 1;
            }
        }
    }

    /// Frames in all.
    pub const fn total(&self) -> usize {
        self.frames
    }

    /// Frames not in use.
    pub const fn available(&self) -> usize {
        self.free
    }

    fn hpa(&self, index: usize) -> Hpa {
        Hpa::new(self.base + index as u64 * PAGE_SIZE)
    }

    fn is_used(&self, index: usize) -> bool {
        self.used.get(index / 64).is_none_or(|word| word & 1 << (index % 64) != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::mm::phys::VecMem;

    fn pool(frames: u64) -> (FramePool, VecMem) {
        (FramePool::new(Span::new(0x1000, 0x1000 + frames * PAGE_SIZE)), VecMem::new(0x1000 + (frames * 4096) as usize))
    }

    #[test]
    fn a_frame_comes_zeroed_even_after_use() {
        let (mut pool, memory) = pool(1);
        let frame = pool.alloc(&memory).unwrap();
        memory.write_u64(frame.hpa(), 0x1234);
        pool.free(frame);
        assert_eq!(memory.read_u64(pool.alloc(&memory).unwrap().hpa()), 0);
        assert_eq!(pool.alloc(&memory), None);
    }

    #[test]
    fn only_whole_frames_of_the_span_are_used() {
        let mut pool = FramePool::new(Span::new(0x1800, 0x3800));
        let memory = VecMem::new(0x4000);
        assert_eq!(pool.total(), 1);
        assert_eq!(pool.alloc(&memory).unwrap().hpa(), Hpa::new(0x2000));
    }

    #[test]
    fn a_frame_of_another_pool_is_not_taken_back() {
        let (mut pool, memory) = pool(3);
        let mut other = FramePool::new(Span::new(0x4000, 0x6000));
        other.free(pool.alloc(&memory).unwrap());
        assert_eq!((pool.available(), other.available()), (2, 2));
        let frame = pool.alloc(&memory).unwrap().into_hpa();
        other.free_at(frame);
        assert_eq!(other.available(), 2);
    }

    proptest! {
        #[test]
        fn frames_are_distinct_aligned_and_in_the_span(ops in prop::collection::vec((0u8..4, 1usize..9), 1..200)) {
            let (mut pool, memory) = pool(150);
            let mut held: Vec<Frame> = Vec::new();
            let mut taken: HashSet<u64> = HashSet::new();
            for (op, n) in ops {
                match op {
                    0 | 1 => match pool.alloc(&memory) {
                        Some(frame) => {
                            prop_assert!(taken.insert(frame.hpa().get()));
                            held.push(frame);
                        }
                        None => prop_assert_eq!(pool.available(), 0),
                    },
                    2 => if let Some(frame) = held.pop() {
                        taken.remove(&frame.hpa().get());
                        pool.free(frame);
                    },
                    _ => if let Some(first) = pool.alloc_contiguous(&memory, n) {
                        for i in 0..n as u64 {
                            prop_assert!(taken.insert(first.get() + i * PAGE_SIZE));
                        }
                    },
                }
                prop_assert_eq!(pool.available() + taken.len(), pool.total());
                prop_assert!(taken.iter().all(|a| a % PAGE_SIZE == 0 && (0x1000..0x1000 + 150 * PAGE_SIZE).contains(a)));
            }
        }
    }
}
