//! ept02 after an INVEPT of L2: what ept12 still says stays, what it says otherwise follows, the rest goes.

mod ept_model;

use ept_model::*;
use nvmx::addr::Ngpa;
use nvmx::ept::{Ept02, Eptp, Outcome, Qualification};
use std::collections::HashMap;

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const OTHER: u64 = 0x20_0000;
const OTHER_PT: u64 = 0x10_4000;
const FLAGS: u64 = 1 << 6;
const READ: u64 = 1;
const WRITE: u64 = 2;

type Leaf = (u64, u64, u64);

/// L2 with two trees that share all but their roots: a page of each size, three pages of 4 KiB.
struct Machine {
    l2: L2,
    frames: Frames,
    ept: Ept02<4, 3>,
    watching: Option<Watching>,
    /// Words of L2 as the processor last saw them written.
    before: HashMap<u64, u64>,
}

/// Whether nvmx watches ept12 makes no difference to what it does.
const WAYS: [bool; 2] = [false, true];

fn machine(watched: bool) -> Machine {
    let mut l2 = L2::default();
    for root in [ROOT, OTHER] {
        l2.set(root, 0, PDPT | 7);
    }
    l2.set(PDPT, 0, PD | 7);
    l2.set(PDPT, 1, (7 * GIB1) | WB | LARGE | 7);
    l2.set(PD, 0, PT | 7);
    l2.set(PD, 3, (9 * MIB2) | WB | LARGE | 7);
    for index in 5..8 {
        l2.set(PT, index, (0x77_2000 + (index << 12)) | WB | 7);
    }
    let mut frames = Frames::new(1000);
    let watching = watched.then(|| Watching::new(PD, &mut frames));
    let mut ept = Ept02::new(rules(), false, 100, &mut frames).unwrap();
    if watched {
        ept.watch_tables(100);
    }
    let before = l2.words.borrow().clone();
    Machine { l2, frames, ept, watching, before }
}

const PAGES: [u64; 5] = [0x5000, 0x6000, 0x7000, 3 * MIB2, GIB1];

impl Machine {
    fn fault(&mut self, role: u64, ngpa: u64, access: u64) -> Outcome {
        let qualification = Qualification::from_bits_retain(access | 3 << 7);
        self.ept.violation(Eptp::new(role), Ngpa::new(ngpa), qualification, None, &self.l2, &mut self.frames)
    }

    /// All pages are used under a role.
    fn use_all(&mut self, role: u64) -> Vec<Leaf> {
        for ngpa in PAGES {
            assert_eq!(self.fault(role, ngpa, WRITE), Outcome::Filled);
        }
        self.activate(role).0
    }

    fn activate(&mut self, role: u64) -> (Vec<Leaf>, bool) {
        self.note_writes();
        let ept01 = self.watching.as_mut().map(|watching| &mut watching.ept01);
        let activation = self.ept.activate(Eptp::new(role), &self.l2, ept01, &mut self.frames);
        if let Some(watching) = self.watching.as_mut().filter(|_| activation.invept01) {
            watching.cached.clear();
        }
        (self.frames.leaves(activation.eptp02.ep4ta()), activation.invept)
    }
}

impl Machine {
    /// What L2 changed went through ept01.
    fn note_writes(&mut self) {
        let now = self.l2.words.borrow().clone();
        if let Some(watching) = &mut self.watching {
            for at in now.keys().filter(|at| now.get(at) != self.before.get(at)) {
                watching.write(*at, &mut self.frames);
            }
        }
        self.before = now;
    }

    /// After an INVEPT with nothing changed: from here on every table that can be is watched.
    fn settled(&mut self, role: u64) -> Vec<Leaf> {
        self.ept.invept_all();
        let leaves = self.activate(role).0;
        self.ept.invept_all();
        self.l2.fetched.take();
        assert_eq!(self.activate(role).0, leaves);
        assert_eq!(self.l2.fetched.borrow().is_empty(), self.watching.is_some(), "what was not written is not read");
        leaves
    }
}

