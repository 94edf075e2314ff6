//! The last exits of a processor, in nvmx's own memory (`trace=N`).
//!
//! Each processor writes a ring of its own and nobody else does. Rings are chained by a word of their heads, so that one
//! processor can tell of all at the end, while the others may still write: what is written over meanwhile is left out.

use crate::addr::Hpa;
use crate::mm::{FrameRun, PhysMem};
use l2_protocol::trace::{WORDS, Words};

/// Bytes before the first exit.
const HEAD: u64 = 64;
/// Bytes of an exit.
const SIZE: u64 = 8 * WORDS as u64;
/// Words of the head: the ring that was made before (0: none), the processor's number, how many exits it holds, how many were
/// written so far.
const BEFORE: u64 = 0;
const PROCESSOR: u64 = 8;
const HOLDS: u64 = 16;
const WRITTEN: u64 = 24;

/// Where in a ring that holds so many the exit with this number lies. There is one place more than that: what is written next
/// takes none of those that are kept.
fn offset(holds: u64, number: u64) -> u64 {
    HEAD + SIZE * (number % (holds + 1))
}

/// A ring, as the processor that writes it has it.
#[derive(Debug)]
pub struct Ring {
    memory: FrameRun,
    holds: u64,
    written: u64,
}

impl Ring {
    /// Bytes that a ring for so many exits takes.
    pub const fn bytes(holds: u32) -> u64 {
        HEAD + SIZE * (holds as u64 + 1)
    }

    /// An empty ring in frames that suffice for it, chained to the one that was made before.
    pub fn new(memory: FrameRun, phys: &impl PhysMem, processor: u32, holds: u32, before: Option<Hpa>) -> Self {
        let holds = u64::from(holds);
        let before = before.map_or(0, Hpa::get);
        for (offset, value) in [(BEFORE, before), (PROCESSOR, u64::from(processor)), (HOLDS, holds), (WRITTEN, 0)] {
            phys.write_u64(memory.at(offset), value);
        }
        Ring { memory, holds, written: 0 }
    }

    /// Where it lies.
    pub fn hpa(&self) -> Hpa {
        self.memory.hpa()
    }

    /// Writes one more exit, over the oldest if the ring is full.
    pub fn push(&mut self, phys: &impl PhysMem, exit: Words) {
        phys.write_words(self.memory.at(offset(self.holds, self.written)), &exit.0);
        self.written += 1;
        phys.write_u64(self.memory.at(WRITTEN), self.written);
    }
}

/// A ring, as whoever reads it has it.
#[derive(Clone, Copy, Debug)]
pub struct Reader {
    at: Hpa,
    /// The processor's number
    pub processor: u32,
    holds: u64,
}

impl Reader {
    /// The ring that lies there.
    pub fn new(memory: &impl PhysMem, at: Hpa) -> Self {
        let read = |offset| memory.read_u64(Hpa::new(at.get() + offset));
        Reader { at, processor: read(PROCESSOR) as u32, holds: read(HOLDS) }
    }

    /// The ring that was made before it.
    pub fn before(&self, memory: &impl PhysMem) -> Option<Self> {
        let before = memory.read_u64(Hpa::new(self.at.get() + BEFORE));
        (before != 0).then(|| Self::new(memory, Hpa::new(before)))
    }

    /// How many exits were written so far.
    pub fn written(&self, memory: &impl PhysMem) -> u64 {
        memory.read_u64(Hpa::new(self.at.get() + WRITTEN))
    }

    /// The numbers of those that are there.
    pub fn kept(&self, memory: &impl PhysMem) -> core::ops::Range<u64> {
        let written = self.written(memory);
        written.saturating_sub(self.holds)..written
    }

    /// The exit with this number, if it was there and whole all the time.
    pub fn get(&self, memory: &impl PhysMem, number: u64) -> Option<Words> {
        let mut words = [0; WORDS];
        memory.read_words(Hpa::new(self.at.get() + offset(self.holds, number)), &mut words);
        let written = self.written(memory);
        // The one that comes next may be half written, in the place that is spare.
        (number < written && number.saturating_add(self.holds) >= written).then_some(Words(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::mm::phys::VecMem;
    use crate::mm::{FramePool, Span};

    fn exit(n: u64) -> Words {
        Words([n; WORDS])
    }

    fn machine() -> (VecMem, FramePool) {
        (VecMem::from_bytes(vec![0xAA; 0x10_0000]), FramePool::new(Span::new(0x1000, 0x10_0000)))
    }

    fn ring(memory: &VecMem, pool: &mut FramePool, processor: u32, holds: u32, before: Option<Hpa>) -> Ring {
        let run = pool.alloc_run(memory, Ring::bytes(holds).div_ceil(PAGE_SIZE) as usize).unwrap();
        Ring::new(run, memory, processor, holds, before)
    }

    fn all(memory: &VecMem, reader: &Reader) -> Vec<u64> {
        reader.kept(memory).filter_map(|n| reader.get(memory, n)).map(|words| words.0[0]).collect()
    }

    #[test]
    fn a_ring_keeps_the_last_exits_whatever_came_before() {
        for holds in [1, 2, 3, 8, 31, 100] {
            let (memory, mut pool) = machine();
            let mut ring = ring(&memory, &mut pool, 3, holds, None);
            let reader = Reader::new(&memory, ring.hpa());
            assert_eq!((reader.processor, reader.before(&memory).is_none()), (3, true));
            for n in 0..230u64 {
                let first = n.saturating_sub(holds.into());
                assert_eq!(all(&memory, &reader), (first..n).collect::<Vec<_>>(), "{holds} {n}");
                ring.push(&memory, exit(n));
            }
            // It takes no more than it says.
            let end = ring.hpa().get() + Ring::bytes(holds).next_multiple_of(PAGE_SIZE);
            assert!(memory.bytes(end, 64).iter().all(|byte| *byte == 0xAA));
        }
    }

    #[test]
    fn rings_of_several_processors_are_found_one_after_the_other() {
        let (memory, mut pool) = machine();
        let mut last = None;
        for n in 0..4 {
            let mut made = ring(&memory, &mut pool, n, 4, last);
            (0..u64::from(n)).for_each(|i| made.push(&memory, exit(10 * u64::from(n) + i)));
            last = Some(made.hpa());
        }
        let first = last.map(|at| Reader::new(&memory, at));
        let found = core::iter::successors(first, |reader| reader.before(&memory));
        let told: Vec<_> = found.map(|reader| (reader.processor, all(&memory, &reader))).collect();
        assert_eq!(told, [(3, vec![30, 31, 32]), (2, vec![20, 21]), (1, vec![10]), (0, vec![])]);
    }

    #[test]
    fn what_is_written_over_while_it_is_read_is_left_out() {
        let (memory, mut pool) = machine();
        let mut ring = ring(&memory, &mut pool, 0, 4, None);
        (0..4).for_each(|n| ring.push(&memory, exit(n)));
        let (reader, kept) = (Reader::new(&memory, ring.hpa()), 0..4);
        (4..6).for_each(|n| ring.push(&memory, exit(n)));
        let seen: Vec<Option<u64>> = kept.map(|n| reader.get(&memory, n).map(|words| words.0[0])).collect();
        assert_eq!(seen, [None, None, Some(2), Some(3)]);
        // What was not written yet is not there either.
        assert_eq!(reader.get(&memory, 6), None);
    }
}
