//! What the EPT tests share: frames that catch misuse, L2's memory on a map, and a reference for ept12 that has nothing
//! in common with the walker: it reads entries as text of bits, by the SDM's tables.
#![allow(dead_code)]

use nvmx::addr::{Gpa, Hpa};
use nvmx::ept::entry::{Level, Rights};
use nvmx::ept::{Block, Ept01, EptRules, GuestView, MemoryType, NotOwned, TableFrames, Watch, WatchError};
use nvmx::mm::Span;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};

pub const KIB4: u64 = 1 << 12;
pub const MIB2: u64 = 1 << 21;
pub const GIB1: u64 = 1 << 30;
pub const R: u64 = 1;
pub const W: u64 = 2;
pub const X: u64 = 4;
pub const XU: u64 = 1 << 10;
/// Of an entry for a table, ignored by the processor.
pub const NUMBER: u64 = 0x7ff << 52 | 1 << 11;
pub const LARGE: u64 = 1 << 7;
pub const ACCESSED: u64 = 1 << 8;
pub const DIRTY: u64 = 1 << 9;
pub const WB: u64 = 6 << 3;

/// Width of the physical addresses of the machine in these tests.
pub const WIDTH: u32 = 40;
/// nvmx's memory in these tests: 16 KiB inside the third gibibyte, so that one 2 MiB page and one 1 GiB page meet it.
pub const OWN: (u64, u64) = (2 * GIB1 + 5 * MIB2 + 0x3000, 2 * GIB1 + 5 * MIB2 + 0x7000);

pub fn rules() -> EptRules {
    EptRules::new(WIDTH, true, true, true)
}

/// A pool of frames; panics when a frame is used that is not handed out.
#[derive(Debug)]
pub struct Frames {
    pub used: BTreeMap<u64, Box<[u64; 512]>>,
    pub free: Vec<u64>,
}

impl Frames {
    /// `count` frames in nvmx's memory of a big machine.
    pub fn new(count: u64) -> Self {
        Self { used: BTreeMap::new(), free: (0..count).rev().map(|n| 0x70_0000_0000 + n * KIB4).collect() }
    }

    fn slot(&self, entry: Hpa) -> (u64, usize) {
        assert_eq!(entry.get() % 8, 0, "entries are aligned");
        (entry.get() & !0xfff, (entry.get() & 0xfff) as usize / 8)
    }

    /// All leaves below a root, given as [`levels`] has it: (address, size, entry).
    pub fn leaves(&self, root: u64) -> Vec<(u64, u64, u64)> {
        let mut found = vec![];
        self.collect(table(root), 0, 1 << shifts(root)[0], &mut found);
        found
    }

    fn collect(&self, table: u64, base: u64, covers: u64, found: &mut Vec<(u64, u64, u64)>) {
        for (index, &entry) in self.used[&table].iter().enumerate().filter(|(_, entry)| **entry & (7 | XU) != 0) {
            let address = base + index as u64 * covers;
            if covers == KIB4 || entry & LARGE != 0 {
                found.push((address, covers, entry));
            } else {
                assert_eq!(
                    entry & !0xf_ffff_ffff_f000 & !ACCESSED & !XU & !NUMBER,
                    7,
                    "an entry for a table has all rights, and else what the processor ignores"
                );
                self.collect(entry & 0xf_ffff_ffff_f000, address, covers / 512, found);
            }
        }
    }
}

impl TableFrames for Frames {
    fn alloc(&mut self) -> Option<Hpa> {
        let frame = self.free.pop()?;
        self.used.insert(frame, Box::new([0; 512]));
        Some(Hpa::new(frame))
    }
    fn free(&mut self, table: Hpa) {
        assert!(self.used.remove(&table.get()).is_some(), "{table} is not in use");
        self.free.push(table.get());
    }
    fn clear(&mut self, table: Hpa) {
        self.used.get_mut(&table.get()).expect("frame in use").fill(0);
    }
    fn read(&self, entry: Hpa) -> u64 {
        let (frame, index) = self.slot(entry);
        self.used.get(&frame).expect("frame in use")[index]
    }
    fn read_all(&self, first: Hpa, into: &mut [u64]) {
        let (frame, index) = self.slot(first);
        into.copy_from_slice(&self.used.get(&frame).expect("frame in use")[index..index + into.len()]);
    }
    fn zeros(&self, first: Hpa, most: usize) -> usize {
        let (table, index) = self.slot(first);
        self.used[&table][index..index + most].iter().take_while(|entry| **entry == 0).count()
    }
    fn write(&mut self, entry: Hpa, value: u64) {
        let (frame, index) = self.slot(entry);
        self.used.get_mut(&frame).expect("frame in use")[index] = value;
    }
    fn take_bits(&mut self, entry: Hpa, bits: u64) -> u64 {
        let old = self.read(entry);
        self.write(entry, old & !bits);
        old & bits
    }
}