#[test]
fn what_did_not_change_stays_and_costs_no_more_than_one_look_an_entry() {
    for role in [ROOT | 0x1e, ROOT | 0x1e | FLAGS] {
        let mut m = machine(false);
        let leaves = m.use_all(role);
        assert_eq!(leaves.len(), PAGES.len());
        let (fills, tables) = (m.ept.stats().fills, m.ept.tables());
        for _ in 0..3 {
            m.ept.invept_single(Eptp::new(role));
            m.l2.fetched.take();
            // The processor has to forget what it combined with L3's page tables: INVEPT once.
            assert_eq!(m.activate(role), (leaves.clone(), true));
            assert_eq!(m.activate(role), (leaves.clone(), false));
            let tables = [ROOT, PDPT, PD, PT];
            assert!(m.l2.fetched.borrow().keys().all(|at| tables.contains(&(at & !0xfff))));
            assert_eq!(m.l2.most_fetches(), 1);
        }
        assert_eq!((m.ept.stats().fills, m.ept.tables()), (fills, tables));
        assert_eq!(m.ept.stats().evictions, 0);
    }
}

#[test]
fn what_changed_follows_or_goes() {
    type Change = fn(&mut L2);
    /// The page at an address as it is now, `None` where it is gone.
    type Now = &'static [(u64, Option<u64>)];
    const PAGE: u64 = 0x77_7000 | WB;
    let cases: [(&str, Change, Now); 15] = [
        ("a page is gone", |l2| l2.set(PT, 5, 0), &[(0x5000, None)]),
        ("other rights", |l2| l2.set(PT, 5, PAGE | R), &[(0x5000, Some(PAGE | R))]),
        ("another page", |l2| l2.set(PT, 5, 0x88_8000 | WB | 7), &[(0x5000, Some(0x88_8000 | WB | 7))]),
        ("another type", |l2| l2.set(PT, 5, 0x77_7000 | 7), &[(0x5000, Some(0x77_7000 | 7))]),
        ("writable only", |l2| l2.set(PT, 5, PAGE | W), &[(0x5000, None)]),
        ("a reserved bit", |l2| l2.set(PT, 5, PAGE | 1 << WIDTH | 7), &[(0x5000, None)]),
        ("nvmx's memory", |l2| l2.set(PT, 5, OWN.0 | WB | 7), &[(0x5000, None)]),
        ("the page table is gone", |l2| l2.set(PD, 0, 0), &[(0x5000, None), (0x6000, None), (0x7000, None)]),
        (
            "the page table is another one",
            |l2| {
                l2.set(PD, 0, OTHER_PT | 7);
                l2.set(OTHER_PT, 6, 0x88_8000 | WB | 7);
            },
            &[(0x5000, None), (0x6000, Some(0x88_8000 | WB | 7)), (0x7000, None)],
        ),
        (
            "fewer rights above",
            |l2| l2.set(PD, 0, PT | R | X),
            &[
                (0x5000, Some(PAGE | R | X)),
                (0x6000, Some(0x77_8000 | WB | R | X)),
                (0x7000, Some(0x77_9000 | WB | R | X)),
            ],
        ),
        (
            "a large page in the place of a table",
            |l2| l2.set(PD, 0, (9 * MIB2) | WB | LARGE | 7),
            &[(0x5000, None), (0x6000, None), (0x7000, None)],
        ),
        ("a table in the place of a large page", |l2| l2.set(PD, 3, OTHER_PT | 7), &[(3 * MIB2, None)]),
        (
            "a huge page has other rights",
            |l2| l2.set(PDPT, 1, (7 * GIB1) | WB | LARGE | R),
            &[(GIB1, Some((7 * GIB1) | WB | LARGE | R))],
        ),
        ("a huge page that is not aligned", |l2| l2.set(PDPT, 1, (7 * GIB1 + MIB2) | WB | LARGE | 7), &[(GIB1, None)]),
        (
            "everything is gone",
            |l2| {
                l2.set(ROOT, 0, 0);
            },
            &[(0x5000, None), (0x6000, None), (0x7000, None), (3 * MIB2, None), (GIB1, None)],
        ),
    ];
    for (watched, (what, change, now)) in WAYS.into_iter().flat_map(|watched| cases.map(|case| (watched, case))) {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        m.use_all(role);
        let before = m.settled(role);
        change(&mut m.l2);
        m.ept.invept_all();
        let changed = |leaf: &Leaf| now.iter().find(|now| now.0 == leaf.0);
        let expected: Vec<Leaf> = before
            .into_iter()
            .filter_map(|leaf| match changed(&leaf) {
                Some(now) => now.1.map(|entry| (leaf.0, leaf.1, entry)),
                None => Some(leaf),
            })
            .collect();
        assert_eq!(m.activate(role), (expected.clone(), true), "{what}");
        assert!(!m.activate(role).1, "{what}: once");
        let tables = if expected.is_empty() { 0 } else { 2 + u32::from(expected[0].1 == KIB4) };
        assert_eq!(m.ept.tables(), tables, "{what}: empty tables are free");
    }
}

