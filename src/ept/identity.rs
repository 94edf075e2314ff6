//! ept01: L2's memory is the machine's, one to one, without nvmx.
//!
//! Pages are the largest that the processor offers, that lie outside nvmx's range, and that have one memory type.
//! Tables are freed by [`Ept01::join`] alone, so until then the address of an entry stays valid: a
//! [`Watch`](super::Watch) is one.
//!
//! Source: Intel SDM vol. 3C (December 2024), "EPT Translation Mechanism" and "EPT and Memory Typing".

use super::entry::{self, ADDRESS, Caching, EptRules, Level, Rights};
use super::eptp::Eptp;
use super::watch::VERSION;
use super::{OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa};
use crate::mm::Span;
use crate::mm::mtrr::MemoryType;

/// What [`Ept01::map_missing`] found.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolved {
    /// It is mapped now.
    Mapped,
    /// It was mapped already.
    Present,
    /// It belongs to nvmx.
    Forbidden,
    /// It lies beyond the physical-address width.
    BeyondPhysical,
}

/// The identity map of one machine.
#[derive(Debug)]
pub struct Ept01 {
    root: Hpa,
    rules: EptRules,
    /// nvmx's own memory.
    forbidden: Span,
    accessed_dirty: bool,
    tables: u32,
    /// How often the versions of watched pages came round.
    pub(super) round: u64,
}

impl Ept01 {
    /// Maps everything below `end` (rounded up to 1 GiB) except `forbidden` (rounded outwards to 4 KiB).
    ///
    /// `memory_type(start, bytes)` is the one type of that range, or `None` if it has more than one; ranges are aligned
    /// to their size, and a 4 KiB page of more than one type becomes uncacheable. `rules` and `accessed_dirty` are the
    /// real processor's.
    pub fn new<F: TableFrames>(
        rules: EptRules,
        accessed_dirty: bool,
        end: Gpa,
        forbidden: Span,
        memory_type: impl Fn(Gpa, u64) -> Option<MemoryType>,
        frames: &mut F,
    ) -> Result<Self, OutOfFrames> {
        let root = frames.alloc().ok_or(OutOfFrames)?;
        let mut ept = Self { root, rules, forbidden: forbidden.outer_pages(), accessed_dirty, tables: 1, round: 0 };
        let mut start = 0u64;
        while start < end.get() && rules.allows_address(start) && start >> 48 == 0 {
            ept.map_gib(start, &memory_type, frames)?;
            start = start.saturating_add(Level::Pdpt.bytes());
        }
        Ok(ept)
    }

    /// The EPTP for vmcs01.
    pub const fn eptp(&self) -> Eptp {
        Eptp::of_four_levels(self.root, self.accessed_dirty)
    }

    /// Frames in use.
    pub const fn tables(&self) -> u32 {
        self.tables
    }

    /// Handles a violation of L2 at `gpa`: maps its 1 GiB region if that is missing, for instance a device high up. No
    /// INVEPT is needed, since what was missing was not cached.
    pub fn map_missing<F: TableFrames>(
        &mut self,
        gpa: Gpa,
        memory_type: impl Fn(Gpa, u64) -> Option<MemoryType>,
        frames: &mut F,
    ) -> Result<Resolved, OutOfFrames> {
        if !self.rules.allows_address(gpa.get()) || gpa.get() >> 48 != 0 {
            return Ok(Resolved::BeyondPhysical);
        }
        if self.forbidden.overlaps(Span::sized(gpa.get(), 1)) {
            return Ok(Resolved::Forbidden);
        }
        if self.leaf(gpa, frames).is_some() {
            return Ok(Resolved::Present);
        }
        self.map_gib(gpa.get() - Level::Pdpt.offset(gpa.get()), &memory_type, frames)?;
        Ok(Resolved::Mapped)
    }

    /// Maps `gpa`, if L2 may have it, by a 4 KiB page from now on. No INVEPT is done.
    pub fn make_small<F: TableFrames>(
        &mut self,
        gpa: Gpa,
        memory_type: impl Fn(Gpa, u64) -> Option<MemoryType>,
        frames: &mut F,
    ) -> Result<(), OutOfFrames> {
        let _ = self.map_missing(gpa, memory_type, frames)?;
        self.split(gpa, frames).map(|_| ())
    }

    /// Gives the page of `gpa` a leaf of its own, 4 KiB, and returns where that lies: `None` if `gpa` is not mapped. A
    /// large page that is split keeps its rights and type, and its pages start with clear flags: INVEPT before relying
    /// on these.
    pub(super) fn split<F: TableFrames>(&mut self, gpa: Gpa, frames: &mut F) -> Result<Option<Hpa>, OutOfFrames> {
        loop {
            let Some((at, level)) = self.leaf(gpa, frames) else { return Ok(None) };
            let Some(below) = level.below() else { return Ok(Some(at)) };
            let large = frames.read(at);
            let table = self.alloc(frames)?;
            // Clear in a 4 KiB leaf, where bit 7 is ignored, so that an entry looks the same however it came to be.
            let flags = match below {
                Level::Pt => entry::LARGE | entry::ACCESSED | entry::DIRTY,
                _ => entry::ACCESSED | entry::DIRTY,
            };
            for index in 0..512 {
                frames.write(Hpa::new(table.get() | index << 3), (large & !flags) + index * below.bytes());
            }
            frames.write(at, entry::table_entry(table));
        }
    }

