//! The machine's memory map, as firmware and loader report it, and the map that L2 gets.
//!
//! Source: ACPI specification, "System Address Map Interfaces" (range types); Multiboot specification, "Boot information
//! format" (the same types).

use core::fmt;

use arrayvec::ArrayVec;

use crate::addr::PAGE_SIZE;

/// Most ranges a map keeps, with all that nvmx marks in it while it looks for room.
pub const MAX_RANGES: usize = 208;
/// Most ranges that are taken over from a loader, and most that L2 is told of: Linux's zero page has room for 128. nvmx marks its
/// own range, a page for INT 15h and one for ACPI's root pointer, each of which may split one.
pub const MOST_LOADED: usize = 120;
/// As [`MOST_LOADED`].
pub const MOST_TOLD: usize = 128;

const _: () = assert!(MOST_LOADED + 2 * 3 <= MOST_TOLD && MOST_TOLD <= MAX_RANGES);

/// A span of physical addresses, `start .. end`. L2 is mapped one to one, so a span means the same to nvmx and to L2.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Span {
    start: u64,
    end: u64,
}

impl Span {
    /// `start .. end`; empty when `end` is not above `start`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end > start { end } else { start } }
    }

    /// `start .. start + len`, cut at the end of the address space.
    pub const fn sized(start: u64, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// First address.
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address behind it.
    #[inline]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Bytes.
    #[inline]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// No byte at all.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.end == self.start
    }

    /// `other` lies in it as a whole. An empty one lies everywhere.
    pub const fn contains(self, other: Span) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// They share a byte.
    pub const fn overlaps(self, other: Span) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// What they share.
    pub const fn intersection(self, other: Span) -> Span {
        let start = if self.start > other.start { self.start } else { other.start };
        let end = if self.end < other.end { self.end } else { other.end };
        Span::new(start, end)
    }

    /// The whole 4 KiB pages in it.
    pub const fn inner_pages(self) -> Span {
        let start = match self.start.checked_next_multiple_of(PAGE_SIZE) {
            Some(start) => start,
            None => return Span::new(self.start, self.start),
        };
        Span::new(start, self.end & !(PAGE_SIZE - 1))
    }

    /// The 4 KiB pages that it touches.
    pub const fn outer_pages(self) -> Span {
        if self.is_empty() {
            return self;
        }
        let end = match self.end.checked_next_multiple_of(PAGE_SIZE) {
            Some(end) => end,
            None => !(PAGE_SIZE - 1),
        };
        Span::new(self.start & !(PAGE_SIZE - 1), end)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The last address, not the first behind it: that is how firmware and Linux print ranges.
        write!(f, "[{:#x}-{:#x}]", self.start, self.end.saturating_sub(1))
    }
}

/// What a range of the memory map is; in ascending order of what wins where reports overlap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RangeKind {
    /// RAM for anybody (type 1)
    Usable,
    /// ACPI tables, free after they are read (type 3)
    AcpiReclaimable,
    /// ACPI non-volatile storage (type 4)
    AcpiNvs,
    /// Not to be touched: devices, firmware, nvmx (type 2 and every unknown type)
    Reserved,
    /// Broken RAM (type 5)
    Bad,
}

impl RangeKind {
    /// From the number that E820 and multiboot use.
    pub const fn from_e820(kind: u32) -> Self {
        match kind {
            1 => Self::Usable,
            3 => Self::AcpiReclaimable,
            4 => Self::AcpiNvs,
            5 => Self::Bad,
            _ => Self::Reserved,
        }
    }

    /// The number that E820 and multiboot use.
    pub const fn e820(self) -> u32 {
        match self {
            Self::Usable => 1,
            Self::Reserved => 2,
            Self::AcpiReclaimable => 3,
            Self::AcpiNvs => 4,
            Self::Bad => 5,
        }
    }
}

/// One range of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// Where.
    pub span: Span,
    /// What.
    pub kind: RangeKind,
}

/// A report with more ranges than a map keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooManyRanges;

/// A memory map: ranges in ascending order that do not overlap, neighbours of one kind merged.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct MemoryMap {
    ranges: ArrayVec<Range, MAX_RANGES>,
}

impl MemoryMap {
    /// A map of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a reported range. Where it overlaps what is there, the more restrictive kind wins.
    pub fn add(&mut self, span: Span, kind: RangeKind) -> Result<(), TooManyRanges> {
        self.paint(span, |there| Some(there.map_or(kind, |there| there.max(kind))))
    }