#[test]
fn the_pieces_of_a_page_that_meets_nvmx_stay() {
    WAYS.into_iter().for_each(pieces_stay);
}

fn pieces_stay(watched: bool) {
    let mut m = machine(watched);
    let role = ROOT | 0x1e;
    m.l2.set(PDPT, 2, (2 * GIB1) | WB | LARGE | 7);
    for offset in [4 * MIB2, 5 * MIB2 + 0x2000, 5 * MIB2 + 0x7000] {
        assert_eq!(m.fault(role, 2 * GIB1 + offset, READ), Outcome::Filled);
    }
    let (leaves, _) = m.activate(role);
    assert_eq!(leaves.iter().map(|leaf| leaf.1).collect::<Vec<_>>(), [MIB2, KIB4, KIB4]);
    m.ept.invept_all();
    assert_eq!(m.activate(role), (leaves, true));
    m.l2.set(PDPT, 2, (2 * GIB1) | WB | LARGE | R);
    m.ept.invept_all();
    assert!(m.activate(role).0.iter().all(|leaf| leaf.2 & 7 == R));
    m.l2.set(PDPT, 2, (3 * GIB1) | WB | LARGE | 7);
    m.ept.invept_all();
    assert_eq!(m.activate(role), (vec![], true), "no longer in pieces");
}

#[test]
fn flags_that_l2_cleared_are_set_again_by_the_next_access() {
    WAYS.into_iter().for_each(flags_are_set_again);
}

fn flags_are_set_again(watched: bool) {
    let role = ROOT | 0x1e | FLAGS;
    let page = |entry: u64| entry & !(ACCESSED | DIRTY);
    // Not dirty: no right to write.
    let mut m = machine(watched);
    m.use_all(role);
    m.settled(role);
    m.l2.set(PT, 5, m.l2.get(PT + 5 * 8) & !DIRTY);
    m.ept.invept_all();
    assert_eq!(m.activate(role).0[0], (0x5000, KIB4, 0x77_7000 | WB | R | X));
    assert_eq!(m.fault(role, 0x5000, WRITE), Outcome::Filled);
    assert_eq!(m.l2.get(PT + 5 * 8), 0x77_7000 | WB | 7 | ACCESSED | DIRTY);
    // Not accessed, in the leaf or above it: no page.
    for (table, index, gone) in [(PT, 5, 1), (PD, 3, 1), (PD, 0, 3), (PDPT, 1, 1), (PDPT, 0, 4), (ROOT, 0, 5)] {
        let mut m = machine(watched);
        m.use_all(role);
        let leaves = m.settled(role);
        m.l2.set(table, index, page(m.l2.get(table + index * 8)));
        m.ept.invept_all();
        assert_eq!(m.activate(role).0.len(), leaves.len() - gone, "table {table:#x}, index {index}");
        for ngpa in PAGES {
            assert_eq!(m.fault(role, ngpa, READ), Outcome::Filled);
        }
        assert_ne!(m.l2.get(table + index * 8) & ACCESSED, 0);
    }
}

#[test]
fn invept_single_goes_by_the_address_of_the_root_table_alone() {
    for watched in WAYS {
        let mut m = machine(watched);
        let roles = [ROOT | 0x1e, ROOT | 0x18, OTHER | 0x1e];
        let leaves = roles.map(|role| m.use_all(role));
        m.ept.invept_single(Eptp::new(ROOT | 0x5e));
        m.ept.invept_single(Eptp::new(ROOT | 0x5e));
        assert_eq!(m.ept.stats().flushes, 2, "each once, however often L2 asked");
        m.l2.set(PT, 5, 0);
        m.l2.fetched.take();
        assert_eq!(m.activate(roles[2]), (leaves[2].clone(), false), "not concerned");
        assert!(m.l2.fetched.borrow().is_empty());
        for (role, leaves) in roles.into_iter().zip(leaves).take(2) {
            assert_eq!(m.activate(role), (leaves[1..].to_vec(), true));
            assert!(!m.activate(role).1, "once");
        }
        m.ept.forget_all(&mut m.frames);
        let _ = m.activate(roles[0]);
        m.ept.invept_single(Eptp::new(roles[0]));
        assert_eq!(m.activate(roles[0]), (vec![], false), "an empty root owes nothing");
    }
}