/// L2's memory: words that are zero until written, all of the machine but [`OWN`]. Counts how often each entry is read.
#[derive(Debug, Default)]
pub struct L2 {
    pub words: RefCell<HashMap<u64, u64>>,
    pub fetched: RefCell<HashMap<u64, u32>>,
}

pub fn owned(start: u64, bytes: u64) -> bool {
    (start + bytes <= OWN.0 || start >= OWN.1) && start + bytes <= 1 << WIDTH
}

impl L2 {
    pub fn set(&mut self, table: u64, index: u64, entry: u64) {
        self.words.borrow_mut().insert(table + index * 8, entry);
    }

    pub fn get(&self, at: u64) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }

    /// The largest fetch count since the last call.
    pub fn most_fetches(&self) -> u32 {
        self.fetched.take().into_values().max().unwrap_or(0)
    }
}

impl GuestView for L2 {
    fn read_entry(&self, at: Gpa) -> Result<u64, NotOwned> {
        assert_eq!(at.get() % 8, 0, "entries are aligned");
        *self.fetched.borrow_mut().entry(at.get()).or_default() += 1;
        if owned(at.get(), 8) { Ok(self.get(at.get())) } else { Err(NotOwned(at)) }
    }
    fn read_entries(&self, at: Gpa, into: &mut [u64]) -> Result<(), NotOwned> {
        assert!(at.get() % KIB4 + into.len() as u64 * 8 <= KIB4, "entries of one table");
        for (n, entry) in (0..).zip(into) {
            *entry = self.read_entry(Gpa::new(at.get() + n * 8))?;
        }
        Ok(())
    }
    fn equal_words<F: TableFrames>(&self, at: Gpa, frames: &F, first: Hpa, most: usize) -> usize {
        let same = |n: &u64| self.get(at.get() + n * 8) == frames.read(Hpa::new(first.get() + n * 8));
        if !owned(at.get(), 8) { 0 } else { (0..most as u64).take_while(same).count() }
    }
    fn set_flags(&self, at: Gpa, entry: u64, flags: u64) -> bool {
        assert!(owned(at.get(), 8), "flags are set where they were read");
        let same = self.get(at.get()) == entry;
        if same {
            self.words.borrow_mut().insert(at.get(), entry | flags);
        }
        same
    }
    fn write_word(&self, at: Gpa, value: u64) {
        assert_eq!(at.get() % 8, 0, "entries are aligned");
        if owned(at.get(), 8) {
            self.words.borrow_mut().insert(at.get(), value);
        }
    }
    fn block(&self, gpa: Gpa, at_most: Level) -> Result<Block, NotOwned> {
        Block::largest(gpa, at_most, Rights::all(), |start, bytes| {
            owned(start.get(), bytes).then_some(Hpa::new(start.get()))
        })
    }
}

/// How many levels a walk has that begins at `root`: an EPTP, with its page-walk length less 1 in bits 5:3, or the address of a
/// PML4 table alone.
pub fn levels(root: u64) -> usize {
    if root >> 3 & 7 == 4 { 5 } else { 4 }
}

/// The root table.
pub fn table(root: u64) -> u64 {
    root & 0xf_ffff_ffff_f000
}

/// By how many bits an address is shifted for its index in each table, from the root on.
pub fn shifts(root: u64) -> Vec<u32> {
    [48, 39, 30, 21, 12][5 - levels(root)..].to_vec()
}

