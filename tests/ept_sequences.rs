//! Whole histories: L2 rewrites ept12, switches, invalidates; L3 accesses memory; the processor caches what it may.
//! Invariants I1 and I2 hold after every step, with as few frames as there can be.
//!
//! ept12 counts as it stands, except that a page table may be reached as it was reached before, until L2 must expect
//! otherwise: after INVEPT, or a violation there. After INVEPT a leaf stays exactly if ept12 still says it.
//!
//! The processor here is the most forgetful of its duties that the SDM allows: it caches every translation it used, in
//! pieces of 4 KiB, and every reference to a table, and drops them only when it must.
#![allow(missing_docs, reason = "public for tests/fuzz only")]

pub mod ept_model;

use ept_model::*;
use nvmx::addr::{Hpa, Ngpa};
use nvmx::ept::{Ept02, Eptp, Outcome, Qualification, TableFrames};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

/// Seven tables of ept12, the first two of them roots of four levels, the last one of five. Nothing stops one from serving at
/// several levels.
pub const TABLES: u64 = 0x10_0000;
pub const ROLES: [u64; 8] = [
    TABLES | 0x1e,
    TABLES | 0x18,
    (TABLES + KIB4) | 0x1e,
    (TABLES + KIB4) | 0x5e,
    (TABLES + 2 * KIB4) | 0x1e,
    (TABLES + 6 * KIB4) | 0x26,
    (TABLES + 6 * KIB4) | 0x66,
    TABLES | 0x26,
];

/// What L2 or L3 does.
#[derive(Clone, Debug)]
pub enum Step {
    Write {
        table: u64,
        index: u64,
        entry: u64,
    },
    Access {
        ngpa: u64,
        access: u64,
    },
    /// The page of this number in the same 2 MiB as the last access.
    AccessNear {
        page: u64,
        access: u64,
    },
    /// L2 goes on with L3 as if that had such a violation before.
    Expect {
        ngpa: u64,
        access: u64,
    },
    /// L3 stores an entry of ept12 wherever an address leads.
    Store {
        ngpa: u64,
        entry: u64,
    },
    /// Somebody else who watches one of the tables asks whether it was written.
    Ask,
    Switch(usize),
    InveptSingle(usize),
    InveptAll,
    Forget,
}

fn entry() -> impl Strategy<Value = u64> {
    let address = prop_oneof![
        8 => (0u64..7).prop_map(|n| TABLES + n * KIB4),
        3 => (0u64..4).prop_map(|n| n * GIB1),
        3 => (0u64..8).prop_map(|n| 2 * GIB1 + n * MIB2),
        3 => (0u64..10).prop_map(|n| OWN.0 - 3 * KIB4 + n * KIB4),
    ];
    let low = prop_oneof![
        8 => Just(7u64),
        3 => 0u64..8,
        3 => (0u64..8).prop_map(|rights| LARGE | WB | rights),
        3 => (0u64..8).prop_map(|rights| WB | rights),
        1 => 0u64..0x100,
    ];
    let noise = prop_oneof![19 => Just(0u64), 1 => (0u32..64).prop_map(|bit| 1 << bit)];
    (address, low, noise).prop_map(|(address, low, noise)| (address | low) ^ noise)
}

/// An address at whose offset a table has an entry that matters.
fn ngpa_of_a_table() -> impl Strategy<Value = u64> {
    (0u64..2, 0u64..2, 0u64..3, 0u64..3).prop_map(|(n, m, page, index)| n << 30 | m << 21 | page << 12 | index << 3)
}

