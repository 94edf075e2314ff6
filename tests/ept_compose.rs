//! ept02, one situation at a time.

mod ept_model;

use ept_model::*;
use nvmx::addr::{Gpa, Hpa, Ngpa};
use nvmx::ept::{Block, Ept02, Eptp, Level, NotOwned, Outcome, Qualification, Rights, TableFrames};

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const OTHER: u64 = 0x20_0000;
const EPTP: Eptp = Eptp::new(ROOT | 0x1e);
const READ: u64 = 1;
const WRITE: u64 = 2;
const FETCH: u64 = 4;
const LINEAR: u64 = 3 << 7;

/// A machine: L2's memory, nvmx's frames, ept02, and the EPTP that L3 runs with.
struct Machine<const ROOTS: usize, const RESERVE: usize> {
    l2: L2,
    frames: Frames,
    ept: Ept02<ROOTS, RESERVE>,
}

type Small = Machine<2, 3>;

impl<const ROOTS: usize, const RESERVE: usize> Machine<ROOTS, RESERVE> {
    /// Upper tables for the addresses below 1 GiB, under both roots.
    fn with_budget(budget: u32) -> Self {
        let mut l2 = L2::default();
        for root in [ROOT, OTHER] {
            l2.set(root, 0, PDPT | 7);
        }
        l2.set(PDPT, 0, PD | 7);
        l2.set(PD, 0, PT | 7);
        let mut frames = Frames::new(1000);
        let ept = Ept02::new(rules(), false, budget, &mut frames).unwrap();
        Self { l2, frames, ept }
    }

    fn fault(&mut self, eptp: Eptp, ngpa: u64, qualification: u64) -> Outcome {
        let qualification = Qualification::from_bits_retain(qualification);
        self.ept.violation(eptp, Ngpa::new(ngpa), qualification, None, &self.l2, &mut self.frames)
    }

    fn refill(&mut self, eptp: Eptp, ngpa: u64, qualification: u64) -> bool {
        let qualification = Qualification::from_bits_retain(qualification);
        let outcome = self.ept.refill(eptp, Ngpa::new(ngpa), qualification, &self.l2, &mut self.frames);
        outcome == Some(Outcome::Filled)
    }

    /// Leaves under an EPTP, and whether activating it asked for INVEPT.
    fn activate(&mut self, eptp: Eptp) -> (Vec<(u64, u64, u64)>, bool) {
        let activation = self.ept.activate(eptp, &self.l2, None, &mut self.frames);
        let flags = eptp.get() & 1 << 6;
        assert_eq!(activation.eptp02.get() & 0xfff, 0x1e | flags, "write-back, four levels, flags as in ept12");
        (self.frames.leaves(activation.eptp02.ep4ta()), activation.invept)
    }
}

fn machine() -> Small {
    Small::with_budget(100)
}

