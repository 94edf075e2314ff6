//! nvmx's own frames: a bounded pool that lies in nvmx's range, so L2 can never reach one.

use crate::{
    addr::{Hpa, PAGE_SIZE},
    mm::{PhysMem, Place, Span},
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
    /// Where the frame starts; 4 KiB aligned.
    #[inline(always)]
    pub const fn hpa(&self) -> Hpa {
        self.0
    }

    /// The right to write to it, from this offset on.
    #[inline(always)]
    pub const fn at(&self, offset: u64) -> Place<'_> {
        Place::new(Hpa::new(self.0.get() + offset % PAGE_SIZE))
    }
}

/// Frames in a row, owned like one.
#[must_use]
#[derive(PartialEq, Eq, Debug)]
pub struct FrameRun {
    first: Hpa,
    frames: usize,
}

impl FrameRun {
    /// Where the first frame starts.
    #[inline(always)]
    pub const fn hpa(&self) -> Hpa {
        self.first
    }

    /// The right to write to them, from this offset on.
    #[inline]
    pub const fn at(&self, offset: u64) -> Place<'_> {
        Place::new(Hpa::new(self.first.get() + offset % (self.frames as u64 * PAGE_SIZE)))
    }

    /// Its frames, one by one.
    pub fn into_frames(self) -> impl Iterator<Item = Frame> {
        (0..self.frames as u64).map(move |n| Frame(Hpa::new(self.first.get() + n * PAGE_SIZE)))
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
    /// In debug builds there each access to a table is checked to be one.
    #[cfg(all(debug_assertions, not(target_os = "none")))]
    tables: std::collections::HashSet<Hpa>,
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
            #[cfg(all(debug_assertions, not(target_os = "none")))]
            tables: Default::default(),
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
                let frame = Frame(hpa);
                memory.zero_page(frame.at(0));
                return Some(frame);
            }
        }
        None
    }

    /// Takes `count` frames in a row, zeroed.
    pub fn alloc_run(&mut self, memory: &impl PhysMem, count: usize) -> Option<FrameRun> {
        if count == 0 || count > self.free || self.is_to_fail() {
            return None;
        }
        let first = (0..=self.frames - count).find(|first| (*first..first + count).all(|i| !self.is_used(i)))?;
        for index in first..first + count {
            *self.used.get_mut(index / 64)? |= 1 << (index % 64);
        }
        self.free -= count;
        let run = FrameRun { first: self.hpa(first), frames: count };
        memory.zero(run.at(0), count as u64 * PAGE_SIZE);
        Some(run)
    }

    /// Takes a frame back. A frame of another pool is ignored.
    pub fn free(&mut self, frame: Frame) {
        let Some(index) = frame.0.get().checked_sub(self.base).map(|offset| (offset / PAGE_SIZE) as usize) else {
            return;
        };
        if index < self.frames && self.is_used(index) {
            if let Some(word) = self.used.get_mut(index / 64) {
                *word &= !(1 << (index % 64));
                self.free += 1;
            }
        }
    }

    /// Takes a frame for a table that other tables lead to: from here on its address, which stands in an entry, is the frame. Only
    /// the code that builds such tables may ask for this and the next two (`tests/unsafe_page.rs`).
    #[inline]
    pub fn alloc_table(&mut self, memory: &impl PhysMem) -> Option<Hpa> {
        let frame = self.alloc(memory)?;
        #[cfg(all(debug_assertions, not(target_os = "none")))]
        self.tables.insert(frame.0);
        Some(frame.0)
    }

    /// Takes a table back to which no entry leads any more.
    #[inline]
    pub fn free_table(&mut self, table: Hpa) {
        #[cfg(all(debug_assertions, not(target_os = "none")))]
        assert!(self.tables.remove(&table), "{table} is no table");
        self.free(Frame(table));
    }

    /// The right to write to an entry of a table.
    #[inline(always)]
    pub fn table_entry(&self, entry: Hpa) -> Place<'_> {
        #[cfg(all(debug_assertions, not(target_os = "none")))]
        assert!(self.tables.contains(&Hpa::new(entry.get() & !(PAGE_SIZE - 1))), "{entry} is in no table");
        Place::new(entry)
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
        PhysMem::write_u64(&memory, frame.at(0), 0x1234);
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
        let run = pool.alloc_run(&memory, 2).unwrap();
        run.into_frames().for_each(|frame| other.free(frame));
        assert_eq!((pool.available(), other.available()), (0, 2));
    }

    #[test]
    fn the_right_to_write_ends_with_the_frames() {
        let (mut pool, memory) = pool(3);
        let (frame, run) = (pool.alloc(&memory).unwrap(), pool.alloc_run(&memory, 2).unwrap());
        for offset in [0, 8, 4095, 4096, 8191, 8192, u64::MAX] {
            let of = |start: Hpa, bytes| start.get()..start.get() + bytes;
            assert!(of(frame.hpa(), PAGE_SIZE).contains(&frame.at(offset).hpa().get()), "{offset}");
            assert!(of(run.hpa(), 2 * PAGE_SIZE).contains(&run.at(offset).hpa().get()), "{offset}");
        }
        assert_eq!(run.at(4104).hpa().get() - run.hpa().get(), 4104);
        assert_eq!(run.into_frames().count(), 2);
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "is in no table")]
    fn a_frame_that_is_no_table_has_no_entries() {
        let (mut pool, memory) = pool(1);
        let frame = pool.alloc(&memory).unwrap();
        let _ = pool.table_entry(frame.hpa());
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
                    _ => if let Some(run) = pool.alloc_run(&memory, n) {
                        for i in 0..n as u64 {
                            prop_assert!(taken.insert(run.hpa().get() + i * PAGE_SIZE));
                        }
                    },
                }
                prop_assert_eq!(pool.available() + taken.len(), pool.total());
                prop_assert!(taken.iter().all(|a| a % PAGE_SIZE == 0 && (0x1000..0x1000 + 150 * PAGE_SIZE).contains(a)));
            }
        }
    }
}