fn step() -> impl Strategy<Value = Step> {
    let top = prop_oneof![12 => Just(0u64), 2 => Just(1), 1 => Just(512)];
    let ngpa = (top, prop::array::uniform4(prop_oneof![3 => Just(0u64), 2 => Just(1), 1 => Just(2)]), 0u64..KIB4)
        .prop_map(|(top, n, offset)| top << 48 | n[0] << 39 | n[1] << 30 | n[2] << 21 | n[3] << 12 | offset);
    prop_oneof![
        5 => (0u64..7, 0u64..3, entry()).prop_map(|(table, index, entry)| Step::Write { table, index, entry }),
        // A page of 2 MiB or 1 GiB in the place of a table, and back.
        2 => (2u64..4, 0u64..2, 0u64..2, prop::sample::select(vec![R, R | W, R | X, X, 7])).prop_map(
            |(table, index, page, rights)| Step::Write {
                table,
                index,
                entry: (page * if table == 2 { GIB1 } else { MIB2 }) | LARGE | WB | rights,
            },
        ),
        1 => (2u64..4, 0u64..2).prop_map(|(table, index)| Step::Write {
            table,
            index,
            entry: (TABLES + (table + 1) * KIB4) | 7,
        }),
        12 => (ngpa.clone(), prop::sample::select(vec![R, W, X, R | W])).prop_map(|(ngpa, access)| Step::Access { ngpa, access }),
        4 => (ngpa, prop::sample::select(vec![R, W, X, R | W])).prop_map(|(ngpa, access)| Step::Expect { ngpa, access }),
        9 => (0u64..3, prop::sample::select(vec![R, W, X])).prop_map(|(page, access)| Step::AccessNear { page, access }),
        3 => (ngpa_of_a_table(), entry()).prop_map(|(ngpa, entry)| Step::Store { ngpa, entry }),
        1 => Just(Step::Ask),
        2 => (0..ROLES.len()).prop_map(Step::Switch),
        1 => (0..ROLES.len()).prop_map(Step::InveptSingle),
        1 => Just(Step::InveptAll),
        1 => Just(Step::Forget),
    ]
}

/// A translation as the processor keeps it: page, rights, type bits.
type Kept = (u64, u64, u64);

/// What the processor caches, tagged with the address of the root table.
#[derive(Default)]
struct Processor {
    pages: HashMap<(u64, u64), Kept>,
    /// (root, bits of the address that are used up, address above them) to the table there.
    tables: HashMap<(u64, u32, u64), u64>,
}

impl Processor {
    fn invept(&mut self, root: u64) {
        self.pages.retain(|key, _| key.0 != table(root));
        self.tables.retain(|key, _| key.0 != table(root));
    }

    /// The translation that an access uses, or the rights that it lacks.
    fn access(&mut self, frames: &Frames, root: u64, ngpa: u64, access: u64) -> Result<Kept, u64> {
        let key = (table(root), ngpa >> 12);
        let kept = match self.pages.get(&key) {
            Some(kept) => *kept,
            None => self.walk(frames, root, ngpa).ok_or(0u64)?,
        };
        if kept.1 & access == access {
            self.pages.insert(key, kept);
            return Ok(kept);
        }
        // An EPT violation drops what would translate the address.
        self.pages.remove(&key);
        Err(kept.1)
    }

    /// Uses a table it remembers rather than the entry that references it.
    fn walk(&mut self, frames: &Frames, root: u64, ngpa: u64) -> Option<Kept> {
        if ngpa >> (shifts(root)[0] + 9) != 0 {
            return None;
        }
        let ep4ta = table(root);
        let mut table = ep4ta;
        for shift in shifts(root) {
            let entry = frames.read(Hpa::new(table | ((ngpa >> shift & 511) * 8)));
            if entry & 7 == 0 {
                return None;
            }
            if shift == 12 || entry & LARGE != 0 {
                let page = (entry & 0xf_ffff_ffff_f000) + (ngpa & ((1 << shift) - 1) & !0xfff);
                return Some((page, entry & 7, entry & 0x78));
            }
            table = *self.tables.entry((ep4ta, shift, ngpa >> shift)).or_insert(entry & 0xf_ffff_ffff_f000);
        }
        None
    }

    /// Everything cached for a root agrees with its tables, but for rights that were added.
    fn is_coherent(&self, frames: &Frames, root: u64) -> bool {
        let ep4ta = table(root);
        let path = |ngpa: u64, until: u32| {
            let mut table = ep4ta;
            for shift in shifts(root) {
                let entry = frames.read(Hpa::new(table | ((ngpa >> shift & 511) * 8)));
                if entry & 7 == 0 || shift == 12 || entry & LARGE != 0 || shift == until {
                    return (shift, entry);
                }
                table = entry & 0xf_ffff_ffff_f000;
            }
            unreachable!()
        };
        self.pages.iter().filter(|(key, _)| key.0 == ep4ta).all(|((_, number), (page, rights, types))| {
            let (shift, entry) = path(number << 12, 0);
            let now = (entry & 0xf_ffff_ffff_f000) + ((number << 12) & ((1 << shift) - 1));
            now == *page && entry & rights & 7 == *rights && entry & 0x78 == *types
        }) && self.tables.iter().filter(|(key, _)| key.0 == ep4ta).all(|((_, shift, prefix), table)| {
            let (at, entry) = path(prefix << shift, *shift);
            (at, entry & !NUMBER) == (*shift, table | 7 | XU)
        })
    }
}