#[test]
fn every_size_rights_and_access_fill_or_reflect_as_ept12_says() {
    let accesses = [READ, WRITE, FETCH, READ | WRITE];
    for (size, ngpa) in [(KIB4, 0x5123), (MIB2, 3 * MIB2 + 0x5123), (GIB1, GIB1 + 3 * MIB2 + 0x5123)] {
        for rights in 0..8 {
            for access in accesses {
                for linear in [0, 1 << 7, LINEAR] {
                    let mut m = machine();
                    match size {
                        KIB4 => m.l2.set(PT, 5, 0x77_7000 | WB | rights),
                        MIB2 => m.l2.set(PD, 3, (9 * MIB2) | WB | LARGE | rights),
                        _ => m.l2.set(PDPT, 1, (7 * GIB1) | WB | LARGE | rights),
                    }
                    let outcome = m.fault(EPTP, ngpa, access | linear | 1 << 12);
                    let seen = m.activate(EPTP).0;
                    if matches!(rights, W | 6) {
                        assert_eq!((outcome, seen), (Outcome::ReflectMisconfig, vec![]));
                    } else if rights & access == access {
                        let page = [(KIB4, 0x77_7000), (MIB2, (9 * MIB2) | LARGE), (GIB1, (7 * GIB1) | LARGE)];
                        let page = page.iter().find(|page| page.0 == size).unwrap().1;
                        let leaf = (ngpa - ngpa % size, size, page | WB | rights);
                        assert_eq!((outcome, seen), (Outcome::Filled, vec![leaf]));
                    } else {
                        let told = Qualification::from_bits_retain(access | rights << 3 | linear | 1 << 12);
                        assert_eq!(
                            (outcome, seen),
                            (Outcome::ReflectViolation { qualification: told, convertible: true }, vec![])
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_rights_of_a_leaf_are_those_of_the_whole_walk() {
    let mut m = machine();
    m.l2.set(PD, 0, PT | R | X);
    m.l2.set(PT, 5, 0x77_7000 | WB | R | W);
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    assert_eq!(m.activate(EPTP).0, [(0x5000, KIB4, 0x77_7000 | WB | R)]);
    let told = Qualification::from_bits_retain(WRITE | R << 3 | LINEAR);
    assert_eq!(
        m.fault(EPTP, 0x5000, WRITE | LINEAR),
        Outcome::ReflectViolation { qualification: told, convertible: true }
    );
}

#[test]
fn memory_type_and_ignore_pat_come_from_ept12() {
    for number in [0, 1, 4, 5, 6] {
        for pat in [0, 1 << 6] {
            let mut m = machine();
            m.l2.set(PT, 5, 0x77_7000 | number << 3 | pat | 7);
            assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
            assert_eq!(m.activate(EPTP).0, [(0x5000, KIB4, 0x77_7000 | number << 3 | pat | 7)]);
        }
    }
}

#[test]
fn accessed_and_dirty_flags_of_ept12_do_not_reach_ept02() {
    let mut m = machine();
    m.l2.set(PT, 5, 0xfff0_0000_0077_7000 | WB | 0xf00 | 7);
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    assert_eq!(m.activate(EPTP).0, [(0x5000, KIB4, 0x77_7000 | WB | 7)]);
}

#[test]
fn what_is_not_present_is_reflected_without_rights() {
    let mut m = machine();
    for ngpa in [0x5000, MIB2, GIB1, 1 << 39, 1 << 48] {
        let told = Qualification::from_bits_retain(FETCH | LINEAR);
        assert_eq!(
            m.fault(EPTP, ngpa, FETCH | LINEAR | 7 << 3),
            Outcome::ReflectViolation { qualification: told, convertible: true },
            "{ngpa:#x}"
        );
    }
}

#[test]
fn advanced_information_is_kept_when_it_was_offered() {
    let mut m = machine();
    m.ept = Ept02::new(rules(), true, 0, &mut m.frames).unwrap();
    let told = Qualification::from_bits_retain(READ | LINEAR | 7 << 9);
    assert_eq!(
        m.fault(EPTP, 0x5000, READ | LINEAR | 7 << 9 | 7 << 13),
        Outcome::ReflectViolation { qualification: told, convertible: true }
    );
}

#[test]
fn a_page_that_meets_nvmx_is_mapped_in_the_pieces_that_do_not() {
    let mut m = machine();
    m.l2.set(PDPT, 1, (2 * GIB1) | WB | LARGE | 7);
    // ngpa 1 GiB + x is gpa 2 GiB + x.
    assert_eq!(m.fault(EPTP, GIB1 + 4 * MIB2 + 1, READ), Outcome::Filled);
    assert_eq!(m.fault(EPTP, GIB1 + 5 * MIB2 + 0x2fff, READ), Outcome::Filled);
    for offset in [0x3000, 0x4567, 0x6fff] {
        let gpa = Gpa::new(2 * GIB1 + 5 * MIB2 + offset);
        assert_eq!(m.fault(EPTP, GIB1 + 5 * MIB2 + offset, READ), Outcome::Forbidden { gpa });
    }
    assert_eq!(m.fault(EPTP, GIB1 + 5 * MIB2 + 0x7000, READ), Outcome::Filled);
    let (leaves, _) = m.activate(EPTP);
    let page = |ngpa, size, flags| (ngpa, size, (ngpa + GIB1) | WB | 7 | flags);
    let around = GIB1 + 5 * MIB2;
    assert_eq!(
        leaves,
        [page(GIB1 + 4 * MIB2, MIB2, LARGE), page(around + 0x2000, KIB4, 0), page(around + 0x7000, KIB4, 0)]
    );
}

#[test]
fn tables_of_ept12_in_memory_that_l2_does_not_own_are_a_misconfiguration() {
    let mut m = machine();
    m.l2.set(PD, 0, OWN.0 | 7);
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::ReflectMisconfig);
    assert_eq!(m.fault(Eptp::new(OWN.0 | 0x1e), 0x5000, READ), Outcome::ReflectMisconfig);
}

#[test]
fn filling_what_was_missing_needs_no_invept() {
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    m.l2.set(PT, 6, 0x77_8000 | WB | 7);
    assert!(m.activate(EPTP).1, "a new root does");
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    assert!(!m.activate(EPTP).1);
    assert_eq!(m.fault(EPTP, 0x6000, READ), Outcome::Filled);
    assert!(!m.activate(EPTP).1);
    // The same fault again: another processor, or a device, was faster.
    assert_eq!(m.fault(EPTP, 0x6000, READ), Outcome::Filled);
    assert!(!m.activate(EPTP).1);
    assert_eq!(m.ept.stats().fills, 3);
    assert_eq!(m.ept.stats().invepts, 1);
}

#[test]
fn more_rights_need_no_invept_and_any_other_change_does() {
    let changes = [
        (0x77_7000 | WB | R, 0x77_7000 | WB | R | W, false),
        (0x77_7000 | WB | R, 0x77_7000 | WB | 7, false),
        (0x77_7000 | WB | R | X, 0x77_7000 | WB | R | W, true),
        (0x77_7000 | WB | R, 0x77_8000 | WB | R | W, true),
        (0x77_7000 | WB | R, 0x77_7000 | R | W, true),
        (0x77_7000 | WB | R, 0x77_7000 | WB | 1 << 6 | R | W, true),
    ];
    for (before, after, invept) in changes {
        let mut m = machine();
        m.l2.set(PT, 5, before);
        assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
        let _ = m.activate(EPTP);
        m.l2.set(PT, 5, after);
        assert_eq!(m.fault(EPTP, 0x5000, WRITE), Outcome::Filled);
        assert_eq!(m.activate(EPTP), (vec![(0x5000, KIB4, after)], invept), "{before:#x} to {after:#x}");
        assert!(!m.activate(EPTP).1, "once");
    }
}

/// The pattern of CVE-2026-53359: L2 turns a large page into a table and back, without INVEPT.
#[test]
fn a_large_page_and_a_table_replace_each_other() {
    let mut m = machine();
    for round in 0..4 {
        m.l2.set(PD, 0, (9 * MIB2) | WB | LARGE | R);
        let _ = m.activate(EPTP);
        assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
        assert_eq!(m.activate(EPTP), (vec![(0, MIB2, (9 * MIB2) | WB | LARGE | R)], round > 0));
        m.l2.set(PD, 0, PT | 7);
        m.l2.set(PT, 5, 0x77_7000 | WB | 7);
        assert_eq!(m.fault(EPTP, 0x5000, WRITE), Outcome::Filled);
        assert_eq!(m.activate(EPTP), (vec![(0x5000, KIB4, 0x77_7000 | WB | 7)], true));
        assert_eq!(m.ept.tables(), 3);
    }
    m.l2.set(PDPT, 0, (7 * GIB1) | WB | LARGE | 7);
    assert_eq!(m.fault(EPTP, 0x6000, READ), Outcome::Filled);
    assert_eq!(m.activate(EPTP), (vec![(0, GIB1, (7 * GIB1) | WB | LARGE | 7)], true));
    assert_eq!(m.ept.tables(), 1, "the tables of smaller pages are free");
}

#[test]
fn a_fill_fetches_each_entry_of_ept12_once() {
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    for _ in 0..2 {
        assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
        assert_eq!(m.l2.fetched.borrow().len(), 4);
        assert_eq!(m.l2.most_fetches(), 1);
    }
}

/// A machine on which L3 just touched the page at 0x5000, with pages to follow.
fn in_a_run() -> Small {
    let mut m = machine();
    for index in 5..10 {
        m.l2.set(PT, index, (0x77_2000 + (index << 12)) | WB | 7);
    }
    let _ = m.activate(EPTP);
    assert!(!m.refill(EPTP, 0x5000, READ), "there must be a first");
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    m.l2.fetched.take();
    m
}

#[test]
fn the_next_pages_of_a_run_cost_one_fetch_and_nothing_to_activate() {
    let mut m = in_a_run();
    for index in [7, 6, 9] {
        assert!(m.refill(EPTP, index << 12 | 0x123, WRITE));
        assert_eq!(m.l2.fetched.take().into_iter().collect::<Vec<_>>(), [(PT + index * 8, 1)]);
    }
    let page = |index: u64| (index << 12, KIB4, (0x77_2000 + (index << 12)) | WB | 7);
    assert_eq!(m.activate(EPTP), ([5, 6, 7, 9].map(page).to_vec(), false));
    assert_eq!(m.ept.stats().fills, 4);
}

/// After a violation that L2 saw, while L2 has led the walk elsewhere at one of its levels, so that the run's page table may not be found again.
#[test]
fn what_l2_has_mapped_is_filled_by_one_fetch_of_each_entry_wherever_the_walk_leads_now() {
    const FLAGS: u64 = 3 << 8;
    const MOVED: [u64; 4] = [0x11_0000, 0x11_1000, 0x11_2000, 0x11_3000];
    const TABLES: [u64; 4] = [ROOT, PDPT, PD, PT];
    for (eptp, flags) in [(EPTP, 0), (Eptp::new(ROOT | 0x5e), FLAGS), (Eptp::new(ROOT | 0x5e), 0)] {
        // Where an entry is changed, and the table to which it leads then; none is.
        let changes = TABLES.into_iter().zip(MOVED.into_iter().skip(1)).map(Some);
        for moved in changes.chain([None]) {
            let mut m = machine();
            let ways = [TABLES, MOVED];
            for (table, below) in ways.iter().flat_map(|way| way.windows(2).map(|pair| (pair[0], pair[1]))) {
                m.l2.set(table, 0, below | 7 | flags);
            }
            m.l2.set(PT, 5, 0x77_7000 | WB | 7 | flags);
            assert_eq!(m.fault(eptp, 0x5000, READ), Outcome::Filled);
            let _ = m.activate(eptp);
            assert!(matches!(m.fault(eptp, 0x6000, READ), Outcome::ReflectViolation { .. }));
            if let Some((table, below)) = moved {
                m.l2.set(table, 0, below | 7 | flags);
            }
            let pt = if moved.is_some() { MOVED[3] } else { PT };
            m.l2.set(pt, 6, 0x88_8000 | WB | 7 | flags);
            m.l2.fetched.take();
            let access = Qualification::from_bits_retain(READ);
            let filled = m.ept.fill_expected(eptp, Ngpa::new(0x6000), access, &m.l2, &mut m.frames);
            assert!(m.l2.fetched.borrow().contains_key(&(pt + 6 * 8)), "the entry was looked at");
            assert_eq!(m.l2.most_fetches(), 1, "{eptp:?} {moved:x?}");
            let leaf = (0x6000, KIB4, 0x88_8000 | WB | 7);
            assert_eq!(m.activate(eptp).0.contains(&leaf), filled, "{eptp:?} {moved:x?}");
            // A load sets no flag.
            assert_eq!(filled, !eptp.accessed_dirty() || flags == FLAGS, "{eptp:?} {moved:x?}");
        }
    }
}

#[test]
fn where_l3_goes_from_page_to_page_those_ahead_are_filled_with_it() {
    let mut m = machine();
    let present = 5..500;
    for index in present.clone() {
        m.l2.set(PT, index, (0x77_2000 + (index << 12)) | WB | 7);
    }
    let mut faults = vec![];
    for index in present {
        let there = m.activate(EPTP).0.iter().any(|leaf| leaf.0 == index << 12);
        if there {
            continue;
        }
        faults.push(index);
        m.l2.fetched.take();
        if !m.refill(EPTP, index << 12, READ) {
            assert_eq!(m.fault(EPTP, index << 12, READ), Outcome::Filled);
        }
        assert_eq!(m.l2.most_fetches(), 1, "each entry is fetched once");
    }
    // Two, four, eight and sixteen further ones; after the last entry that is there nothing is filled.
    assert_eq!(faults[..6], [5, 6, 8, 11, 16, 25]);
    assert!(faults[6..].windows(2).all(|pair| pair[1] - pair[0] == 17), "{faults:?}");
    let page = |index: u64| (index << 12, KIB4, (0x77_2000 + (index << 12)) | WB | 7);
    assert_eq!(m.activate(EPTP), ((5..500).map(page).collect(), false));
}

#[test]
fn what_is_ahead_is_filled_as_it_stands_in_ept12_and_ends_where_it_may_not() {
    for (what, entry, filled) in [
        ("readable only", 0x77_9000 | WB | R, true),
        ("not there", 0, false),
        ("writable only", 0x77_9000 | WB | W, false),
        ("nvmx's memory", OWN.0 | WB | 7, false),
        ("beyond the address width", 1 << WIDTH | WB | 7, false),
    ] {
        let mut m = in_a_run();
        m.l2.set(PT, 7, entry);
        assert!(m.refill(EPTP, 0x6000, WRITE), "{what}");
        let leaf = (0x7000, KIB4, entry);
        assert_eq!(m.activate(EPTP).0.contains(&leaf), filled, "{what}");
        assert_eq!(m.activate(EPTP).0.len(), if filled { 3 } else { 2 }, "{what}");
    }
    // What is there already is left as it is.
    let mut m = in_a_run();
    m.l2.set(PT, 7, 0x77_9000 | WB | R);
    assert!(m.refill(EPTP, 0x7000, READ) && m.refill(EPTP, 0x6000, READ));
    m.l2.set(PT, 7, 0x77_9000 | WB | 7);
    assert!(m.refill(EPTP, 0x8000, READ));
    assert_eq!(m.activate(EPTP).0[2], (0x7000, KIB4, 0x77_9000 | WB | R));
}

#[test]
fn what_a_run_does_not_resolve_is_left_alone() {
    let cases = [
        ("not present", 6, 0, READ, true),
        ("without the right", 6, 0x77_8000 | WB | R, WRITE, true),
        ("writable only", 6, 0x77_8000 | WB | W, WRITE, true),
        ("reserved memory type", 6, 0x77_8000 | 2 << 3 | 7, READ, true),
        ("beyond the address width", 6, 1 << WIDTH | WB | 7, READ, true),
        ("nvmx's memory", 6, OWN.0 | WB | 7, READ, true),
        ("another page in the place of one that is mapped", 5, 0x77_8000 | WB | 7, WRITE, true),
        ("fewer rights in the place of a page", 5, 0x77_7000 | WB | R | X, FETCH, true),
        ("another 2 MiB", 512 + 6, 0, READ, false),
    ];
    for (what, index, entry, access, write) in cases {
        let mut m = in_a_run();
        if write {
            m.l2.set(PT, index, entry);
        }
        let before = m.activate(EPTP);
        assert!(!m.refill(EPTP, index << 12, access), "{what}");
        assert_eq!(m.activate(EPTP), before, "{what}");
        assert_eq!(m.ept.stats().fills, 1, "{what}");
    }
    let mut m = in_a_run();
    assert!(!m.refill(Eptp::new(ROOT | 0x18), 0x6000, READ), "another role");
    assert!(!m.refill(Eptp::new(OTHER | 0x1e), 0x6000, READ), "another root");
    assert!(m.refill(EPTP, 0x6000, READ));
}

#[test]
fn more_rights_continue_a_run() {
    let mut m = in_a_run();
    m.l2.set(PT, 6, 0x77_8000 | WB | R);
    assert!(m.refill(EPTP, 0x6000, READ));
    m.l2.set(PT, 6, 0x77_8000 | WB | R | W);
    assert!(m.refill(EPTP, 0x6000, WRITE));
    assert_eq!(m.activate(EPTP).0[1], (0x6000, KIB4, 0x77_8000 | WB | R | W));
}

#[test]
fn the_rights_above_the_page_table_hold_for_the_whole_run() {
    let mut m = machine();
    m.l2.set(PD, 0, PT | R | X);
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    m.l2.set(PT, 6, 0x77_8000 | WB | 7);
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    assert!(!m.refill(EPTP, 0x6000, WRITE));
    assert!(m.refill(EPTP, 0x6000, FETCH));
    assert_eq!(m.activate(EPTP).0[1], (0x6000, KIB4, 0x77_8000 | WB | R | X));
}

#[test]
fn a_run_survives_a_switch() {
    let mut m = in_a_run();
    assert!(m.activate(Eptp::new(OTHER | 0x1e)).0.is_empty());
    let _ = m.activate(EPTP);
    assert!(m.refill(EPTP, 0x7000, READ));
    assert_eq!(m.activate(EPTP).0.len(), 2);
}

/// As with a processor's paging-structure cache: a change of an upper entry counts after INVEPT, or after a violation.
#[test]
fn a_run_ends_where_a_processor_forgets() {
    const NEW: u64 = 0x10_4000;
    type End = fn(&mut Small);
    let ends: [(&str, End); 6] = [
        ("INVEPT", |m| m.ept.invept_single(EPTP)),
        ("INVEPT of all", |m| m.ept.invept_all()),
        ("VMXOFF", |m| m.ept.forget_all(&mut m.frames)),
        ("a violation that L2 sees, for want of a page", |m| {
            assert!(matches!(m.fault(EPTP, 0xf000, READ), Outcome::ReflectViolation { .. }));
        }),
        ("a violation that L2 sees, for want of a right", |m| {
            m.l2.set(PT, 9, 0x77_b000 | WB | R);
            assert!(matches!(m.fault(EPTP, 0x9000, WRITE), Outcome::ReflectViolation { .. }));
        }),
        ("its root given to others", |m| {
            let _ = [OTHER | 0x1e, OTHER | 0x18, ROOT | 0x1e].map(|role| m.activate(Eptp::new(role)));
        }),
    ];
    for (what, end) in ends {
        let mut m = in_a_run();
        assert!(m.refill(EPTP, 0x6000, READ));
        end(&mut m);
        m.l2.set(PD, 0, NEW | 7);
        m.l2.set(NEW, 7, 0x99_9000 | WB | 7);
        assert!(!m.refill(EPTP, 0x7000, READ), "{what}");
        assert_eq!(m.fault(EPTP, 0x7000, READ), Outcome::Filled);
        let leaves = m.activate(EPTP).0;
        assert!(leaves.contains(&(0x7000, KIB4, 0x99_9000 | WB | 7)), "{what}");
    }
}

#[test]
fn contents_survive_a_switch_and_the_role_is_the_whole_eptp() {
    let mut m = Machine::<4, 3>::with_budget(100);
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    let roles = [ROOT | 0x1e, ROOT | 0x18, ROOT | 0x5e, OTHER | 0x1e].map(Eptp::new);
    let pointers = roles.map(|role| {
        assert_eq!(m.fault(role, 0x5000, READ), Outcome::Filled);
        let activation = m.ept.activate(role, &m.l2, None, &mut m.frames);
        assert!(activation.invept);
        activation.eptp02
    });
    for (n, role) in roles.into_iter().enumerate() {
        assert!(!pointers[..n].contains(&pointers[n]), "no root is shared");
        let activation = m.ept.activate(role, &m.l2, None, &mut m.frames);
        assert_eq!((activation.eptp02, activation.invept), (pointers[n], false));
        assert_eq!(m.activate(role).0.len(), 1);
    }
    assert_eq!(m.ept.stats().evictions, 0);
}

#[test]
fn the_root_longest_out_of_use_gives_way() {
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    let [a, b, c] = [ROOT | 0x1e, OTHER | 0x1e, ROOT | 0x18].map(Eptp::new);
    for role in [a, b] {
        let _ = m.activate(role);
        assert_eq!(m.fault(role, 0x5000, READ), Outcome::Filled);
    }
    let _ = m.activate(a);
    assert_eq!(m.activate(c), (vec![], true), "b's root, emptied");
    assert_eq!(m.activate(a), (vec![(0x5000, KIB4, 0x77_7000 | WB | 7)], false));
    assert_eq!(m.activate(b), (vec![], false), "c's root, which never held anything");
    assert_eq!(m.ept.stats().evictions, 2);
}

#[test]
fn without_frames_other_roots_are_emptied_before_the_own_one() {
    let mut m = Machine::<3, 3>::with_budget(3);
    let [a, b] = [ROOT | 0x1e, OTHER | 0x1e].map(Eptp::new);
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    m.l2.set(PDPT, 3, PD | 7);
    for role in [a, b] {
        assert_eq!(m.fault(role, 0x5000, READ), Outcome::Filled);
        let _ = m.activate(role);
    }
    assert_eq!(m.ept.tables(), 6, "all there are");
    // Another gibibyte of b needs two more.
    assert_eq!(m.fault(b, 3 * GIB1 + 0x5000, READ), Outcome::Filled);
    assert_eq!(m.activate(b).0.len(), 2, "b kept what it had");
    assert_eq!(m.activate(a), (vec![], true));
    m.l2.set(OTHER, 1, PDPT | 7);
    assert_eq!(m.fault(b, (1 << 39) + 0x5000, READ), Outcome::Filled);
    assert_eq!(m.activate(b), (vec![((1 << 39) + 0x5000, KIB4, 0x77_7000 | WB | 7)], true), "b started over");
    assert_eq!(m.ept.stats().evictions, 2);
}

#[test]
fn the_reserve_suffices_when_the_pool_is_empty() {
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    m.frames.free.clear();
    assert_eq!(m.fault(EPTP, 0x5000, READ), Outcome::Filled);
    assert_eq!(m.activate(EPTP).0.len(), 1);
}

#[test]
fn a_frame_of_the_reserve_comes_back_empty() {
    let mut m = Small::with_budget(0);
    for index in 0..512 {
        m.l2.set(PT, index, 0x77_7000 | WB | 7);
        assert_eq!(m.fault(EPTP, index * KIB4, READ), Outcome::Filled);
    }
    m.l2.set(PD, 0, 0);
    m.ept.invept_all();
    assert_eq!(m.activate(EPTP), (vec![], true));
    m.l2.set(PD, 0, PT | 7);
    m.l2.set(PDPT, 1, (7 * GIB1) | LARGE | WB | 7);
    assert_eq!(m.fault(EPTP, GIB1, READ), Outcome::Filled);
    assert_eq!(m.fault(EPTP, 0, READ), Outcome::Filled);
    assert_eq!(m.activate(EPTP).0.len(), 2);
}

#[test]
fn without_enough_frames_there_is_no_ept02_and_nothing_is_lost() {
    for available in 0..4 {
        let mut frames = Frames::new(available);
        assert!(Ept02::<2, 3>::new(rules(), false, 9, &mut frames).is_err());
        assert_eq!(frames.free.len() as u64, available);
    }
    assert!(Ept02::<2, 3>::new(rules(), false, 9, &mut Frames::new(4)).is_ok());
}

#[test]
fn forgetting_gives_every_frame_back() {
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    for role in [ROOT | 0x1e, OTHER | 0x1e].map(Eptp::new) {
        assert_eq!(m.fault(role, 0x5000, READ), Outcome::Filled);
    }
    assert_eq!(m.frames.used.len(), 2 + 6 + 3, "roots, tables, and the reserve is full while the pool has frames");
    m.ept.forget_all(&mut m.frames);
    assert_eq!(m.frames.used.len(), 1 + 3, "the first root and the reserve");
    assert_eq!(m.ept.tables(), 0);
    assert_eq!(m.activate(EPTP), (vec![], true));
}

#[test]
fn there_are_as_many_roots_as_eptps_in_use_up_to_the_bound() {
    let mut m = Machine::<5, 3>::with_budget(100);
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    // Bits 11:7 of an EPTP are no part of the address, and here they only tell one role from another.
    let roles: Vec<Eptp> = (0..6).map(|n| Eptp::new(ROOT | 0x1e | n << 7)).collect();
    let before = m.frames.used.len();
    for role in &roles[..5] {
        let _ = m.fault(*role, 0x5000, READ);
    }
    for role in roles[..5].iter().cycle().take(15) {
        assert_eq!(m.activate(*role).0.len(), 1);
    }
    assert_eq!(m.ept.stats().evictions, 0);
    assert_eq!(m.frames.used.len(), before + 4 + 5 * 3, "a frame a root beside its tables");
    let _ = m.fault(roles[5], 0x5000, READ);
    assert_eq!(m.ept.stats().evictions, 1);
}

#[test]
fn without_frames_for_another_root_the_one_longest_out_of_use_gives_way() {
    let mut m = Machine::<5, 3>::with_budget(0);
    let [a, b] = [ROOT | 0x1e, OTHER | 0x1e].map(Eptp::new);
    m.frames.free.clear();
    for _ in 0..3 {
        for role in [a, b] {
            let _ = m.activate(role);
        }
    }
    assert_eq!(m.ept.stats().evictions, 5, "each but the first takes the only root there is");
}

#[test]
fn an_access_that_ept01_refuses_is_forbidden() {
    /// L2's memory with everything write-protected in ept01.
    struct ReadOnly(L2);
    impl nvmx::ept::GuestView for ReadOnly {
        fn read_entry(&self, at: Gpa) -> Result<u64, nvmx::ept::NotOwned> {
            self.0.read_entry(at)
        }
        fn read_entries(&self, at: Gpa, into: &mut [u64]) -> Result<(), nvmx::ept::NotOwned> {
            self.0.read_entries(at, into)
        }
        fn set_flags(&self, at: Gpa, entry: u64, flags: u64) -> bool {
            self.0.set_flags(at, entry, flags)
        }
        fn write_word(&self, at: Gpa, value: u64) {
            self.0.write_word(at, value);
        }
        fn block(&self, gpa: Gpa, level: nvmx::ept::Level) -> Result<nvmx::ept::Block, nvmx::ept::NotOwned> {
            Ok(nvmx::ept::Block { rights: Rights::READ | Rights::EXECUTE, ..self.0.block(gpa, level)? })
        }
    }
    let mut m = machine();
    m.l2.set(PT, 5, 0x77_7000 | WB | R | W);
    let guest = ReadOnly(m.l2);
    let mut fault = |access| {
        m.ept.violation(EPTP, Ngpa::new(0x5008), Qualification::from_bits_retain(access), None, &guest, &mut m.frames)
    };
    assert_eq!(fault(WRITE), Outcome::Forbidden { gpa: Gpa::new(0x77_7008) });
    assert_eq!(fault(READ), Outcome::Filled);
    let root = m.ept.activate(EPTP, &guest, None, &mut m.frames).eptp02.ep4ta();
    assert_eq!(m.frames.leaves(root), [(0x5000, KIB4, 0x77_7000 | WB | R)]);
}

#[test]
fn the_machines_pool_and_memory_serve_too() {
    use nvmx::ept::PoolFrames;
    use nvmx::mm::{FramePool, GuestMemory, Span, phys::VecMem};
    let memory = VecMem::new(0x20_0000);
    let own = Span::new(0x18_0000, 0x20_0000);
    let guest = GuestMemory::new(&memory, own, WIDTH as u8);
    for (table, index, entry) in [(0x1000, 0, 0x2007), (0x2000, 0, 0x3007), (0x3000, 0, 0x87 | WB)] {
        memory.write_u64(nvmx::addr::Hpa::new(table + index * 8), entry);
    }
    let mut pool = FramePool::new(own);
    let mut frames = PoolFrames { pool: &mut pool, memory: &memory };
    let mut ept = Ept02::<2, 3>::new(rules(), false, 100, &mut frames).unwrap();
    let eptp = Eptp::new(0x101e);
    let mut fault = |ngpa| ept.violation(eptp, Ngpa::new(ngpa), Qualification::READ, None, &guest, &mut frames);
    assert_eq!(fault(0x5123), Outcome::Filled);
    assert_eq!(fault(0x18_0123), Outcome::Forbidden { gpa: Gpa::new(0x18_0123) });
    assert_eq!(fault(0x20_0000), Outcome::ReflectViolation { qualification: Qualification::READ, convertible: true });
    let mut table = ept.activate(eptp, &guest, None, &mut frames).eptp02.ep4ta();
    for (index, present) in [(0, true), (0, true), (0, true), (5, true)] {
        let entry = frames.read(nvmx::addr::Hpa::new(table + index * 8));
        assert_eq!(entry & 7 != 0, present);
        assert!(table >= own.start());
        table = entry & 0xf_ffff_ffff_f000;
    }
    assert_eq!(table, 0x5000, "the 2 MiB page meets nvmx, so its pieces are mapped");
    ept.forget_all(&mut frames);
    assert_eq!(pool.total() - pool.available(), 1 + 3);
}

#[test]
fn the_budget_counts_what_is_in_use() {
    let mut m = Small::with_budget(3);
    m.l2.set(PT, 5, 0x77_7000 | WB | 7);
    for _ in 0..3 {
        for role in [ROOT | 0x1e, OTHER | 0x1e].map(Eptp::new) {
            assert_eq!(m.fault(role, 0x5000, READ), Outcome::Filled);
        }
        assert_eq!(m.ept.tables(), 6, "three of the reserve and three of the budget");
        m.ept.forget_all(&mut m.frames);
    }
    assert_eq!(m.ept.stats().evictions, 0);
}

#[test]
fn a_block_is_as_large_as_ownership_and_alignment_on_the_host_allow() {
    let gpa = Gpa::new(5 * GIB1 + 3 * MIB2 + 0x5678);
    let at = |offset: u64, limit: u64| {
        Block::largest(gpa, Level::Pdpt, Rights::all(), |start, bytes| {
            (bytes <= limit).then_some(Hpa::new(start.get() + offset))
        })
    };
    let block = |hpa, level| Ok(Block { hpa: Hpa::new(hpa), level, rights: Rights::all() });
    assert_eq!(at(GIB1, GIB1), block(6 * GIB1, Level::Pdpt));
    assert_eq!(at(GIB1, MIB2), block(6 * GIB1 + 3 * MIB2, Level::Pd));
    assert_eq!(at(MIB2, GIB1), block(5 * GIB1 + 4 * MIB2, Level::Pd));
    assert_eq!(at(KIB4, GIB1), block(5 * GIB1 + 3 * MIB2 + 0x6000, Level::Pt));
    assert_eq!(at(0, KIB4 - 1), Err(NotOwned(gpa)));
}
