//! What each table of ept02 was composed of: a record for each table.
//!
//! A record names the table of ept12 and the rights that the entries above it grant, and holds the watch of that table's
//! page in ept01. As long as the page was not written, the table of ept02 follows from it, and INVEPT of L2 needs no look at its
//! entries. The entry that references the table carries the record's number, so that a walk down ept02 finds it.
//!
//! That a table follows from its origin holds since it was compared, and is kept up by whoever writes a leaf: one that comes
//! from another table of ept12, or by entries with other rights, makes the origin unknown ([`Origins::filled`]). Then the
//! table above is looked at again, and the origin found anew.
//!
//! Records lie in frames of nvmx's pool, 64 in each.

use super::TableFrames;
use super::entry::{Level, MAX_NUMBER, Rights};
use super::watch::Watch;
use crate::addr::{Gpa, Hpa};
use arrayvec::ArrayVec;

/// Bytes of a record, and how many lie in a frame.
const SIZE: u64 = 64;
const IN_FRAME: u16 = 64;
/// Frames of records at most: as many as numbers go.
const FRAMES: usize = (MAX_NUMBER as usize + 1) / IN_FRAME as usize;

// Words of a record.
/// The table of ept12 and the rights above it; 0 while not known, `PIECES` for the pieces of a page.
const SOURCE: u64 = 0;
/// The watch of its page. Bit 0: the entries of the table must be looked at. Bit 1: there is no watch.
const WATCH: u64 = 8;
/// Where the record behind lies, 0 at the end; behind the watch, so that one read gives both.
const NEXT: u64 = WATCH + 8;
/// The entry of ept02 that references the table; 0 for a root.
const ENTRY: u64 = 40;
/// First address that the table translates, and its level.
const PLACE: u64 = 24;
/// The records before and behind in the list of its level, that of the table above, and its own number: 16 bits each.
const LINKS: u64 = 32;

const MARK: u64 = 1;
const NO_WATCH: u64 = 2;

/// Where a record lies: whoever goes through a list does without numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FirstRecord(u64);

impl FirstRecord {
    /// The watch, if there is one and the table is not marked; and the next record of the level.
    #[inline(always)]
    pub(super) fn unmarked_watch_and_next<F: TableFrames>(self, frames: &F) -> (Option<Watch>, Option<Self>) {
        let [watch, next] = frames.read_pair(Hpa::new(self.0 + WATCH));
        (Watch::from_raw(watch), Self::from_raw(next))
    }

    /// The table must be looked at.
    pub(super) fn is_marked<F: TableFrames>(self, frames: &F) -> bool {
        frames.read(Hpa::new(self.0 + WATCH)) & MARK != 0
    }

    /// The next record of the level.
    #[inline(always)]
    pub(super) fn next<F: TableFrames>(self, frames: &F) -> Option<Self> {
        Self::from_raw(frames.read(Hpa::new(self.0 + NEXT)))
    }

    const fn from_raw(at: u64) -> Option<Self> {
        if at == 0 { None } else { Some(Self(at)) }
    }
}

/// Where the entries of a table come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Origin(u64);

impl Origin {
    /// Not known.
    pub(super) const UNKNOWN: Self = Self(0);
    /// One page of ept12, cut in pieces: the table above knows which.
    pub(super) const PIECES: Self = Self(1 << 63);

    /// A table of ept12, below entries that grant `rights` together.
    #[inline(always)]
    pub(super) const fn table(table: Gpa, rights: Rights) -> Self {
        Self(table.page().get() | rights.bits() as u64)
    }

    /// The page of the table of ept12, if it is one.
    pub(super) fn page(self) -> Option<Gpa> {
        (self != Self::UNKNOWN && self != Self::PIECES).then_some(Gpa::new(self.0 & super::entry::ADDRESS))
    }

    /// The rights above it.
    pub(super) const fn rights(self) -> Rights {
        Rights::of(self.0)
    }
}

/// The tables below a root, and the lists of their records by level.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// How many there are.
    pub(super) count: u32,
    /// A table has no record, for want of frames or numbers: all must be compared.
    pub(super) unrecorded: bool,
    heads: [u16; 5],
    places: [u64; 5],
}

impl Tables {
    /// None.
    pub(super) const fn new() -> Self {
        Self { count: 0, unrecorded: false, heads: [0; 5], places: [0; 5] }
    }

