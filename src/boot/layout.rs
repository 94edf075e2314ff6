//! Where nvmx settles: the top of usable memory below 4 GiB.
//!
//! At the top, so that every image loads where it was linked and finds low memory free. Below 4 GiB, so that 32-bit
//! pointers of boot protocols reach everything. In multiples of 2 MiB, so that ept01 keeps large pages around it.

use core::fmt;

use crate::addr::{MIB, PAGE_SIZE};
use crate::mm::frames::MAX_FRAMES;
use crate::mm::{MemoryMap, Span};

const ALIGN: u64 = 2 * MIB;
/// Nothing of nvmx above it.
const LIMIT: u64 = 1 << 32;
/// Frames of the machine as a whole: page tables, the IDT, what starts processors.
const COMMON: u64 = 64 * PAGE_SIZE;
/// What a processor that runs L2 cannot do without: stacks, VMCSs and EPT tables, and as many again to compose in.
const LEAST_SHARE: u64 = 2 * MIB;
/// What it can make use of.
const MOST_SHARE: u64 = MAX_FRAMES as u64 * PAGE_SIZE;
/// What one has that runs nothing: stacks and its VMXON region.
pub const PARKED_SHARE: u64 = 80 * PAGE_SIZE;
/// All of memory in pages of 4 KiB takes a 512th of it in tables. A processor gets as much for eight guests of that kind...
const MEMORY_PER_SHARE: u64 = 64;
/// ... as long as all processors have no more than these parts: of memory, and of that below 4 GiB, where L2 needs some itself.
const MEMORY_PER_SHARES: u64 = 16;
const LOW_MEMORY_PER_SHARES: u64 = 4;
/// What L2 must be left with to be worth starting.
const LEAST_FOR_GUEST: u64 = 16 * MIB;

/// What nvmx's range is for.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Bytes of the image.
    pub image: u64,
    /// Processors of the machine.
    pub cpus: usize,
    /// How many of them are to run L2 at most.
    pub wanted: usize,
    /// The processor maps 1 GiB at once; without, each GiB takes a table of nvmx's and one in the EPT of each processor.
    pub gib_pages: bool,
    /// `frames=`: MiB of frames for all processors together.
    pub frames: Option<u32>,
    /// Bytes that are needed at the start alone.
    pub start: u64,
}

/// Where nvmx lies, and whose is what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// All of it; the image comes first.
    pub own: Span,
    /// Frames of the processor that booted, behind the image.
    pub first: Span,
    /// Frames of the others, behind those.
    pub others: Span,
    /// How many processors run L2.
    pub used: usize,
}

impl Layout {
    /// Frames of the processor with this index (from 1) of `all`, if `used` run L2: at most as many as were planned for.
    pub fn share(&self, index: usize, used: usize, all: usize) -> Span {
        let parked = PARKED_SHARE * all.saturating_sub(used) as u64;
        let one = pages(self.others.len().saturating_sub(parked) / (used.saturating_sub(1).max(1)) as u64);
        let (before, len) = match index.checked_sub(used) {
            None => (one * (index as u64).saturating_sub(1), one.min(MOST_SHARE)),
            Some(nth) => (one * (used as u64).saturating_sub(1) + PARKED_SHARE * nth as u64, PARKED_SHARE),
        };
        Span::sized(self.others.start().saturating_add(before), len).intersection(self.others)
    }
}

const fn pages(bytes: u64) -> u64 {
    bytes & !(PAGE_SIZE - 1)
}

/// nvmx does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooLittleMemory {
    usable: u64,
    needed: u64,
    largest: u64,
}

impl fmt::Display for TooLittleMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes / MIB;
        write!(
            f,
            "too little memory: {} MiB usable, nvmx needs {} MiB and L2 at least {} MiB",
            mib(self.usable),
            mib(self.needed),
            mib(LEAST_FOR_GUEST)
        )?;
        if self.usable >= self.needed + LEAST_FOR_GUEST {
            write!(f, "; the largest free piece below 4 GiB has {} MiB", mib(self.largest))?;
        }
        Ok(())
    }
}

