//! nvmx's own page tables: built once at boot from the frame pool.
//!
//! Source: Intel SDM vol. 3A, "4-Level Paging and 5-Level Paging", tables "Format of a Page-Table Entry ...".

use bitflags::bitflags;

use crate::{
    addr::{Hpa, PAGE_SIZE},
    mm::{FramePool, PhysMem, Place},
    x86::paging::{ACCESSED, ADDRESS, DIRTY, LARGE, NO_EXECUTE, PRESENT, UNCACHEABLE, WRITABLE},
};

bitflags! {
    /// Rights of a mapping. Every mapping is present and for the supervisor only.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct PageRights: u64 {
        /// R/W
        const WRITE = WRITABLE;
        /// PCD and PWT: strong uncacheable, by the entry of IA32_PAT that they choose after reset
        const UNCACHEABLE = UNCACHEABLE;
        /// XD: no instruction fetch
        const NO_EXECUTE = NO_EXECUTE;
    }
}

const ACCESSED_DIRTY: u64 = ACCESSED | DIRTY;

impl PageRights {
    /// nvmx's data.
    pub const DATA: Self = Self::WRITE.union(Self::NO_EXECUTE);
}

/// Size of a page that a mapping may use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum PageSize {
    /// 4 KiB
    Small,
    /// 2 MiB
    Large,
    /// 1 GiB
    Huge,
}

impl PageSize {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    const fn shift(self) -> u32 {
        match self {
            Self::Small => 12,
            Self::Large => 21,
            Self::Huge => 30,
        }
    }
}

/// The pool has no frame left for a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfFrames;

/// A tree of 4-level page tables.
#[derive(Debug)]
pub struct PageTables {
    root: Hpa,
    largest: PageSize,
}

impl PageTables {
    /// An empty tree that maps with pages of up to `largest`.
    pub fn new(pool: &mut FramePool, memory: &impl PhysMem, largest: PageSize) -> Result<Self, OutOfFrames> {
        Ok(Self { root: pool.alloc(memory).ok_or(OutOfFrames)?.hpa(), largest })
    }

    /// The value for CR3.
    pub const fn root(&self) -> Hpa {
        self.root
    }

    /// Maps `len` bytes (a multiple of 4 KiB) from `linear` on to `physical` on, in the largest pages that fit. What was
    /// mapped there before is replaced; nothing is invalidated.
    pub fn map(
        &mut self,
        pool: &mut FramePool,
        memory: &impl PhysMem,
        linear: u64,
        physical: Hpa,
        len: u64,
        rights: PageRights,
    ) -> Result<(), OutOfFrames> {
        let mut done = 0;
        while done < len {
            let (linear, physical) = (linear.wrapping_add(done), physical.get() + done);
            let fits = |size: PageSize| {
                size <= self.largest && (linear | physical) % size.bytes() == 0 && len - done >= size.bytes()
            };
            let size = [PageSize::Huge, PageSize::Large].into_iter().find(|s| fits(*s)).unwrap_or(PageSize::Small);
            self.map_page(pool, memory, linear, physical, size, rights)?;
            done += size.bytes();
        }
        Ok(())
    }

    fn map_page(
        &mut self,
        pool: &mut FramePool,
        memory: &impl PhysMem,
        linear: u64,
        physical: u64,
        size: PageSize,
        rights: PageRights,
    ) -> Result<(), OutOfFrames> {
        let mut table = self.root.get();
        let mut shift = 39;
        while shift > size.shift() {
            let slot = slot(table, linear, shift);
            let entry = memory.read_u64(slot);
            table = if entry & PRESENT != 0 && entry & LARGE == 0 {
                entry & ADDRESS
            } else {
                let below = pool.alloc(memory).ok_or(OutOfFrames)?.hpa().get();
                // Rights are decided at the leaf: upper levels allow everything.
                memory.write_u64(Place::new(slot), below | PRESENT | WRITABLE);
                below
            };
            shift -= 9;
        }
        let large = if size == PageSize::Small { 0 } else { LARGE };
        memory.write_u64(
            Place::new(slot(table, linear, shift)),
            physical & ADDRESS | PRESENT | large | ACCESSED_DIRTY | rights.bits(),
        );
        Ok(())
    }

    /// What `linear` is mapped to, with which rights: a walk as the processor does it.
    pub fn lookup(&self, memory: &impl PhysMem, linear: u64) -> Option<(Hpa, PageRights)> {
        let (at, shift) = self.leaf(memory, linear)?;
        let entry = memory.read_u64(at);
        let within = (1 << shift) - 1;
        Some((Hpa::new(entry & ADDRESS & !within | linear & within), PageRights::from_bits_truncate(entry)))
    }