    /// Puts pages that were split together again and frees their tables; all watches end. If the answer is true, execute
    /// INVEPT before L2 runs or a frame is used again.
    pub fn join<F: TableFrames>(&mut self, frames: &mut F) -> bool {
        self.end_watches();
        let before = self.tables;
        self.join_in(self.root, Level::Pml4, frames);
        self.tables != before
    }

    /// Joins what the entries of a table lead to.
    fn join_in<F: TableFrames>(&mut self, table: Hpa, level: Level, frames: &mut F) {
        let Some(below) = level.below() else { return };
        for index in 0..512 {
            let at = Hpa::new(table.get() | index << 3);
            let old = frames.read(at);
            if !entry::is_present(old) || entry::is_leaf(old, level) {
                continue;
            }
            let child = Hpa::new(old & ADDRESS);
            self.join_in(child, below, frames);
            if let Some(page) = self.whole(child, level, below, frames) {
                frames.write(at, page);
                frames.free(child);
                self.tables -= 1;
            }
        }
    }

    /// The leaf at `level` that says what all entries of `table`, one level below, say together; `None` if none does.
    fn whole<F: TableFrames>(&self, table: Hpa, level: Level, below: Level, frames: &F) -> Option<u64> {
        const CHUNK: usize = 64;
        let flags = entry::ACCESSED | entry::DIRTY | VERSION;
        let first = frames.read(table) & !flags;
        if !entry::is_present(first) || !entry::is_leaf(first, below) || !self.splittable(level) {
            return None;
        }
        let (mut expected, mut entries) = (first, [0; CHUNK]);
        for chunk in 0..(512 / CHUNK) as u64 {
            frames.read_all(Hpa::new(table.get() | (chunk * 8 * CHUNK as u64)), &mut entries);
            let mut differs = 0;
            for entry in entries {
                differs |= (entry ^ expected) & !flags;
                expected += below.bytes();
            }
            if differs != 0 {
                return None;
            }
        }
        Some(first | entry::LARGE)
    }

    /// True when the processor sets accessed and dirty flags in this map.
    pub(super) const fn has_dirty_flags(&self) -> bool {
        self.accessed_dirty
    }

    /// The leaf that maps `gpa`: where its entry lies, and in which table.
    fn leaf<F: TableFrames>(&self, gpa: Gpa, frames: &F) -> Option<(Hpa, Level)> {
        use super::walk::{OwnTables, Walk, walk};
        match walk(&mut OwnTables(frames), (self.root, Level::Pml4), gpa.get(), &self.rules) {
            Walk::Leaf(leaf) => Some((leaf.entry, leaf.level)),
            _ => None,
        }
    }

    fn map_gib<F: TableFrames>(
        &mut self,
        start: u64,
        memory_type: &impl Fn(Gpa, u64) -> Option<MemoryType>,
        frames: &mut F,
    ) -> Result<(), OutOfFrames> {
        let at = Hpa::new(self.root.get() | Level::Pml4.entry_offset(start));
        let mut pdpt = Hpa::new(frames.read(at) & ADDRESS);
        if pdpt.get() == 0 {
            pdpt = self.alloc(frames)?;
            frames.write(at, entry::table_entry(pdpt));
        }
        self.place(pdpt, Level::Pdpt, start, memory_type, frames)
    }

    /// Completes the entry of `table` that covers `start`: a page, a table of smaller pages, or nothing where all of it
    /// is nvmx's. What is there already stays, so an attempt that ran out of frames can be taken up again.
    fn place<F: TableFrames>(
        &mut self,
        table: Hpa,
        level: Level,
        start: u64,
        memory_type: &impl Fn(Gpa, u64) -> Option<MemoryType>,
        frames: &mut F,
    ) -> Result<(), OutOfFrames> {
        let at = Hpa::new(table.get() | level.entry_offset(start));
        let block = Span::sized(start, level.bytes());
        if self.forbidden.contains(block) {
            return Ok(());
        }
        let old = frames.read(at);
        if entry::is_present(old) && entry::is_leaf(old, level) {
            return Ok(());
        }
        let page = |memory_type| entry::leaf_entry(Hpa::new(start), level, Rights::RWX, Caching::with_pat(memory_type));
        let uniform = memory_type(Gpa::new(start), level.bytes());
        let Some(below) = level.below() else {
            frames.write(at, page(uniform.unwrap_or(MemoryType::Uncacheable)));
            return Ok(());
        };
        let may_be_large = !entry::is_present(old) && self.splittable(level) && !self.forbidden.overlaps(block);
        if let (Some(uniform), true) = (uniform, may_be_large) {
            frames.write(at, page(uniform));
            return Ok(());
        }
        let mut child = Hpa::new(old & ADDRESS);
        if !entry::is_present(old) {
            child = self.alloc(frames)?;
            frames.write(at, entry::table_entry(child));
        }
        for index in 0..512 {
            self.place(child, below, start + index * below.bytes(), memory_type, frames)?;
        }
        Ok(())
    }

    /// True when a leaf may stand at `level` and can be split level by level.
    fn splittable(&self, level: Level) -> bool {
        self.rules.allows_leaf(level) && level.below().is_none_or(|below| self.splittable(below))
    }

    fn alloc<F: TableFrames>(&mut self, frames: &mut F) -> Result<Hpa, OutOfFrames> {
        let table = frames.alloc().ok_or(OutOfFrames)?;
        self.tables += 1;
        Ok(table)
    }
}