/// A machine with a processor, and the record of what was filled.
struct History<const ROOTS: usize, const RESERVE: usize> {
    l2: L2,
    frames: Frames,
    total: usize,
    ept: Ept02<ROOTS, RESERVE>,
    processor: Processor,
    role: u64,
    /// Roots by role, as last activated.
    roots: HashMap<u64, u64>,
    /// Leaves that may be in use, by role, the newest last: none from before an INVEPT.
    filled: HashMap<u64, Vec<(u64, u64, u64)>>,
    /// Page tables of ept12 that were used, with the rights above them, by role and bits 63:21 of the address.
    ways: HashMap<(u64, u64), Vec<(u64, u64)>>,
    /// Roles that L2 invalidated since they were last used.
    invalidated: HashSet<u64>,
    /// The last address that L3 accessed.
    last: u64,
    /// L2's own map, if nvmx watches ept12.
    ept01: Option<Watching>,
}

impl<const ROOTS: usize, const RESERVE: usize> History<ROOTS, RESERVE> {
    fn new(budget: u32, pool: u64, splits: u32) -> Self {
        let mut l2 = L2::default();
        let ways = [(0, 0, 2), (1, 0, 2), (2, 0, 3), (3, 0, 4), (3, 1, 5), (0, 1, 2), (2, 1, 3), (6, 0, 0), (6, 1, 1)];
        for (table, index, next) in ways {
            l2.set(TABLES + table * KIB4, index, (TABLES + next * KIB4) | 7);
        }
        for index in 0..3 {
            l2.set(TABLES + 4 * KIB4, index, (index << 12) | WB | 7);
        }
        let mut frames = Frames::new((ROOTS + RESERVE) as u64 + pool);
        if splits > 0 {
            frames.free.splice(0..0, (0..40).map(|n| 0x71_0000_0000 + n * KIB4));
        }
        let total = frames.free.len();
        let ept01 = (splits > 0).then(|| Watching::new(TABLES + 3 * KIB4, &mut frames));
        let mut ept = Ept02::new(rules(), false, budget, &mut frames).unwrap();
        if splits > 0 {
            ept.watch_tables(splits);
        }
        Self {
            l2,
            frames,
            total,
            ept,
            processor: Processor::default(),
            role: ROLES[0],
            roots: HashMap::new(),
            filled: HashMap::new(),
            ways: HashMap::new(),
            invalidated: HashSet::new(),
            last: 0,
            ept01,
        }
    }