/// What ept12 says about an address, by the reference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Said {
    Nothing,
    Wrong,
    /// Page address, page size, rights, type and ignore-PAT as they stand in an entry.
    Page(u64, u64, u64, u64),
}

/// Walks ept12 on paper.
pub fn reference(l2: &L2, root: u64, ngpa: u64, execute_only: bool) -> Said {
    if ngpa >= 1 << (9 * levels(root) + 12) {
        return Said::Nothing;
    }
    reference_from(l2, 5 - levels(root), table(root), 7, ngpa, execute_only)
}

/// The same from a table `depth` steps below a PML5 table, with the rights that the entries above it grant.
pub fn reference_from(l2: &L2, depth: usize, table: u64, rights: u64, ngpa: u64, execute_only: bool) -> Said {
    let text = format!("{ngpa:057b}");
    let indexes: Vec<u64> = (0..5).map(|n| u64::from_str_radix(&text[n * 9..n * 9 + 9], 2).unwrap()).collect();
    let mut table = table;
    let mut granted = [0, 1, 2].map(|n| rights >> n & 1 == 1);
    for (depth, index) in indexes.iter().enumerate().skip(depth) {
        let at = table + index * 8;
        let entry = if owned(at, 8) { l2.get(at) } else { u64::MAX };
        // Character n of the text is bit n.
        let bits: Vec<char> = format!("{entry:064b}").chars().rev().collect();
        let set = |n: usize| bits[n] == '1';
        if !set(0) && !set(1) && !set(2) {
            return Said::Nothing;
        }
        if !set(0) && (set(1) || !execute_only) {
            return Said::Wrong;
        }
        if (WIDTH as usize..52).any(set) {
            return Said::Wrong;
        }
        (0..3).for_each(|n| granted[n] &= set(n));
        let ends = depth == 4 || (set(7) && depth > 1);
        if !ends {
            if (3..8).any(set) {
                return Said::Wrong;
            }
            table = entry & 0xf_ffff_ffff_f000;
            continue;
        }
        let size_bits = [0, 0, 30, 21, 12][depth];
        if (12..size_bits).any(set)
            || ["010", "011", "111"].contains(&[bits[5], bits[4], bits[3]].iter().collect::<String>().as_str())
        {
            return Said::Wrong;
        }
        let rights = (0..3).map(|n| u64::from(granted[n]) << n).sum();
        return Said::Page(entry & 0xf_ffff_ffff_f000, 1 << size_bits, rights, entry & 0x78);
    }
    unreachable!("the entry of a page table ends the walk")
}

/// Where the entries lie that a walk of ept12 to a page goes through, the leaf last.
fn entries(l2: &L2, root: u64, ngpa: u64) -> Vec<u64> {
    let mut table = table(root);
    let mut path = vec![];
    for shift in shifts(root) {
        path.push(table + (ngpa >> shift & 511) * 8);
        let entry = l2.get(path[path.len() - 1]);
        if shift <= 30 && entry & LARGE != 0 {
            break;
        }
        table = entry & 0xf_ffff_ffff_f000;
    }
    path
}

/// L2's memory after an access to a page of an ept12 with accessed and dirty flags.
pub fn marked(words: HashMap<u64, u64>, root: u64, ngpa: u64, write: bool) -> HashMap<u64, u64> {
    let mut l2 = L2 { words: RefCell::new(words), ..L2::default() };
    let path = entries(&l2, root, ngpa);
    for at in &path {
        *l2.words.get_mut().get_mut(at).expect("it was read") |= ACCESSED;
    }
    if write {
        *l2.words.get_mut().get_mut(&path[path.len() - 1]).expect("it was read") |= DIRTY;
    }
    l2.words.into_inner()
}

/// Whether all entries of the walk are marked accessed.
pub fn is_accessed(l2: &L2, root: u64, ngpa: u64) -> bool {
    entries(l2, root, ngpa).iter().all(|at| l2.get(*at) & ACCESSED != 0)
}

/// Whether the page is marked dirty.
pub fn is_dirty(l2: &L2, root: u64, ngpa: u64) -> bool {
    entries(l2, root, ngpa).last().is_some_and(|at| l2.get(*at) & DIRTY != 0)
}