    /// [`Self::add`] for a report that may be longer than [`MOST_LOADED`]: the smallest pieces of usable memory are given up
    /// then. Returns their bytes.
    pub fn add_loaded(&mut self, span: Span, kind: RangeKind) -> u64 {
        let mut given_up = 0;
        // What does not fit for a moment is as bad as what is too long.
        if self.add(span, kind).is_err() {
            return if kind == RangeKind::Usable { span.len() } else { 0 };
        }
        while self.ranges.len() > MOST_LOADED {
            let Some(smallest) = self.give_up_smallest() else {
                // Next to no memory is a machine that nvmx refuses anyway.
                self.ranges.truncate(MOST_LOADED);
                break;
            };
            given_up += smallest.len();
        }
        given_up
    }

    /// Makes `span` of one kind, whatever was there.
    pub fn set(&mut self, span: Span, kind: RangeKind) -> Result<(), TooManyRanges> {
        self.paint(span, |_| Some(kind))
    }

    /// Takes `span` out of a map that is only asked for free memory. Where there are too many ranges for that, the smallest pieces of
    /// usable memory go too.
    pub fn occupy(&mut self, span: Span) {
        while self.remove(span).is_err() {
            if self.give_up_smallest().is_none() {
                self.ranges.clear();
            }
        }
    }

    /// Takes the smallest piece of usable memory out of the map, if there is any.
    fn give_up_smallest(&mut self) -> Option<Span> {
        let smallest = self.usable().min_by_key(|usable| usable.len())?;
        self.ranges.retain(|range| range.span != smallest);
        Some(smallest)
    }

    /// Takes `span` out of the map.
    pub fn remove(&mut self, span: Span) -> Result<(), TooManyRanges> {
        self.paint(span, |_| None)
    }