#[test]
fn invept_all_concerns_every_root() {
    for watched in WAYS {
        let mut m = machine(watched);
        let roles = [ROOT | 0x1e, OTHER | 0x1e];
        let leaves = roles.map(|role| m.use_all(role));
        m.ept.invept_all();
        m.l2.set(PT, 5, 0);
        for (role, leaves) in roles.into_iter().zip(leaves) {
            assert_eq!(m.activate(role), (leaves[1..].to_vec(), true));
        }
    }
}

#[test]
fn a_root_that_is_not_used_again_is_not_looked_at() {
    for watched in WAYS {
        let mut m = machine(watched);
        m.use_all(ROOT | 0x1e);
        let _ = m.activate(OTHER | 0x1e);
        m.l2.fetched.take();
        for _ in 0..100 {
            m.ept.invept_all();
            let _ = m.activate(OTHER | 0x1e);
        }
        assert!(m.l2.fetched.borrow().is_empty());
    }
}

/// L2 may write into ept12 what nvmx's own table holds at that place: it is memory that L2 does not own all the same.
#[test]
fn an_entry_that_looks_like_nvmx_s_own_is_l2_s_all_the_same() {
    let mut m = machine(false);
    let role = ROOT | 0x1e;
    let before = m.use_all(role);
    let root = m.ept.activate(Eptp::new(role), &m.l2, None, &mut m.frames).eptp02.ep4ta();
    let below = |frames: &Frames, table| nvmx::ept::TableFrames::read(frames, nvmx::addr::Hpa::new(table));
    let (pdpt02, pd02) = (below(&m.frames, root), below(&m.frames, below(&m.frames, root) & 0xf_ffff_ffff_f000));
    for (table, entry) in [(PDPT, pd02), (ROOT, pdpt02)] {
        let own = m.l2.get(table);
        m.l2.set(table, 0, entry);
        m.ept.invept_all();
        let left = m.activate(role).0;
        assert!(left.iter().all(|leaf| leaf.0 >= GIB1), "{left:x?} of {before:x?}");
        m.l2.set(table, 0, own);
    }
}

/// ept12 leads elsewhere for a while, without INVEPT, and L3 uses what is there. When INVEPT comes everything is as it was: the page that was used
/// meanwhile has no business there any more.
#[test]
fn what_came_from_another_table_meanwhile_goes() {
    let other = 0x10_5000;
    let cases: [(u64, u64, u64, u64, u64); 4] = [
        // A page table for another; a page directory; all below an entry of the root; a page in pieces.
        (PD, 0, OTHER_PT, 9, 0x9000),
        (PDPT, 0, other, 4, 4 * MIB2),
        (ROOT, 0, other, 5, 5 * GIB1),
        (ROOT, 0, other, 2, 2 * GIB1 + 5 * MIB2 + 0x2000),
    ];
    for (watched, (table, index, there, at, ngpa)) in WAYS.into_iter().flat_map(|w| cases.map(|case| (w, case))) {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        if ngpa >= 2 * GIB1 {
            m.l2.set(PDPT, 2, (2 * GIB1) | WB | LARGE | 7);
            for piece in [5 * MIB2 + 0x1000, 5 * MIB2 + 0x8000] {
                assert_eq!(m.fault(role, 2 * GIB1 + piece, READ), Outcome::Filled);
            }
        }
        m.use_all(role);
        m.l2.set(PT, 8, 0x77_a000 | WB | 7);
        m.settled(role);
        // The last fill is in the page table.
        assert_eq!(m.fault(role, 0x8000, READ), Outcome::Filled);
        let leaves = m.activate(role).0;
        let old = m.l2.get(table + index * 8);
        let entry = match table {
            PD => 0x99_9000 | WB | 7,
            PDPT => (9 * MIB2) | WB | LARGE | 7,
            // The same page, uncacheable: its pieces are others.
            _ => (2 * GIB1) | LARGE | 7,
        };
        m.l2.set(there, at, entry);
        m.l2.set(table, index, there | 7);
        m.note_writes();
        let _ = m.fault(role, ngpa, READ);
        m.l2.set(table, index, old);
        m.note_writes();
        m.ept.invept_all();
        // A piece may stay if it is now what the page says.
        let mut now = m.activate(role).0;
        now.retain(|leaf| *leaf != (ngpa, KIB4, ngpa | WB | 7));
        assert_eq!(now, leaves, "table {table:#x}, watched: {watched}");
    }
}

