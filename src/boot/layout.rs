//! Where nvmx settles: the top of usable memory below 4 GiB.
//!
//! At the top, so that every image loads where it was linked and finds low memory free. Below 4 GiB, so that 32-bit
//! pointers of boot protocols reach everything. In multiples of 2 MiB, so that ept01 keeps large pages around it.

use core::fmt;

use crate::mm::{MemoryMap, Span, map::RangeKind};

const MIB: u64 = 1 << 20;
const ALIGN: u64 = 2 * MIB;
/// Nothing of nvmx above it.
const LIMIT: u64 = 1 << 32;
/// Frames for page tables, EPT tables and VMCSs: at most, and what nvmx cannot do without.
const MOST_FRAMES: u64 = 32 * MIB;
const LEAST_FRAMES: u64 = 4 * MIB;
/// What L2 must be left with to be worth starting.
const LEAST_FOR_GUEST: u64 = 16 * MIB;

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

/// Chooses nvmx's range: `image` bytes for the image, the rest for frames. It keeps off `occupied`, which is what the
/// loader put into usable memory: modules, and the image where it runs now.
pub fn choose(
    memory: &MemoryMap,
    occupied: impl IntoIterator<Item = Span>,
    image: u64,
) -> Result<Span, TooLittleMemory> {
    let size = |frames: u64| (image + frames).next_multiple_of(ALIGN);
    let usable = memory.usable_bytes();
    let mut free = memory.clone();
    // A map that grows too long by this is refused like one without room: no place is known to be free.
    let marked = occupied.into_iter().all(|span| free.set(span.outer_pages(), RangeKind::Reserved).is_ok());
    let below = Span::new(MIB, LIMIT);
    let largest = free.usable().map(|span| span.intersection(below).len()).max().unwrap_or(0);
    let error = TooLittleMemory { usable, needed: size(LEAST_FRAMES), largest };

    let mut frames = (usable / 8).clamp(LEAST_FRAMES, MOST_FRAMES);
    while marked && frames >= LEAST_FRAMES {
        if usable >= size(frames) + LEAST_FOR_GUEST {
            if let Some(place) = free.highest_free(size(frames), ALIGN, below) {
                return Ok(place);
            }
        }
        frames -= MIB;
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(ranges: &[(u64, u64)]) -> MemoryMap {
        let mut map = MemoryMap::new();
        for (start, end) in ranges {
            map.add(Span::new(*start, *end), RangeKind::Usable).unwrap();
        }
        map
    }

    #[test]
    fn nvmx_settles_at_the_top_below_4_gib() {
        let memory = map(&[(0, 0x9_F000), (MIB, 0xBFFE_0000), (1 << 32, 5 << 30)]);
        let own = choose(&memory, [Span::new(MIB, 2 * MIB)], 0x8_0000).unwrap();
        assert_eq!(own, Span::new(0xBFE0_0000 - 34 * MIB, 0xBFE0_0000));
    }

    #[test]
    fn nvmx_keeps_off_a_module_at_the_top() {
        let memory = map(&[(MIB, 256 * MIB)]);
        let module = Span::new(255 * MIB, 256 * MIB);
        let own = choose(&memory, [module], 0x8_0000).unwrap();
        assert_eq!(own.end(), 254 * MIB);
    }

    #[test]
    fn a_second_nvmx_settles_below_the_first() {
        let mut memory = map(&[(MIB, 256 * MIB)]);
        let first = choose(&memory, [], 0x8_0000).unwrap();
        memory.set(first, RangeKind::Reserved).unwrap();
        let second = choose(&memory, [], 0x8_0000).unwrap();
        assert_eq!(second.end(), first.start());
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed() {
        let error = choose(&map(&[(MIB, 16 * MIB)]), [], 0x8_0000).unwrap_err();
        assert_eq!(error.to_string(), "too little memory: 15 MiB usable, nvmx needs 6 MiB and L2 at least 16 MiB");
    }

    #[test]
    fn fragmented_memory_says_how_large_the_largest_piece_is() {
        let memory = map(&[(2 * MIB, 7 * MIB), (1 << 32, 2 << 32)]);
        let error = choose(&memory, [], 0x8_0000).unwrap_err();
        assert!(error.to_string().ends_with("the largest free piece below 4 GiB has 5 MiB"), "{error}");
    }

    proptest! {
        #[test]
        fn the_place_is_usable_aligned_and_keeps_off_what_is_occupied(
            ranges in prop::collection::vec((0u64..0x2000, 1u64..0x800), 1..6),
            occupied in prop::collection::vec((0u64..0x2000, 1u64..0x100), 0..6),
            image in 1u64..0x20_0000,
        ) {
            let scale = |(start, len): &(u64, u64)| (start * MIB / 2, (start + len) * MIB / 2);
            let memory = map(&ranges.iter().map(scale).collect::<Vec<_>>());
            let occupied: Vec<Span> = occupied.iter().map(scale).map(|(s, e)| Span::new(s, e)).collect();
            if let Ok(own) = choose(&memory, occupied.clone(), image) {
                prop_assert!(memory.is_usable(own));
                prop_assert!(own.start() % ALIGN == 0 && own.end() % ALIGN == 0 && own.end() <= LIMIT);
                prop_assert!(own.len() >= image + LEAST_FRAMES);
                prop_assert!(occupied.iter().all(|span| !span.overlaps(own)));
                prop_assert!(memory.usable_bytes() - own.len() >= LEAST_FOR_GUEST);
            }
        }
    }
}