/// The page table of an address that has one, and the rights that the entries above it grant.
pub fn way(l2: &L2, root: u64, ngpa: u64) -> (u64, u64) {
    shifts(root).into_iter().filter(|shift| *shift > 12).fold((table(root), 7), |(table, rights), shift| {
        let entry = l2.get(table + (ngpa >> shift & 511) * 8);
        (entry & 0xf_ffff_ffff_f000, rights & entry)
    })
}

/// The ept02 leaf that belongs to such a page at `ngpa`: (address, size, entry), or `None` where L2 owns nothing.
pub fn composed(page: u64, size: u64, rights: u64, type_and_pat: u64, ngpa: u64) -> Option<(u64, u64, u64)> {
    let gpa = page + ngpa % size;
    let fits = |part: &u64| *part <= size && owned(gpa - gpa % part, *part);
    let part = [GIB1, MIB2, KIB4].into_iter().find(fits)?;
    let large = if part == KIB4 { 0 } else { LARGE };
    Some((ngpa - ngpa % part, part, (gpa - gpa % part) | rights | type_and_pat | large))
}

/// Somebody who watches a page, and asks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Watcher {
    watch: Watch,
    round: u64,
}

/// What it is told: was the page written since it asked last, and is INVEPT due for ept01?
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Written {
    No,
    Yes { invept: bool },
}

impl Watcher {
    /// INVEPT for ept01 is due.
    pub fn new(ept01: &mut Ept01, page: u64, frames: &mut Frames) -> Result<Self, WatchError> {
        ept01.watch(Gpa::new(page), frames).map(|watch| Self { watch, round: ept01.round() })
    }

    pub fn ask(&mut self, ept01: &mut Ept01, frames: &mut Frames) -> Written {
        if self.round == ept01.round() && self.watch.is_clean(frames) {
            return Written::No;
        }
        let (watch, invept) = ept01.watch_again(self.watch, frames);
        *self = Self { watch, round: ept01.round() };
        Written::Yes { invept }
    }
}

/// ept01 of a machine whose L2 is watched, somebody else who watches one page in it, and what the processor has cached of L2's
/// writes: it sets no flag for the page again until INVEPT.
pub struct Watching {
    pub ept01: Ept01,
    pub cached: HashSet<u64>,
    other: Watcher,
    others_page: u64,
    /// The page of `other` was written since it was asked.
    written: bool,
}

impl Watching {
    pub fn new(others_page: u64, frames: &mut Frames) -> Self {
        let write_back = |_: Gpa, _| Some(MemoryType::WriteBack);
        let own = Span::new(OWN.0, OWN.1);
        let mut ept01 = Ept01::new(rules(), true, Gpa::new(GIB1), own, write_back, frames).unwrap();
        let other = Watcher::new(&mut ept01, others_page, frames).unwrap();
        Self { ept01, cached: HashSet::new(), other, others_page, written: false }
    }

    /// After all watches ended.
    pub fn watch_anew(&mut self, frames: &mut Frames) {
        self.other = Watcher::new(&mut self.ept01, self.others_page, frames).unwrap();
        self.cached.clear();
        self.written = false;
    }

    /// L2 writes somewhere.
    pub fn write(&mut self, at: u64, frames: &mut Frames) {
        self.written |= at & !0xfff == self.others_page;
        if !self.cached.insert(at >> 12) {
            return;
        }
        let mut table = self.ept01.eptp().ep4ta();
        for shift in [39, 30, 21, 12] {
            let entry = Hpa::new(table + (at >> shift & 511) * 8);
            let value = frames.read(entry);
            if shift == 12 || (shift < 39 && value & LARGE != 0) {
                return frames.write(entry, value | ACCESSED | DIRTY);
            }
            table = value & 0xf_ffff_ffff_f000;
        }
    }

    /// The other one asks; false if a write was missed.
    pub fn ask(&mut self, frames: &mut Frames) -> bool {
        let told = self.other.ask(&mut self.ept01, frames);
        if told == (Written::Yes { invept: true }) {
            self.cached.clear();
        }
        let missed = self.written && told == Written::No;
        self.written = false;
        !missed
    }
}
