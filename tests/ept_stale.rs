//! What is told of an L2 that changes its EPT without INVEPT: the translations that it still has and no longer grants.

mod ept_model;

use ept_model::*;
use nvmx::addr::{Gpa, Ngpa};
use nvmx::ept::{Ept02, Eptp, Outcome, Qualification};
use nvmx::vmx::controls::SecondaryControls;

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const ROLE: u64 = ROOT | 0x1e;
const FLAGS: u64 = 1 << 6;
const WRITE: u64 = 2;
const PAGE: u64 = 0x77_5000;
const LARGE_PAGE: u64 = 9 * MIB2;

struct Machine {
    l2: L2,
    frames: Frames,
    ept: Ept02<4, 8>,
    role: Eptp,
}

/// Address, where it leads, and where ept12 does.
type Stale = (u64, u64, Option<u64>);

/// A page of 4 KiB and one of 2 MiB, both in use.
fn machine(role: u64) -> Machine {
    let mut l2 = L2::default();
    for (table, index, entry) in [
        (ROOT, 0, PDPT | 7),
        (PDPT, 0, PD | 7),
        (PD, 0, PT | 7),
        (PD, 3, LARGE_PAGE | WB | LARGE | 7),
        (PT, 5, PAGE | WB | 7),
    ] {
        l2.set(table, index, entry);
    }
    let mut frames = Frames::new(1000);
    let ept = Ept02::new(rules(), false, 100, &mut frames).unwrap();
    let mut m = Machine { l2, frames, ept, role: Eptp::new(role) };
    for ngpa in [0x5000, 3 * MIB2] {
        let access = Qualification::from_bits_retain(WRITE | 3 << 7);
        let outcome = m.ept.violation(m.role, Ngpa::new(ngpa), access, None, &m.l2, &mut m.frames);
        assert_eq!(outcome, Outcome::Filled);
    }
    assert_eq!(m.stale(), None);
    m
}

impl Machine {
    fn stale(&mut self) -> Option<Stale> {
        let eptp02 = self.ept.activate(self.role, &self.l2, None, &mut self.frames).eptp02;
        let found = self.ept.stale_leaf(eptp02, &self.l2, &self.frames)?;
        Some((found.ngpa, found.used, found.now.map(|(to, _)| to)))
    }
}

#[test]
fn a_change_that_needs_invept_is_told_until_it_comes() {
    type Change = fn(&mut L2);
    let cases: [(&str, Change, Stale); 8] = [
        ("gone", |l2| l2.set(PT, 5, 0), (0x5000, PAGE, None)),
        ("another page", |l2| l2.set(PT, 5, 0x88_8000 | WB | 7), (0x5000, PAGE, Some(0x88_8000))),
        ("fewer rights", |l2| l2.set(PT, 5, PAGE | WB | R), (0x5000, PAGE, Some(PAGE))),
        ("another type", |l2| l2.set(PT, 5, PAGE | 7), (0x5000, PAGE, Some(PAGE))),
        ("a reserved bit", |l2| l2.set(PT, 5, PAGE | 1 << WIDTH | WB | 7), (0x5000, PAGE, None)),
        ("fewer rights above", |l2| l2.set(PD, 0, PT | R), (0x5000, PAGE, Some(PAGE))),
        ("no table", |l2| l2.set(PDPT, 0, 0), (0x5000, PAGE, None)),
        (
            "another large page",
            |l2| l2.set(PD, 3, (10 * MIB2) | WB | LARGE | 7),
            (3 * MIB2, LARGE_PAGE, Some(10 * MIB2)),
        ),
    ];
    for (name, change, wanted) in cases {
        let mut m = machine(ROLE);
        change(&mut m.l2);
        assert_eq!(m.stale(), Some(wanted), "{name}");
        assert_eq!(m.stale(), Some(wanted), "{name}: it goes on being used");
        m.ept.invept_single(m.role);
        assert_eq!(m.stale(), None, "{name}: after INVEPT");
    }
}