    /// What a VM entry does: returns the root.
    fn enter(&mut self) -> Result<u64, TestCaseError> {
        let invalidated = self.invalidated.remove(&self.role);
        let before = self.roots.get(&self.role).filter(|_| invalidated).map(|&root| (root, self.frames.leaves(root)));
        let ept01 = self.ept01.as_mut().map(|watching| &mut watching.ept01);
        let activation = self.ept.activate(Eptp::new(self.role), &self.l2, ept01, &mut self.frames);
        self.l2.fetched.take();
        if let Some(watching) = self.ept01.as_mut().filter(|_| activation.invept01) {
            watching.cached.clear();
        }
        let root = activation.eptp02.ep4ta() | activation.eptp02.get() & 7 << 3;
        prop_assert_eq!(levels(root), levels(self.role));
        if activation.invept {
            self.processor.invept(root);
        }
        self.roots.retain(|_, owned| table(*owned) != table(root));
        self.roots.insert(self.role, root);
        prop_assert!(self.processor.is_coherent(&self.frames, root), "INVEPT was due");
        if invalidated {
            let leaves = self.frames.leaves(root);
            for &leaf in &leaves {
                // nvmx sets dirty flags in ept12. Where a page table serves at several addresses, only the one that was written has the right
                // to write then; the others get it by their own first write, as without an INVEPT.
                let said = self.said_at(leaf.0);
                let clean = self.role & 1 << 6 != 0 && said == Some((leaf.0, leaf.1, leaf.2 | W));
                prop_assert!(clean || said == Some(leaf), "what L2 took back is still there: {:x?}, {:x?}", leaf, said);
            }
            for leaf in before.into_iter().filter(|before| before.0 == root).flat_map(|before| before.1) {
                let kept = self.said_at(leaf.0) != Some(leaf) || leaves.contains(&leaf);
                prop_assert!(kept, "{:x?} was dropped although ept12 says it", leaf);
            }
            self.filled.insert(self.role, leaves);
        }
        let filled = self.filled.entry(self.role).or_default();
        for leaf in self.frames.leaves(root) {
            let (start, size, entry) = leaf;
            prop_assert!(owned(entry & 0xf_ffff_ffff_f000 & !(size - 1), size), "I1");
            let newest = filled.iter().rev().find(|(at, len, _)| *at < start + size && start < at + len);
            prop_assert_eq!(newest, Some(&leaf), "I2: the leaf is the newest that was composed there");
        }
        Ok(root)
    }

    /// The leaf that ept12 says for the page at `ngpa`, without an access to it.
    fn said_at(&self, ngpa: u64) -> Option<(u64, u64, u64)> {
        let root = self.role;
        let Said::Page(page, size, mut rights, types) = reference(&self.l2, root, ngpa, true) else { return None };
        if self.role & 1 << 6 != 0 {
            if !is_accessed(&self.l2, root, ngpa) {
                return None;
            }
            if !is_dirty(&self.l2, root, ngpa) {
                rights &= !W;
            }
        }
        composed(page, size, rights, types, ngpa).filter(|leaf| leaf.2 & 7 != 0)
    }