    /// The first record of a level.
    pub(super) const fn first(&self, level: Level) -> Option<FirstRecord> {
        FirstRecord::from_raw(self.places[level as usize - 1])
    }

    fn set_first(&mut self, level: Level, number: u16, place: u64) {
        self.heads[level as usize - 1] = number;
        self.places[level as usize - 1] = place;
    }
}

/// All records of a processor's ept02.
#[derive(Debug, Default)]
pub(super) struct Origins {
    on: bool,
    frames: ArrayVec<Hpa, FRAMES>,
    /// Numbers handed out so far, and the first of those that came back.
    made: u16,
    free: u16,
}

impl Origins {
    /// Records are kept from now on; there is no table yet.
    pub(super) fn start(&mut self) {
        self.on = true;
    }

    /// True when records are kept.
    pub(super) const fn are_kept(&self) -> bool {
        self.on
    }

    /// Forgets all records, whose tables are gone.
    pub(super) fn stop<F: TableFrames>(&mut self, frames: &mut F) {
        self.frames.drain(..).for_each(|frame| frames.free(frame));
        *self = Self::default();
    }

    /// A record for a new table at `entry`, whose origin is not known and whose entries must be looked at; 0 if none is kept.
    pub(super) fn add<F: TableFrames>(
        &mut self,
        tables: &mut Tables,
        level: Level,
        base: u64,
        entry: Hpa,
        above: u16,
        frames: &mut F,
    ) -> u16 {
        if !self.on {
            return 0;
        }
        let Some(number) = self.take(frames) else {
            tables.unrecorded = true;
            return 0;
        };
        let head = tables.heads[level as usize - 1];
        self.write(number, SOURCE, Origin::UNKNOWN.0, frames);
        self.write(number, WATCH, NO_WATCH | MARK, frames);
        self.write(number, ENTRY, entry.get(), frames);
        self.write(number, PLACE, base | level as u64, frames);
        self.write(number, LINKS, u64::from(head) << 16 | u64::from(above) << 32 | u64::from(number) << 48, frames);
        self.write(number, NEXT, self.place(head), frames);
        if head != 0 {
            let links = self.read(head, LINKS, frames);
            self.write(head, LINKS, links & !0xffff | u64::from(number), frames);
        }
        tables.set_first(level, number, self.place(number));
        number
    }

    /// The table of a record is gone.
    pub(super) fn remove<F: TableFrames>(&mut self, tables: &mut Tables, number: u16, frames: &mut F) {
        // All go together where no more are kept.
        if number == 0 || !self.on {
            return;
        }
        let links = self.read(number, LINKS, frames);
        let (before, behind) = (links as u16, (links >> 16) as u16);
        if before == 0 {
            tables.set_first(self.level(number, frames), behind, self.place(behind));
        } else {
            let links = self.read(before, LINKS, frames);
            self.write(before, LINKS, links & !0xffff_0000 | u64::from(behind) << 16, frames);
            self.write(before, NEXT, self.place(behind), frames);
        }
        if behind != 0 {
            let links = self.read(behind, LINKS, frames);
            self.write(behind, LINKS, links & !0xffff | u64::from(before), frames);
        }
        self.write(number, LINKS, self.free.into(), frames);
        // Whoever remembers its place is to see that it is no longer marked.
        self.write(number, WATCH, NO_WATCH, frames);
        self.free = number;
    }

    fn take<F: TableFrames>(&mut self, frames: &mut F) -> Option<u16> {
        if self.free != 0 {
            let number = self.free;
            self.free = self.read(number, LINKS, frames) as u16;
            return Some(number);
        }
        let number = self.made + 1;
        if number > MAX_NUMBER {
            return None;
        }
        if usize::from(number / IN_FRAME) >= self.frames.len() {
            self.frames.try_push(frames.alloc()?).ok()?;
        }
        self.made = number;
        Some(number)
    }

    /// A leaf was written into the table of a record, composed of an entry of `origin`.
    #[inline(always)]
    pub(super) fn filled<F: TableFrames>(&mut self, number: u16, origin: Origin, frames: &mut F) {
        if number != 0 && self.read(number, SOURCE, frames) != origin.0 {
            self.lose(number, frames);
        }
    }

    #[cold]
    fn lose<F: TableFrames>(&mut self, number: u16, frames: &mut F) {
        self.set_origin(number, Origin::UNKNOWN, frames);
        self.mark_finder(self.above(number, frames), frames);
    }