#[test]
fn a_large_page_that_is_split_is_looked_at_page_by_page() {
    const SPLIT: u64 = 0x10_4000;
    let mut m = machine(ROLE);
    for index in 0..512 {
        m.l2.set(SPLIT, index, (LARGE_PAGE + index * 0x1000) | WB | 7);
    }
    m.l2.set(PD, 3, SPLIT | 7);
    assert_eq!(m.stale(), None);
    m.l2.set(SPLIT, 77, 0x99_9000 | WB | 7);
    assert_eq!(m.stale(), Some((3 * MIB2 + 77 * 0x1000, LARGE_PAGE + 77 * 0x1000, Some(0x99_9000))));
}

#[test]
fn more_rights_and_flags_that_l2_cleared_need_no_invept() {
    let mut m = machine(ROLE | FLAGS);
    assert_eq!(m.l2.get(PT + 5 * 8), PAGE | WB | 7 | 0x300);
    m.l2.set(PT, 5, PAGE | WB | 7);
    assert_eq!(m.stale(), None);
    let mut m = machine(ROLE);
    m.l2.set(PT, 6, 0x66_6000 | WB | 7);
    assert_eq!(m.stale(), None);
}

const SPP: u64 = 0x20_0000;
const SUB_PAGES: u64 = 1 << 61;
const WORDS: u64 = SPP + 0x3000;
const OTHER_WORDS: u64 = SPP + 0x4000;

/// A page whose first piece can be written by a table of permissions, and was.
fn with_sub_pages() -> Machine {
    let mut m = machine(ROLE);
    m.role = Eptp::new(ROLE).under(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS);
    m.l2.set(PT, 5, PAGE | WB | R | SUB_PAGES);
    for (table, entry) in [(SPP, SPP + 0x1000), (SPP + 0x1000, SPP + 0x2000), (SPP + 0x2000, WORDS)] {
        m.l2.set(table, 0, entry | 1);
    }
    m.l2.set(WORDS, 5, 1);
    let _ = m.ept.activate(m.role, &m.l2, None, &mut m.frames);
    let _ = m.ept.sub_pages(Gpa::new(SPP), &mut m.frames).expect("frames enough");
    let write = Qualification::from_bits_retain(WRITE | 3 << 7);
    let outcome = m.ept.violation(m.role, Ngpa::new(0x5000), write, None, &m.l2, &mut m.frames);
    assert_eq!(outcome, Outcome::Filled);
    assert_eq!(m.found(), None);
    m
}

impl Machine {
    /// As `stale`, and whether it is the table of permissions.
    fn found(&mut self) -> Option<(Stale, bool)> {
        let eptp02 = self.ept.activate(self.role, &self.l2, None, &mut self.frames).eptp02;
        let found = self.ept.stale_leaf(eptp02, &self.l2, &self.frames)?;
        Some(((found.ngpa, found.used, found.now.map(|(to, _)| to)), found.sub_pages))
    }
}

#[test]
fn a_table_of_sub_page_permissions_that_l2_replaced_is_told() {
    type Case = (&'static str, fn(&mut L2), Option<(Stale, bool)>);
    let page = |now| Some(((0x5000, PAGE, now), false));
    let table = |now| Some(((0x5000, WORDS, now), true));
    let cases: [Case; 9] = [
        ("another last table", |l2| l2.set(SPP + 0x2000, 0, OTHER_WORDS | 1), table(Some(OTHER_WORDS))),
        ("none", |l2| l2.set(SPP + 0x2000, 0, 0), table(None)),
        ("none above", |l2| l2.set(SPP, 0, 0), table(None)),
        ("a reserved bit", |l2| l2.set(SPP + 0x1000, 0, (SPP + 0x2000) | 3), table(None)),
        ("a bit of no sub-page", |l2| l2.set(WORDS, 5, 2), table(None)),
        ("no permissions any more", |l2| l2.set(PT, 5, PAGE | WB | R), table(None)),
        ("no page", |l2| l2.set(PT, 5, 0), page(None)),
        // The words are L2's own, and more rights need no INVEPT.
        ("other words", |l2| l2.set(WORDS, 5, 4), None),
        ("a page that can be written", |l2| l2.set(PT, 5, PAGE | WB | 7), None),
    ];
    for (name, change, wanted) in cases {
        let mut m = with_sub_pages();
        change(&mut m.l2);
        assert_eq!(m.found(), wanted, "{name}");
        m.ept.invept_single(m.role);
        assert_eq!(m.found(), None, "{name}: after INVEPT");
    }
}