    /// L3 accesses memory until it succeeds or L2 must see an exit.
    fn access(&mut self, ngpa: u64, access: u64) -> Result<(), TestCaseError> {
        self.last = ngpa;
        let root = self.enter()?;
        let lacking = match self.processor.access(&self.frames, root, ngpa, access) {
            Ok(kept) => return self.check_page(ngpa, kept),
            Err(granted) => granted,
        };
        let hardware = Qualification::from_bits_retain(access | lacking << 3 | 3 << 7);
        let fills = self.ept.stats().fills;
        let leaves = self.frames.leaves(root);
        let in_run = self.ept.refill(Eptp::new(self.role), Ngpa::new(ngpa), hardware, &self.l2, &mut self.frames);
        if in_run == Some(Outcome::Filled) {
            prop_assert!(self.l2.most_fetches() == 1, "one entry, fetched once");
            return self.refilled(root, &leaves, ngpa, access);
        }
        prop_assert_eq!(self.ept.stats().fills, fills);
        let said = reference(&self.l2, self.role, ngpa, true);
        if let Some(outcome) = in_run {
            // What L2 sees is what ept12 says at this time, whatever way was known.
            prop_assert!(self.l2.most_fetches() <= 5, "a table may serve at five levels");
            prop_assert!(matches!(said, Said::Nothing), "{:?}", outcome);
            let told = Qualification::from_bits_retain(access | 3 << 7);
            let seen = matches!(outcome, Outcome::ReflectViolation { qualification, .. } if qualification == told);
            prop_assert!(seen, "{:?} and not {:?}", outcome, told);
            return self.reflected(ngpa);
        }
        prop_assert!(self.l2.most_fetches() <= 5, "a table may serve at five levels");
        let before = self.l2.words.borrow().clone();
        let mut outcome =
            self.ept.violation(Eptp::new(self.role), Ngpa::new(ngpa), hardware, None, &self.l2, &mut self.frames);
        prop_assert!(self.l2.most_fetches() <= 5, "a table may serve at five levels");
        let accessed_dirty = self.role & 1 << 6 != 0;
        if accessed_dirty {
            // Where a table serves at several levels an entry changes between two looks at it: L3 comes again.
            for _ in 0..5 {
                if outcome == Outcome::Filled {
                    outcome = self.ept.violation(
                        Eptp::new(self.role),
                        Ngpa::new(ngpa),
                        hardware,
                        None,
                        &self.l2,
                        &mut self.frames,
                    );
                }
            }
            self.l2.most_fetches();
        }
        let expected = match said {
            Said::Page(_, _, rights, _) if accessed_dirty && rights & access == access => {
                marked(before, self.role, ngpa, access & W != 0)
            }
            _ => before,
        };
        prop_assert_eq!(&*self.l2.words.borrow(), &expected, "flags in ept12");
        let (page, size, mut rights, types) = match said {
            Said::Nothing => {
                let told = Qualification::from_bits_retain(access | 3 << 7);
                let seen = matches!(outcome, Outcome::ReflectViolation { qualification, .. } if qualification == told);
                prop_assert!(seen, "{:?} and not {:?}", outcome, told);
                return self.reflected(ngpa);
            }
            Said::Wrong => {
                prop_assert_eq!(outcome, Outcome::ReflectMisconfig);
                return self.reflected(ngpa);
            }
            Said::Page(page, size, rights, types) => (page, size, rights, types),
        };
        if rights & access != access {
            let told = Qualification::from_bits_retain(access | rights << 3 | 3 << 7);
            let seen = matches!(outcome, Outcome::ReflectViolation { qualification, .. } if qualification == told);
            prop_assert!(seen, "{:?} and not {:?}", outcome, told);
            return self.reflected(ngpa);
        }
        if accessed_dirty && !is_dirty(&self.l2, self.role, ngpa) {
            rights &= !W;
        }
        let Some(leaf) = composed(page, size, rights, types, ngpa) else {
            let gpa = nvmx::addr::Gpa::new(page + ngpa % size);
            prop_assert_eq!(outcome, Outcome::Forbidden { gpa });
            return self.reflected(ngpa);
        };
        prop_assert_eq!(outcome, Outcome::Filled);
        self.filled.entry(self.role).or_default().push(leaf);
        if size == KIB4 {
            let way = way(&self.l2, self.role, ngpa);
            self.ways.entry((self.role, ngpa >> 21)).or_default().push(way);
        }
        let root = self.enter()?;
        match self.processor.access(&self.frames, root, ngpa, access) {
            Ok(kept) => self.check_page(ngpa, kept),
            Err(_) => Err(TestCaseError::fail("L3 does not get on")),
        }
    }

    /// The page of an address is filled before L3 accesses it: exactly if the access would set no flag, and is allowed.
    fn expect(&mut self, ngpa: u64, access: u64) -> Result<(), TestCaseError> {
        self.last = ngpa;
        self.enter()?;
        let before = self.l2.words.borrow().clone();
        let said = self.said_at(ngpa).filter(|leaf| leaf.2 & access == access);
        let hardware = Qualification::from_bits_retain(access | 3 << 7);
        let role = Eptp::new(self.role);
        self.l2.most_fetches();
        let filled = self.ept.fill_expected(role, Ngpa::new(ngpa), hardware, &self.l2, &mut self.frames);
        prop_assert!(self.l2.most_fetches() <= 5, "a table may serve at five levels");
        prop_assert_eq!(&*self.l2.words.borrow(), &before, "ept12 stays as it is");
        prop_assert_eq!(filled, said.is_some());
        let Some(leaf) = said else { return Ok(()) };
        self.filled.entry(self.role).or_default().push(leaf);
        let Said::Page(_, size, ..) = reference(&self.l2, self.role, ngpa, true) else { unreachable!() };
        if size == KIB4 {
            let way = way(&self.l2, self.role, ngpa);
            self.ways.entry((self.role, ngpa >> 21)).or_default().push(way);
        }
        let root = self.enter()?;
        match self.processor.access(&self.frames, root, ngpa, access) {
            Ok(kept) => self.check_page(ngpa, kept),
            // What it had cached with fewer rights goes with the violation.
            Err(_) => self.access(ngpa, access),
        }
    }