/// Chooses nvmx's range. It keeps off `occupied`, which is what the loader put into usable memory: modules, and the image where it
/// runs now.
pub fn choose(
    memory: &MemoryMap,
    occupied: impl IntoIterator<Item = Span>,
    need: &Need,
) -> Result<Layout, TooLittleMemory> {
    let usable = memory.usable_bytes();
    let mut free = memory.clone();
    occupied.into_iter().for_each(|span| free.occupy(span.outer_pages()));
    let below = Span::new(MIB, LIMIT);
    let largest = free.usable().map(|span| span.intersection(below).len()).max().unwrap_or(0);

    let tables = if need.gib_pages { 0 } else { memory.end_of_memory().div_ceil(1 << 30) * PAGE_SIZE };
    let least = LEAST_SHARE + tables;
    let most = MOST_SHARE + tables;
    let all = need.cpus.max(1);
    // At the start there is nothing composed yet.
    let start = need.start.saturating_sub(LEAST_SHARE / 2).next_multiple_of(PAGE_SIZE);
    let rest = |used: usize| PARKED_SHARE * all.saturating_sub(used) as u64 + COMMON + tables + start;
    let size = |used: usize, share: u64| (need.image + rest(used) + used as u64 * share).next_multiple_of(ALIGN);
    let error = TooLittleMemory { usable, needed: size(1, least), largest };
    let low = memory.usable().map(|span| span.intersection(below).len()).sum::<u64>();
    let together = (usable / MEMORY_PER_SHARES).min(low / LOW_MEMORY_PER_SHARES);

    for used in (1..=need.wanted.clamp(1, all)).rev() {
        let mut share = match need.frames {
            Some(mib) => (u64::from(mib) * MIB).saturating_sub(rest(used)) / used as u64,
            None => (least + usable / MEMORY_PER_SHARE).min(together / used as u64).max(least),
        };
        share = pages(share.min(most));
        while share >= least {
            let size = size(used, share);
            // A second processor is not worth more than half of memory.
            if usable >= size + LEAST_FOR_GUEST && (used == 1 || size <= usable / 2) {
                if let Some(own) = free.highest_free(size, ALIGN, below) {
                    let shares = (used as u64 - 1) * share + PARKED_SHARE * (all - used) as u64;
                    let border = own.end() - shares;
                    let first = Span::new(own.start() + need.image, border);
                    return Ok(Layout { own, first, others: Span::new(border, own.end()), used });
                }
            }
            if need.frames.is_some() || share == least {
                break;
            }
            share = (share - MIB.min(share)).max(least);
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mm::map::RangeKind;

    fn map(ranges: &[(u64, u64)]) -> MemoryMap {
        let mut map = MemoryMap::new();
        for (start, end) in ranges {
            map.add(Span::new(*start, *end), RangeKind::Usable).unwrap();
        }
        map
    }

    const IMAGE: u64 = 0x8_0000;

    /// A machine with so many processors, all of which are to run L2.
    fn cpus(cpus: usize) -> Need {
        Need { image: IMAGE, cpus, wanted: cpus, gib_pages: true, frames: None, start: 0 }
    }

    /// A machine with so many GiB, and its hole below 4 GiB.
    fn server(gib: u64) -> MemoryMap {
        map(&[(0, 0x9_F000), (MIB, 0x7FFE_0000), (1 << 32, (gib + 2) << 30)])
    }

    /// Each processor has frames of its own that lie where they should; the shares of those that run L2.
    fn shares(layout: &Layout, all: usize) -> Vec<u64> {
        assert_eq!((layout.first.start(), layout.others.end()), (layout.own.start() + IMAGE, layout.own.end()));
        let mut end = layout.first.end();
        let mut shares = vec![layout.first.len() - COMMON];
        for index in 1..all {
            let share = layout.share(index, layout.used, all);
            assert!(share.start() >= end && share.end() <= layout.own.end(), "{index}: {share}");
            assert!(share.len() >= if index < layout.used { LEAST_SHARE } else { PARKED_SHARE }, "{index}: {share}");
            end = share.end();
            shares.push(share.len());
        }
        shares.truncate(layout.used);
        shares
    }

    #[test]
    fn what_is_needed_at_the_start_alone_is_there_and_nothing_for_what_is_usual() {
        let memory = server(4);
        let with = |start| choose(&memory, [], &Need { start, ..cpus(1) }).unwrap();
        assert_eq!(with(0x1000), with(0));
        assert!(with(5 * MIB).first.len() >= with(0).first.len() + 4 * MIB - ALIGN);
        assert!(with(5 * MIB).own.len() > with(0).own.len());
    }

    #[test]
    fn more_modules_than_a_map_has_ranges_are_all_kept_off() {
        let apart = |n: u64| Span::sized(MIB + n * 0x3000, 0x1000);
        let modules = || (0..1000).map(apart).chain([Span::sized(0x7000_0000, 0x1000)]);
        let layout = choose(&server(4), modules(), &cpus(2)).unwrap();
        assert!(modules().all(|module| !module.overlaps(layout.own)));
    }

    #[test]
    fn all_processors_of_a_large_machine_run_l2() {
        for (count, gib) in [(2, 1), (16, 2), (64, 8), (128, 64), (256, 64), (512, 64), (512, 2048)] {
            for gib_pages in [true, false] {
                let need = Need { gib_pages, ..cpus(count) };
                if !gib_pages && gib == 2048 {
                    continue;
                }
                let layout = choose(&server(gib), [], &need).unwrap();
                assert_eq!(layout.used, count, "{gib} GiB");
                let least = *shares(&layout, count).iter().min().unwrap();
                assert!(least >= LEAST_SHARE, "{count}, {gib} GiB: {least}");
            }
        }
    }

    #[test]
    fn a_small_machine_gives_a_64th_and_a_large_one_what_a_processor_can_use() {
        let size = |ranges: &[(u64, u64)]| choose(&map(ranges), [], &cpus(1)).unwrap().own.len() / MIB;
        assert_eq!(size(&[(MIB, 256 * MIB)]), 8);
        assert_eq!(size(&[(MIB, 1024 * MIB)]), 20);
        assert_eq!(size(&[(MIB, 0x7FFE_0000), (1 << 32, 66 << 30)]), 66);
    }

    #[test]
    fn the_command_line_says_how_many_frames_there_are() {
        let with = |frames, cpus| choose(&server(4), [], &Need { frames: Some(frames), ..self::cpus(cpus) });
        assert_eq!(with(32, 1).unwrap().own.len(), 34 * MIB);
        let layout = with(32, 16).unwrap();
        assert_eq!(layout.used, 15, "one processor is parked");
        shares(&layout, 16);
        assert!(with(1, 1).is_err());
        assert!(with(3000, 1).is_ok_and(|layout| layout.own.len() <= MOST_SHARE + 2 * MIB), "no more than it can use");
    }

    #[test]
    fn with_too_little_memory_fewer_processors_run_l2() {
        let layout = choose(&map(&[(MIB, 65 * MIB)]), [], &cpus(64)).unwrap();
        assert!((2..64).contains(&layout.used), "{}", layout.used);
        shares(&layout, 64);
        // The processor lacks the state in which others wait.
        let alone = (1..64).map(|index| layout.share(index, 1, 64).len());
        assert!(alone.into_iter().all(|share| share >= PARKED_SHARE));
    }

    #[test]
    fn nvmx_settles_at_the_top_below_4_gib() {
        let memory = map(&[(0, 0x9_F000), (MIB, 0xBFFE_0000), (1 << 32, 5 << 30)]);
        let own = choose(&memory, [Span::new(MIB, 2 * MIB)], &cpus(1)).unwrap().own;
        assert_eq!(own, Span::new(0xBFE0_0000 - 66 * MIB, 0xBFE0_0000));
    }

    #[test]
    fn nvmx_keeps_off_a_module_at_the_top() {
        let memory = map(&[(MIB, 256 * MIB)]);
        let module = Span::new(255 * MIB, 256 * MIB);
        let own = choose(&memory, [module], &cpus(1)).unwrap().own;
        assert_eq!(own.end(), 254 * MIB);
    }

    #[test]
    fn a_second_nvmx_settles_below_the_first() {
        let mut memory = map(&[(MIB, 256 * MIB)]);
        let first = choose(&memory, [], &cpus(1)).unwrap().own;
        memory.set(first, RangeKind::Reserved).unwrap();
        let second = choose(&memory, [], &cpus(1)).unwrap().own;
        assert_eq!(second.end(), first.start());
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed() {
        let error = choose(&map(&[(MIB, 16 * MIB)]), [], &cpus(1)).unwrap_err();
        assert_eq!(error.to_string(), "too little memory: 15 MiB usable, nvmx needs 4 MiB and L2 at least 16 MiB");
    }

    #[test]
    fn fragmented_memory_says_how_large_the_largest_piece_is() {
        let memory = map(&[(2 * MIB, 5 * MIB), (1 << 32, 2 << 32)]);
        let error = choose(&memory, [], &cpus(1)).unwrap_err();
        assert!(error.to_string().ends_with("the largest free piece below 4 GiB has 3 MiB"), "{error}");
    }

    proptest! {
        #[test]
        fn the_place_is_usable_aligned_and_keeps_off_what_is_occupied(
            ranges in prop::collection::vec((0u64..0x2000, 1u64..0x800), 1..6),
            occupied in prop::collection::vec((0u64..0x2000, 1u64..0x100), 0..6),
            image in 1u64..0x200,
            cpus in 1usize..80,
            wanted in 1usize..80,
            gib_pages: bool,
            frames in prop::option::of(1u32..200),
        ) {
            let scale = |(start, len): &(u64, u64)| (start * MIB / 2, (start + len) * MIB / 2);
            let memory = map(&ranges.iter().map(scale).collect::<Vec<_>>());
            let occupied: Vec<Span> = occupied.iter().map(scale).map(|(s, e)| Span::new(s, e)).collect();
            let image = image * PAGE_SIZE;
            let need = Need { image, cpus, wanted, gib_pages, frames, start: 0 };
            if let Ok(layout) = choose(&memory, occupied.clone(), &need) {
                let own = layout.own;
                prop_assert!(memory.is_usable(own));
                prop_assert!(own.start() % ALIGN == 0 && own.end() % ALIGN == 0 && own.end() <= LIMIT);
                prop_assert!(own.len() >= image + COMMON + layout.used as u64 * LEAST_SHARE);
                prop_assert!(occupied.iter().all(|span| !span.overlaps(own)));
                prop_assert!(memory.usable_bytes() - own.len() >= LEAST_FOR_GUEST);
                prop_assert!((1..=cpus.min(wanted)).contains(&layout.used));
                prop_assert!(layout.first.len() >= COMMON + LEAST_SHARE);
                let mut end = layout.first.end();
                for index in 1..cpus {
                    let share = layout.share(index, layout.used, cpus);
                    prop_assert!(share.start() >= end && share.end() <= own.end());
                    let least = if index < layout.used { LEAST_SHARE } else { PARKED_SHARE };
                    prop_assert!(share.len() >= least);
                    end = share.end();
                }
            }
        }
    }
}