    /// Where the entry lies that maps the 4 KiB page of `linear` alone: [`window_entry`] changes what the page shows.
    pub fn window(&self, memory: &impl PhysMem, linear: u64) -> Option<Hpa> {
        self.leaf(memory, linear).filter(|(_, shift)| *shift == PageSize::Small.shift()).map(|(at, _)| at)
    }

    /// The entry that maps `linear`, and how many bits of it lie within the page.
    fn leaf(&self, memory: &impl PhysMem, linear: u64) -> Option<(Hpa, u32)> {
        let mut table = self.root.get();
        for shift in [39, 30, 21, 12] {
            let at = slot(table, linear, shift);
            let entry = memory.read_u64(at);
            if entry & PRESENT == 0 {
                return None;
            }
            if shift == 12 || entry & LARGE != 0 {
                return Some((at, shift));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

/// The entry of a window onto the 4 KiB page at `physical`: data, strong uncacheable.
pub fn window_entry(physical: Hpa) -> u64 {
    let rights = PageRights::DATA | PageRights::UNCACHEABLE;
    physical.get() & ADDRESS | PRESENT | ACCESSED_DIRTY | rights.bits()
}

/// Where the entry for `linear` is in a table at the level that translates the bits from `shift` on.
const fn slot(table: u64, linear: u64, shift: u32) -> Hpa {
    Hpa::new(table + ((linear >> shift) & 511) * 8)
}

const _: () = assert!(PAGE_SIZE == PageSize::Small.bytes());

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mm::{Span, phys::VecMem};

    proptest! {
        #[test]
        fn what_is_mapped_is_found_and_nothing_else(
            linear in 0u64..0x4000, physical in 0u64..0x4000, pages in 1u64..0x1000, aligned: bool, probe in 0u64..0x8000,
            largest in prop::sample::select(vec![PageSize::Small, PageSize::Large, PageSize::Huge]),
        ) {
            let memory = VecMem::new(64 * 4096);
            let mut pool = FramePool::new(Span::new(0, 64 * 4096));
            let mut tables = PageTables::new(&mut pool, &memory, largest).unwrap();
            let align = if aligned { !0x1FF } else { !0 };
            let (linear, physical) = (0xFFFF_8000_0000_0000 | (linear & align) << 12, (physical & align) << 12);
            tables.map(&mut pool, &memory, linear, Hpa::new(physical), pages << 12, PageRights::NO_EXECUTE).unwrap();
            let at = 0xFFFF_8000_0000_0000 | probe << 12 | 0x123;
            let expected = (linear..linear + (pages << 12))
                .contains(&at)
                .then(|| (Hpa::new(at - linear + physical), PageRights::NO_EXECUTE));
            prop_assert_eq!(tables.lookup(&memory, at), expected);
        }
    }

    #[test]
    fn a_window_shows_the_page_that_its_entry_names() {
        let memory = VecMem::new(64 * 4096);
        let mut pool = FramePool::new(Span::new(0, 64 * 4096));
        let mut tables = PageTables::new(&mut pool, &memory, PageSize::Huge).unwrap();
        let (window, behind) = (0xFFFF_C000_0000_3000, 0xFFFF_C000_0000_4000);
        tables.map(&mut pool, &memory, window, Hpa::new(0x5000), 0x1000, PageRights::NO_EXECUTE).unwrap();
        tables.map(&mut pool, &memory, 0xFFFF_8000_0000_0000, Hpa::new(0), 1 << 30, PageRights::WRITE).unwrap();
        let at = tables.window(&memory, window).unwrap();
        let shown = Hpa::new(0x7F_FFFF_F000);
        memory.write_u64(at, window_entry(shown));
        let rights = PageRights::WRITE | PageRights::NO_EXECUTE | PageRights::UNCACHEABLE;
        assert_eq!(tables.lookup(&memory, window), Some((shown, rights)));
        assert_eq!(tables.window(&memory, behind), None, "not mapped");
        assert_eq!(tables.window(&memory, 0xFFFF_8000_0000_0000), None, "a large page");
    }

    #[test]
    fn an_aligned_gibibyte_takes_one_entry() {
        let memory = VecMem::new(16 * 4096);
        let mut pool = FramePool::new(Span::new(0, 16 * 4096));
        let mut tables = PageTables::new(&mut pool, &memory, PageSize::Huge).unwrap();
        tables.map(&mut pool, &memory, 0xFFFF_8000_0000_0000, Hpa::new(0), 4 << 30, PageRights::WRITE).unwrap();
        assert_eq!(pool.total() - pool.available(), 2);
    }
}