/// L3 stores into a page table of ept12: no flag of ept01 tells.
#[test]
fn what_l3_writes_into_ept12_counts_after_invept() {
    for (watched, first) in WAYS.into_iter().flat_map(|watched| WAYS.map(|first| (watched, first))) {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        m.l2.set(PT, 100, PT | WB | 7);
        if first {
            assert_eq!(m.fault(role, 100 << 12, WRITE), Outcome::Filled);
        }
        m.use_all(role);
        if !first {
            m.settled(role);
            assert_eq!(m.fault(role, 100 << 12, WRITE), Outcome::Filled);
        }
        for page in [0x88_8000, 0x99_9000] {
            m.ept.invept_all();
            let _ = m.activate(role);
            m.l2.set(PT, 5, page | WB | 7);
            m.before = m.l2.words.borrow().clone();
            m.ept.invept_all();
            let leaves = m.activate(role).0;
            assert!(leaves.contains(&(0x5000, KIB4, page | WB | 7)), "watched: {watched}, first: {first}: {leaves:x?}");
        }
    }
}

/// The same where the page comes to L3 by an INVEPT: what validation writes counts as well.
#[test]
fn a_table_that_l3_gets_by_invept_is_exposed() {
    for watched in WAYS {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        m.use_all(role);
        m.settled(role);
        m.l2.set(PT, 6, PT | WB | 7);
        m.ept.invept_all();
        assert!(m.activate(role).0.contains(&(0x6000, KIB4, PT | WB | 7)));
        m.l2.set(PT, 5, 0x88_8000 | WB | 7);
        m.before = m.l2.words.borrow().clone();
        m.ept.invept_all();
        assert!(m.activate(role).0.contains(&(0x5000, KIB4, 0x88_8000 | WB | 7)), "watched: {watched}");
    }
}

/// Pages come to L3 in every way that there is; after each, what L3 writes into ept12 counts.
#[test]
fn each_way_to_a_writable_page_exposes_it() {
    type Way = fn(&mut Machine, u64);
    let ways: [(&str, Way); 2] = [
        ("a fault that goes on where the last one was", |m, role| {
            m.l2.set(PT, 99, 0x66_6000 | WB | 7);
            m.l2.set(PT, 100, PT | WB | 7);
            assert_eq!(m.fault(role, 99 << 12, WRITE), Outcome::Filled);
            let write = Qualification::from_bits_retain(WRITE | 3 << 7);
            let outcome = m.ept.refill(Eptp::new(role), Ngpa::new(100 << 12), write, &m.l2, &mut m.frames);
            assert_eq!(outcome, Some(Outcome::Filled));
        }),
        ("a large page", |m, role| {
            m.l2.set(PD, 4, WB | LARGE | 7);
            assert_eq!(m.fault(role, 4 * MIB2, WRITE), Outcome::Filled);
        }),
    ];
    for (watched, (what, way)) in WAYS.into_iter().flat_map(|watched| ways.map(|way| (watched, way))) {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        m.use_all(role);
        m.settled(role);
        way(&mut m, role);
        m.ept.invept_all();
        let _ = m.activate(role);
        m.l2.set(PT, 5, 0x88_8000 | WB | 7);
        m.before = m.l2.words.borrow().clone();
        m.ept.invept_all();
        assert!(m.activate(role).0.contains(&(0x5000, KIB4, 0x88_8000 | WB | 7)), "{what}, watched: {watched}");
    }
}

/// The flag of a page is one: the root that looks first takes it, and the others learn of the write all the same.
#[test]
fn a_table_of_two_roots_is_compared_in_both() {
    for watched in WAYS {
        let mut m = machine(watched);
        let roles = [ROOT | 0x1e, OTHER | 0x1e];
        for role in roles {
            m.use_all(role);
            m.settled(role);
        }
        for page in [0x88_8000, 0x99_9000] {
            m.l2.set(PT, 5, page | WB | 7);
            m.ept.invept_all();
            for role in roles {
                assert!(m.activate(role).0.contains(&(0x5000, KIB4, page | WB | 7)), "watched: {watched}");
            }
        }
    }
}

#[test]
fn a_table_whose_entries_go_one_by_one_is_freed() {
    for watched in WAYS {
        let mut m = machine(watched);
        let role = ROOT | 0x1e;
        m.use_all(role);
        m.settled(role);
        let tables = m.ept.tables();
        (5..8).for_each(|index| m.l2.set(PT, index, 0));
        m.ept.invept_all();
        let _ = m.activate(role);
        assert_eq!(m.ept.tables(), tables - 1, "watched: {watched}");
        m.l2.set(PD, 3, 0);
        m.l2.set(PDPT, 1, 0);
        m.ept.invept_all();
        assert_eq!((m.activate(role).0, m.ept.tables()), (vec![], 0), "watched: {watched}");
    }
}