    /// The ranges in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range> + '_ {
        self.ranges.iter().copied()
    }

    /// Usable ranges in ascending order.
    pub fn usable(&self) -> impl DoubleEndedIterator<Item = Span> + '_ {
        self.iter().filter(|r| r.kind == RangeKind::Usable).map(|r| r.span)
    }

    /// Bytes of usable memory.
    pub fn usable_bytes(&self) -> u64 {
        self.usable().map(Span::len).sum()
    }

    /// All of `span` is usable memory.
    pub fn is_usable(&self, span: Span) -> bool {
        span.is_empty() || self.usable().any(|usable| usable.contains(span))
    }

    /// First address behind the last range of any kind that is memory (not `Reserved`).
    pub fn end_of_memory(&self) -> u64 {
        self.iter().filter(|r| r.kind != RangeKind::Reserved).map(|r| r.span.end()).max().unwrap_or(0)
    }

    /// The highest place for `len` bytes at a multiple of `align` (a power of two) in usable memory within `bounds`.
    pub fn highest_free(&self, len: u64, align: u64, bounds: Span) -> Option<Span> {
        self.usable().rev().find_map(|usable| {
            let usable = usable.intersection(bounds);
            let start = usable.end().checked_sub(len)? & !(align - 1);
            let place = Span::sized(start, len);
            (usable.contains(place) && place.len() == len).then_some(place)
        })
    }

    /// Rebuilds the map with `kind(what was there)` in `span`.
    fn paint(
        &mut self,
        span: Span,
        kind: impl Fn(Option<RangeKind>) -> Option<RangeKind>,
    ) -> Result<(), TooManyRanges> {
        if span.is_empty() {
            return Ok(());
        }
        let mut out = MemoryMap::new();
        let mut at = span.start();
        for range in self.iter() {
            let (before, after) = (Span::new(0, span.start()), Span::new(span.end(), u64::MAX));
            out.push(range.span.intersection(before), Some(range.kind))?;
            let inside = range.span.intersection(span);
            if !inside.is_empty() {
                out.push(Span::new(at, inside.start()), kind(None))?;
                out.push(inside, kind(Some(range.kind)))?;
                at = inside.end();
            }
            if range.span.end() > span.end() {
                out.push(Span::new(at, span.end()), kind(None))?;
                at = span.end();
            }
            out.push(range.span.intersection(after), Some(range.kind))?;
        }
        out.push(Span::new(at, span.end()), kind(None))?;
        *self = out;
        Ok(())
    }

    /// Appends at the end, merging with a neighbour of the same kind.
    fn push(&mut self, span: Span, kind: Option<RangeKind>) -> Result<(), TooManyRanges> {
        let Some(kind) = kind else { return Ok(()) };
        if span.is_empty() {
            return Ok(());
        }
        match self.ranges.last_mut() {
            Some(last) if last.kind == kind && last.span.end() == span.start() => {
                last.span = Span::new(last.span.start(), span.end());
                Ok(())
            }
            _ => self.ranges.try_push(Range { span, kind }).map_err(|_| TooManyRanges),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const END: u64 = 256;

    fn kind() -> impl Strategy<Value = RangeKind> {
        (1u32..6).prop_map(RangeKind::from_e820)
    }

    fn span() -> impl Strategy<Value = Span> {
        (0..END, 0..60u64).prop_map(|(start, len)| Span::new(start, (start + len).min(END)))
    }

    /// The map as one kind per address.
    fn painted(map: &MemoryMap) -> Vec<Option<RangeKind>> {
        let mut out = vec![None; END as usize];
        for range in map.iter() {
            for at in range.span.start()..range.span.end() {
                out[at as usize] = Some(range.kind);
            }
        }
        out
    }

    proptest! {
        #[test]
        fn the_map_is_what_was_reported(
            reports in prop::collection::vec((span(), kind()), 0..12), hole in span(), own in span(),
        ) {
            let mut map = MemoryMap::new();
            let mut expected = vec![None; END as usize];
            for (span, kind) in &reports {
                map.add(*span, *kind).unwrap();
                for at in span.start()..span.end() {
                    let there: &mut Option<RangeKind> = &mut expected[at as usize];
                    *there = Some(there.map_or(*kind, |k| k.max(*kind)));
                }
            }
            prop_assert_eq!(painted(&map), expected.clone());
            map.remove(hole).unwrap();
            map.set(own, RangeKind::Reserved).unwrap();
            for at in hole.start()..hole.end() { expected[at as usize] = None; }
            for at in own.start()..own.end() { expected[at as usize] = Some(RangeKind::Reserved); }
            prop_assert_eq!(painted(&map), expected);
            for pair in map.iter().collect::<Vec<_>>().windows(2) {
                prop_assert!(pair[0].span.end() <= pair[1].span.start());
                prop_assert!(pair[0].kind != pair[1].kind || pair[0].span.end() != pair[1].span.start());
            }
        }

        #[test]
        fn the_highest_free_place_is_free_and_highest(
            reports in prop::collection::vec((span(), kind()), 0..12), len in 1u64..40, bounds in span(),
        ) {
            let mut map = MemoryMap::new();
            for (span, kind) in &reports { map.add(*span, *kind).unwrap(); }
            let fits = |start: u64| {
                let place = Span::sized(start, len);
                bounds.contains(place) && map.is_usable(place)
            };
            let highest = (0..END).rev().filter(|start| start % 4 == 0).find(|start| fits(*start));
            prop_assert_eq!(map.highest_free(len, 4, bounds).map(Span::start), highest);
        }
    }

    #[test]
    fn of_a_report_that_is_too_long_the_smallest_pieces_of_memory_are_given_up() {
        let mut map = MemoryMap::new();
        // Pieces of 1, 2, 3, ... pages, each behind a reserved page.
        let (mut at, mut given_up) = (0, 0);
        for pages in 1..=100u64 {
            given_up += map.add_loaded(Span::sized(at, PAGE_SIZE), RangeKind::Reserved);
            given_up += map.add_loaded(Span::sized(at + PAGE_SIZE, pages * PAGE_SIZE), RangeKind::Usable);
            at += (1 + pages) * PAGE_SIZE;
        }
        let usable: Vec<u64> = map.usable().map(|span| span.len() / PAGE_SIZE).collect();
        assert_eq!(usable, (81..=100).collect::<Vec<_>>());
        assert_eq!(given_up, (1..=80).sum::<u64>() * PAGE_SIZE);
        assert_eq!(map.iter().filter(|range| range.kind == RangeKind::Reserved).count(), 100);
    }

    #[test]
    fn a_map_with_too_many_ranges_says_so_and_keeps_what_it_had() {
        let mut map = MemoryMap::new();
        for i in 0..MAX_RANGES as u64 {
            map.add(Span::sized(i * 0x2000, 0x1000), RangeKind::Usable).unwrap();
        }
        let before = map.clone();
        assert_eq!(map.add(Span::sized(1 << 40, 0x1000), RangeKind::Usable), Err(TooManyRanges));
        assert_eq!(map, before);
    }
}
