//! EPT tables: entries, the walker, ept01, ept02.
//!
//! * [`entry`] gives one entry its meaning, [`eptp`] the pointer to the root, [`violation`] the exit qualification.
//! * [`walk`] is the only walker; it reads ept12 through L2's memory and nvmx's own tables through their frames.
//! * [`identity`] builds ept01: the machine one to one without nvmx; [`watch`] notices there that L2 wrote a page.
//! * [`compose`] and [`cache`] are ept02: composed on demand from ept12, kept by role.
//!   After an INVEPT of L2, `validate` compares what changed with ept12: `origin` knows what each table was composed of,
//!   and `exposed` whose writes ept01 does not see. `reflected` drops what a violation drops;
//!   [`sub_page_table`] and `sub_pages` are spp02, composed of L2's table of sub-page write permissions;
//!   `stale` tells of what an INVEPT of L2 is missing for.
//! * [`flags`] sets accessed and dirty flags in ept12 and writes L2's page-modification log.
//!
//! Everything here is pure: what it needs of the machine are the two traits below; [`machine`] implements them on top
//! of `mm`.

pub mod cache;
pub mod compose;
pub mod entry;
pub mod eptp;
pub mod flags;
pub mod identity;
pub mod machine;
pub mod sub_page_table;
pub mod violation;
pub mod walk;
pub mod watch;

mod exposed;
mod origin;
mod reflected;
mod reserve;
mod run;
mod stale;
mod sub_pages;
mod validate;

use crate::addr::{Gpa, Hpa};

pub use crate::mm::{NotOwned, mtrr::MemoryType};
pub use cache::{Activation, Ept02, Stats};
pub use compose::Outcome;
pub use entry::{EptRules, Level, Rights};
pub use eptp::Eptp;
pub use flags::PageLog;
pub use identity::{Ept01, Resolved};
pub use machine::PoolFrames;
pub use stale::StaleLeaf;
pub use sub_pages::SubPages;
pub use violation::Qualification;
pub use watch::{Watch, WatchError};

pub use crate::mm::paging::OutOfFrames;

/// A piece of L2's memory that is contiguous in host-physical memory: what ept01 contributes to an ept02 leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// Where the block starts; aligned to the size of `level`.
    pub hpa: Hpa,
    /// Its size, as the level at which one leaf maps it.
    pub level: Level,
    /// What ept01 allows there.
    pub rights: Rights,
}

impl Block {
    /// The largest aligned block around `gpa`, at most a leaf of `at_most`, that `owned(start, bytes)` translates as a
    /// whole. `owned` answers with the host address of `start`; an answer that is not aligned like `start` cannot be
    /// mapped by a leaf of that size and counts as no answer.
    #[inline(always)]
    pub fn largest(
        gpa: Gpa,
        at_most: Level,
        rights: Rights,
        owned: impl Fn(Gpa, u64) -> Option<Hpa>,
    ) -> Result<Self, NotOwned> {
        let mut level = at_most;
        loop {
            let start = Gpa::new(gpa.get() & !(level.bytes() - 1));
            match owned(start, level.bytes()) {
                Some(hpa) if hpa.is_aligned(level.bytes()) => return Ok(Self { hpa, level, rights }),
                _ => {}
            }
            match level.below() {
                Some(below) => level = below,
                None => return Err(NotOwned(gpa)),
            }
        }
    }
}

/// L2's memory as composing needs it. The implementation is the one place where a [`Gpa`] becomes an [`Hpa`]
/// (invariants I1 and I5); nothing here reaches what L2 does not own.
pub trait GuestView {
    /// Reads the eight aligned bytes at `at`, once.
    fn read_entry(&self, at: Gpa) -> Result<u64, NotOwned>;

    /// Reads the entries from `at` on, each once; they lie in one page.
    fn read_entries(&self, at: Gpa, into: &mut [u64]) -> Result<(), NotOwned>;

    /// How many entries from `at` on, of `most` in one table, are the same as those from `first` on in a table of `frames`, before
    /// the first that is not: each is read once at most. Any smaller number is an answer too.
    fn equal_words<F: TableFrames>(&self, _at: Gpa, _frames: &F, _first: Hpa, _most: usize) -> usize {
        0
    }

    /// Sets `flags` in the entry at `at` in one atomic step, unless it is no longer `entry`, which it was when it was read:
    /// then nothing changes and the answer is false.
    fn set_flags(&self, at: Gpa, entry: u64, flags: u64) -> bool;

    /// Writes the eight aligned bytes at `at`; what L2 does not own swallows them.
    fn write_word(&self, at: Gpa, value: u64);

    /// The largest block of at most `at_most` that holds `gpa` and belongs to L2 as a whole: see [`Block::largest`].
    fn block(&self, gpa: Gpa, at_most: Level) -> Result<Block, NotOwned>;
}

/// Frames of nvmx that hold its own EPT tables, and access to the entries in them.
///
/// Addresses given to `read`, `write` and `take_bits` are those of entries: aligned to 8 bytes, in a frame that came
/// out of `alloc` and was not freed since.
pub trait TableFrames {
    /// A 4 KiB frame of zeros, or `None` when the pool is empty.
    fn alloc(&mut self) -> Option<Hpa>;
    /// Gives a frame back.
    fn free(&mut self, table: Hpa);
    /// Fills a frame with zeros.
    fn clear(&mut self, table: Hpa);
    /// Reads an entry.
    fn read(&self, entry: Hpa) -> u64;
    /// Reads an entry and the one behind it, in one table.
    #[inline]
    fn read_pair(&self, first: Hpa) -> [u64; 2] {
        [self.read(first), self.read(Hpa::new(first.get() + 8))]
    }
    /// Reads the entries from `first` on, in one table.
    fn read_all(&self, first: Hpa, into: &mut [u64]);
    /// How many entries from `first` on, of `most` in one table, are zero before the first that is not.
    fn zeros(&self, first: Hpa, most: usize) -> usize;
    /// Writes an entry; one store of eight bytes, since a processor may walk the table at the same time.
    fn write(&mut self, entry: Hpa, value: u64);
    /// Clears `bits` of an entry in one atomic step (a processor may set its flags at the same time) and tells which of
    /// them were set.
    fn take_bits(&mut self, entry: Hpa, bits: u64) -> u64;
}