    /// L2 sees a violation, and may count on it: nothing translates the address any more, in no root of the same EP4TA.
    fn reflected(&mut self, ngpa: u64) -> Result<(), TestCaseError> {
        for role in ROLES.into_iter().filter(|role| role >> 12 == self.role >> 12) {
            self.ways.remove(&(role, ngpa >> 21));
            let covers = |leaf: &(u64, u64, u64)| (leaf.0..leaf.0 + leaf.1).contains(&ngpa);
            self.filled.entry(role).or_default().retain(|leaf| !covers(leaf));
            if let Some(&root) = self.roots.get(&role) {
                prop_assert!(!self.frames.leaves(root).iter().any(covers), "a reflected violation left its page");
            }
        }
        Ok(())
    }

    /// After a fill that did not walk ept12 from its root: both the page and those filled ahead of L3 come from a page table that
    /// may still be cached, and L3 goes on as after any fill.
    fn refilled(&mut self, root: u64, before: &[(u64, u64, u64)], ngpa: u64, access: u64) -> Result<(), TestCaseError> {
        let leaves = self.frames.leaves(root);
        let new: Vec<_> = leaves.into_iter().filter(|leaf| !before.contains(leaf)).collect();
        prop_assert!(new.iter().any(|leaf| leaf.0 == ngpa & !0xfff && leaf.1 == KIB4));
        let ways = self.ways.get(&(self.role, ngpa >> 21)).cloned().unwrap_or_default();
        for leaf in new {
            let ahead = leaf.0.wrapping_sub(ngpa & !0xfff) >> 12;
            prop_assert!(leaf.1 == KIB4 && leaf.0 >> 21 == ngpa >> 21 && ahead <= 16, "{:x?} for {:#x}", leaf, ngpa);
            let access = if ahead == 0 { access } else { 0 };
            let mut possible = ways.iter().filter_map(|(table, rights)| {
                match reference_from(&self.l2, 4, *table, *rights, leaf.0, true) {
                    Said::Page(page, size, rights, types) if rights & access == access => {
                        composed(page, size, rights, types, leaf.0)
                    }
                    _ => None,
                }
            });
            prop_assert!(possible.any(|possible| possible == leaf), "no way that L2 must expect leads there");
            self.filled.entry(self.role).or_default().push(leaf);
        }
        let again = self.ept.activate(Eptp::new(self.role), &self.l2, None, &mut self.frames);
        prop_assert_eq!((again.eptp02.ep4ta(), again.invept), (table(root), false), "nothing to activate");
        self.enter()?;
        match self.processor.access(&self.frames, root, ngpa, access) {
            Ok(kept) => self.check_page(ngpa, kept),
            Err(_) => Err(TestCaseError::fail("L3 does not get on")),
        }
    }

    /// A translation that L3 used is that of the newest leaf there, with no more rights.
    fn check_page(&self, ngpa: u64, (page, rights, types): Kept) -> Result<(), TestCaseError> {
        let newest = self.filled[&self.role].iter().rev().find(|(at, len, _)| (*at..at + len).contains(&ngpa));
        let Some((start, _, entry)) = newest else {
            return Err(TestCaseError::fail("a translation that nothing stands for"));
        };
        let expected = (entry & 0xf_ffff_ffff_f000) + ((ngpa & !0xfff) - start);
        prop_assert_eq!((page, types), (expected, entry & 0x78));
        prop_assert_eq!(rights & !entry, 0);
        prop_assert!(owned(page, KIB4), "I1");
        Ok(())
    }

