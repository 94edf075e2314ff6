//! Accessed and dirty flags of ept12 and the page-modification log, over the whole grid of leaves.

mod ept_model;

use ept_model::*;
use nvmx::addr::{Gpa, Ngpa};
use nvmx::ept::{Block, Ept02, Eptp, GuestView, Level, NotOwned, Outcome, PageLog, Qualification};

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const LOG: u64 = 0x50_0000;
const EPTP: Eptp = Eptp::new(ROOT | 0x5e);
const LINEAR: u64 = 3 << 7;

/// Where a leaf of a size lies and what it maps: (table, index, address in L3, page).
const LEAVES: [(u64, u64, u64, u64); 3] = [
    (PT, 5, 0x5123, 0x77_7000 | WB),
    (PD, 3, 3 * MIB2 + 0x5123, (9 * MIB2) | WB | LARGE),
    (PDPT, 1, GIB1 + 3 * MIB2 + 0x5123, (7 * GIB1) | WB | LARGE),
];

fn machine() -> (L2, Frames, Ept02<2, 3>) {
    let mut l2 = L2::default();
    for (table, next) in [(ROOT, PDPT), (PDPT, PD), (PD, PT)] {
        l2.set(table, 0, next | 7);
    }
    let mut frames = Frames::new(100);
    let ept = Ept02::new(rules(), false, 50, &mut frames).unwrap();
    (l2, frames, ept)
}

fn log(index: u16) -> PageLog {
    PageLog { address: Gpa::new(LOG), index }
}

#[test]
fn every_leaf_access_and_flag_composes_as_the_reference_says() {
    for (table, index, ngpa, page) in LEAVES {
        for rights in 0..8 {
            for flags in [0, ACCESSED, DIRTY, ACCESSED | DIRTY] {
                for access in [R, W, X, R | W] {
                    let (mut l2, mut frames, mut ept) = machine();
                    l2.set(table, index, page | rights | flags);
                    let before = l2.words.borrow().clone();
                    let said = reference(&l2, ROOT, ngpa, true);
                    let mut log = log(511);
                    let qualification = Qualification::from_bits_retain(access | LINEAR);
                    let outcome = ept.violation(EPTP, Ngpa::new(ngpa), qualification, Some(&mut log), &l2, &mut frames);
                    let root = ept.activate(EPTP, &l2, None, &mut frames).eptp02.ep4ta();
                    let leaves = frames.leaves(root);
                    let what = format!("{ngpa:#x}, rights {rights}, flags {flags:#x}, access {access}");
                    let allowed = matches!(said, Said::Page(_, _, granted, _) if granted & access == access);
                    if !allowed {
                        assert_ne!(outcome, Outcome::Filled, "{what}");
                        assert_eq!((leaves, log.index), (vec![], 511), "{what}");
                        assert_eq!(*l2.words.borrow(), before, "{what}: what is refused sets nothing");
                        continue;
                    }
                    let Said::Page(start, size, granted, types) = said else { unreachable!() };
                    let write = access & W != 0;
                    let mut expected = marked(before, ROOT, ngpa, write);
                    let logged = write && flags & DIRTY == 0;
                    if logged {
                        expected.insert(LOG + 511 * 8, ngpa & !0xfff);
                    }
                    let granted = if write || flags & DIRTY != 0 { granted } else { granted & !W };
                    assert_eq!(outcome, Outcome::Filled, "{what}");
                    assert_eq!(*l2.words.borrow(), expected, "{what}");
                    assert_eq!(log.index, 511 - u16::from(logged), "{what}");
                    assert_eq!(leaves, [composed(start, size, granted, types, ngpa).unwrap()], "{what}");
                }
            }
        }
    }
}

#[test]
fn a_full_log_stops_what_would_set_a_flag_and_nothing_else() {
    for index in [512, 0x8000, 0xffff] {
        for (flags, access, stops) in
            [(0, R, true), (DIRTY, R, true), (ACCESSED, R, false), (ACCESSED, W, true), (ACCESSED | DIRTY, W, false)]
        {
            let (mut l2, mut frames, mut ept) = machine();
            for (table, next) in [(ROOT, PDPT), (PDPT, PD), (PD, PT)] {
                l2.set(table, 0, next | 7 | ACCESSED);
            }
            l2.set(PT, 5, 0x77_7000 | WB | 7 | flags);
            let before = l2.words.borrow().clone();
            let mut log = log(index);
            let qualification = Qualification::from_bits_retain(access | LINEAR);
            let outcome = ept.violation(EPTP, Ngpa::new(0x5008), qualification, Some(&mut log), &l2, &mut frames);
            let expected = if stops { Outcome::ReflectLogFull } else { Outcome::Filled };
            assert_eq!((outcome, log.index), (expected, index), "flags {flags:#x}, access {access}");
            assert_eq!(*l2.words.borrow(), before);
        }
    }
}

#[test]
fn a_log_outside_of_l2_s_memory_swallows_what_is_written() {
    let (mut l2, mut frames, mut ept) = machine();
    l2.set(PT, 5, 0x77_7000 | WB | 7);
    let mut log = PageLog { address: Gpa::new(OWN.0), index: 0 };
    let outcome = ept.violation(EPTP, Ngpa::new(0x5008), Qualification::WRITE, Some(&mut log), &l2, &mut frames);
    assert_eq!((outcome, log.index), (Outcome::Filled, 0xffff), "the index wraps");
    assert!(l2.words.borrow().keys().all(|at| owned(*at, 8)));
}

/// L2's memory in which another processor changes an entry right after it was read.
struct Racing {
    l2: L2,
    at: u64,
    then: u64,
}

impl GuestView for Racing {
    fn read_entry(&self, at: Gpa) -> Result<u64, NotOwned> {
        let entry = self.l2.read_entry(at)?;
        if at.get() == self.at {
            self.l2.words.borrow_mut().insert(self.at, self.then);
        }
        Ok(entry)
    }
    fn read_entries(&self, at: Gpa, into: &mut [u64]) -> Result<(), NotOwned> {
        self.l2.read_entries(at, into)
    }
    fn set_flags(&self, at: Gpa, entry: u64, flags: u64) -> bool {
        self.l2.set_flags(at, entry, flags)
    }
    fn write_word(&self, at: Gpa, value: u64) {
        self.l2.write_word(at, value);
    }
    fn block(&self, gpa: Gpa, at_most: Level) -> Result<Block, NotOwned> {
        self.l2.block(gpa, at_most)
    }
}

#[test]
fn an_entry_that_l2_changes_meanwhile_is_left_as_l2_wants_it() {
    for then in [0, 0x88_8000 | WB | R, 0x77_7000 | WB | R] {
        let (mut l2, mut frames, mut ept) = machine();
        l2.set(PT, 5, 0x77_7000 | WB | 7);
        let racing = Racing { l2, at: PT + 5 * 8, then };
        let mut log = log(511);
        let mut fault =
            || ept.violation(EPTP, Ngpa::new(0x5008), Qualification::WRITE, Some(&mut log), &racing, &mut frames);
        assert_eq!(fault(), Outcome::Filled, "L3 comes again");
        assert!(matches!(fault(), Outcome::ReflectViolation { .. }), "and finds what L2 wants");
        assert_eq!(racing.l2.get(PT + 5 * 8), then);
        assert_eq!(log.index, 511);
        let root = ept.activate(EPTP, &racing, None, &mut frames).eptp02.ep4ta();
        assert!(frames.leaves(root).is_empty());
    }
}