    /// The origin of a table below that of `number` is not known: whoever finds it must be looked at. Of the pieces of a page
    /// that is the table with the entry for the page.
    pub(super) fn mark_finder<F: TableFrames>(&mut self, number: u16, frames: &mut F) {
        let mut number = number;
        while number != 0 {
            self.mark(number, frames);
            if self.origin(number, frames) != Origin::PIECES {
                return;
            }
            number = self.above(number, frames);
        }
    }

    /// The entries of the table must be looked at.
    pub(super) fn mark<F: TableFrames>(&mut self, number: u16, frames: &mut F) {
        if number != 0 {
            let watch = self.read(number, WATCH, frames);
            self.write(number, WATCH, watch | MARK, frames);
        }
    }

    /// They are looked at now.
    pub(super) fn unmark<F: TableFrames>(&mut self, number: u16, frames: &mut F) {
        let watch = self.read(number, WATCH, frames);
        self.write(number, WATCH, watch & !MARK, frames);
    }

    pub(super) fn is_marked<F: TableFrames>(&self, number: u16, frames: &F) -> bool {
        self.read(number, WATCH, frames) & MARK != 0
    }

    /// What is known of the origin.
    pub(super) fn origin<F: TableFrames>(&self, number: u16, frames: &F) -> Origin {
        Origin(self.read(number, SOURCE, frames))
    }

    /// Another origin, whose page is not watched yet.
    pub(super) fn set_origin<F: TableFrames>(&mut self, number: u16, origin: Origin, frames: &mut F) {
        self.write(number, SOURCE, origin.0, frames);
        self.set_watch(number, None, frames);
    }

    /// The watch of the table's page in ept12.
    #[inline(always)]
    pub(super) fn watch<F: TableFrames>(&self, number: u16, frames: &F) -> Option<Watch> {
        Watch::from_raw(self.read(number, WATCH, frames) & !MARK)
    }

    /// Watches it otherwise; a mark stays.
    pub(super) fn set_watch<F: TableFrames>(&mut self, number: u16, watch: Option<Watch>, frames: &mut F) {
        let mark = self.read(number, WATCH, frames) & MARK;
        self.write(number, WATCH, watch.map_or(NO_WATCH, Watch::raw) | mark, frames);
    }

    /// First address that the table translates.
    pub(super) fn base<F: TableFrames>(&self, number: u16, frames: &F) -> u64 {
        self.read(number, PLACE, frames) & super::entry::ADDRESS
    }

    /// The level of the table.
    pub(super) fn level<F: TableFrames>(&self, number: u16, frames: &F) -> Level {
        match self.read(number, PLACE, frames) & 7 {
            1 => Level::Pt,
            2 => Level::Pd,
            3 => Level::Pdpt,
            4 => Level::Pml4,
            _ => Level::Pml5,
        }
    }

    /// Where the entry lies that references the table; `None` for a root.
    pub(super) fn entry<F: TableFrames>(&self, number: u16, frames: &F) -> Option<Hpa> {
        Some(Hpa::new(self.read(number, ENTRY, frames))).filter(|entry| entry.get() != 0)
    }

    /// The record of the table above; 0 for a root.
    pub(super) fn above<F: TableFrames>(&self, number: u16, frames: &F) -> u16 {
        (self.read(number, LINKS, frames) >> 32) as u16
    }

    /// The number of the record at a place.
    pub(super) fn number<F: TableFrames>(&self, place: FirstRecord, frames: &F) -> u16 {
        (frames.read(Hpa::new(place.0 + LINKS)) >> 48) as u16
    }

    /// Where a record lies; 0 for none.
    fn place(&self, number: u16) -> u64 {
        if number == 0 { 0 } else { self.at(number, 0).get() }
    }

    #[inline(always)]
    fn at(&self, number: u16, word: u64) -> Hpa {
        // A number that was handed out has a frame.
        let frame = self.frames.get(usize::from(number / IN_FRAME)).map_or(0, |frame| frame.get());
        Hpa::new(frame + u64::from(number % IN_FRAME) * SIZE + word)
    }

    #[inline(always)]
    fn read<F: TableFrames>(&self, number: u16, word: u64, frames: &F) -> u64 {
        frames.read(self.at(number, word))
    }

    #[inline(always)]
    fn write<F: TableFrames>(&self, number: u16, word: u64, value: u64, frames: &mut F) {
        frames.write(self.at(number, word), value);
    }
}