    /// The translation that a write of L3 uses, if the processor has one.
    fn translated(&self, ngpa: u64) -> Option<Kept> {
        let root = self.roots.get(&self.role)?;
        self.processor.pages.get(&(table(*root), ngpa >> 12)).copied().filter(|kept| kept.1 & W != 0)
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Write { table, index, entry } => {
                self.l2.set(TABLES + table * KIB4, index, entry);
                if let Some(watching) = &mut self.ept01 {
                    watching.write(TABLES + table * KIB4 + index * 8, &mut self.frames);
                }
            }
            Step::Store { ngpa, entry } => {
                self.access(ngpa, W)?;
                if let Some((page, ..)) = self.translated(ngpa) {
                    self.l2.words.borrow_mut().insert(page | ngpa & 0xff8, entry);
                }
            }
            Step::Ask => {
                if let Some(watching) = &mut self.ept01 {
                    prop_assert!(watching.ask(&mut self.frames), "a write was missed");
                }
            }
            Step::Access { ngpa, access } => self.access(ngpa, access)?,
            Step::AccessNear { page, access } => self.access(self.last & !(MIB2 - 1) | page << 12, access)?,
            Step::Expect { ngpa, access } => self.expect(ngpa, access)?,
            Step::Switch(role) => self.role = ROLES[role],
            Step::InveptSingle(role) => {
                self.ept.invept_single(Eptp::new(ROLES[role]));
                self.invalidated.extend(ROLES.iter().filter(|other| *other >> 12 == ROLES[role] >> 12));
                self.ways.retain(|way, _| way.0 >> 12 != ROLES[role] >> 12);
            }
            Step::InveptAll => {
                self.ept.invept_all();
                self.invalidated.extend(ROLES);
                self.ways.clear();
            }
            Step::Forget => {
                self.ept.forget_all(&mut self.frames);
                self.filled.clear();
                self.ways.clear();
                self.roots.clear();
                if let Some(watching) = &mut self.ept01 {
                    watching.ept01.join(&mut self.frames);
                    watching.cached.clear();
                    watching.watch_anew(&mut self.frames);
                }
                let of_ept01 = self.ept01.as_ref().map_or(0, |watching| watching.ept01.tables() as usize);
                prop_assert_eq!(self.frames.used.len(), 1 + RESERVE + of_ept01, "nothing is kept but the first root");
            }
        }
        prop_assert_eq!(self.frames.used.len() + self.frames.free.len(), self.total);
        prop_assert!((self.ept.tables() as usize) < self.frames.used.len());
        Ok(())
    }
}

/// A whole history, or what went wrong in it.
pub fn run<const ROOTS: usize, const RESERVE: usize>(
    budget: u32,
    pool: u64,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let mut history = History::<ROOTS, RESERVE>::new(budget, pool, 0);
    for step in steps {
        history.take(step)?;
        prop_assert!(history.frames.used.len() <= ROOTS + RESERVE + budget as usize);
    }
    Ok(())
}

/// The same with nvmx watching ept12; `splits` is by how many tables ept01 may grow for it.
pub fn run_watched<const ROOTS: usize, const RESERVE: usize>(
    budget: u32,
    pool: u64,
    splits: u32,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let mut history = History::<ROOTS, RESERVE>::new(budget, pool, splits);
    steps.iter().try_for_each(|step| history.take(step))
}

/// A page of ept12 that serves at two addresses, written at the one and only fetched from at the other.
#[test]
fn a_page_that_is_dirty_by_another_address_is_written_after_one_more_fault() {
    let before = [
        Step::Switch(3),
        Step::Access { ngpa: GIB1, access: X },
        Step::InveptSingle(2),
        Step::Access { ngpa: 0, access: W },
        Step::InveptSingle(2),
    ];
    let steps: Vec<_> = before.into_iter().chain([GIB1, 0].map(|ngpa| Step::Access { ngpa, access: W })).collect();
    run_watched::<8, 16>(400, 400, 100, &steps).unwrap();
    run_watched::<2, 3>(3, 0, 100, &steps).unwrap();
    run_watched::<3, 4>(100, 0, 1, &steps).unwrap();
    run::<8, 16>(400, 400, &steps).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_with_the_fewest_frames(steps in prop::collection::vec(step(), 1..120)) {
        run::<2, 4>(0, 0, &steps)?;
        run::<1, 4>(2, 5, &steps)?;
    }

    #[test]
    fn invariants_hold_when_the_pool_runs_out(steps in prop::collection::vec(step(), 1..120), pool in 0u64..9) {
        run::<3, 4>(100, pool, &steps)?;
    }

    #[test]
    fn invariants_hold_with_plenty(steps in prop::collection::vec(step(), 1..120)) {
        run::<8, 16>(400, 400, &steps)?;
    }

    #[test]
    fn nothing_stale_stays_where_ept12_is_watched(steps in prop::collection::vec(step(), 1..120), pool in 0u64..60) {
        run_watched::<8, 16>(400, 400, 100, &steps)?;
        run_watched::<2, 4>(3, pool, 100, &steps)?;
        run_watched::<3, 4>(100, pool, 1, &steps)?;
    }
}
