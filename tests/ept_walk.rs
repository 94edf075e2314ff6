//! The walker against the reference: a grid over sizes and rights at every level, and random trees.

mod ept_model;

use ept_model::*;
use nvmx::addr::Gpa;
use nvmx::ept::entry::Level;
use nvmx::ept::walk::{GuestTables, Walk, walk};
use proptest::prelude::*;

const PML4: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const PML5: u64 = 0x10_4000;
/// Beside a root table: five levels.
const FIVE: u64 = 4 << 3;
/// Index 3 in the PML4 table, 5 in the PDPT, 7 in the PD, 9 in the PT.
const NGPA: u64 = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0xabc;

fn rules_with(execute_only: bool) -> nvmx::ept::EptRules {
    nvmx::ept::EptRules::new(WIDTH, execute_only, true, true)
}

/// The walker's answer in the words of the reference.
fn walked(l2: &L2, root: u64, ngpa: u64, execute_only: bool) -> Said {
    let top = if levels(root) == 5 { Level::Pml5 } else { Level::Pml4 };
    match walk(&mut GuestTables(l2), (Gpa::new(table(root)), top), ngpa, &rules_with(execute_only)) {
        Walk::Leaf(leaf) => Said::Page(
            leaf.page.get(),
            leaf.level.bytes(),
            leaf.rights.bits().into(),
            (leaf.caching.memory_type() as u64) << 3 | u64::from(leaf.caching.ignore_pat()) << 6,
        ),
        Walk::NotPresent(_) => Said::Nothing,
        Walk::Misconfigured(..) | Walk::Unreadable(_) => Said::Wrong,
    }
}

/// ept12 with a path to `NGPA` that ends at `depth` (1: 1 GiB page, 2: 2 MiB, 3: 4 KiB).
fn path(rights: [u64; 4], depth: usize) -> L2 {
    let mut l2 = L2::default();
    let steps = [(PML4, 3, PDPT), (PDPT, 5, PD), (PD, 7, PT), (PT, 9, 0x1_2345_6000)];
    for (n, (table, index, next)) in steps.into_iter().enumerate().take(depth + 1) {
        let entry = match (n == depth, depth) {
            (false, _) => next,
            (_, 1) => (5 * GIB1) | WB | LARGE,
            (_, 2) => (9 * MIB2) | WB | LARGE,
            _ => next | WB,
        };
        l2.set(table, index, entry | rights[n]);
    }
    l2
}

#[test]
fn rights_are_anded_over_every_combination_at_every_level() {
    for depth in 1..4 {
        for combination in 0..8u64.pow(depth as u32 + 1) {
            let rights = [0, 1, 2, 3].map(|n| combination >> (3 * n) & 7);
            let l2 = path(rights, depth);
            for execute_only in [false, true] {
                let said = walked(&l2, PML4, NGPA, execute_only);
                assert_eq!(said, reference(&l2, PML4, NGPA, execute_only), "{rights:?} to depth {depth}");
                if let Said::Page(_, _, granted, _) = said {
                    assert_eq!(granted, rights[..=depth].iter().fold(7, |all, one| all & one));
                }
            }
        }
    }
}

#[test]
fn each_entry_is_fetched_once() {
    for depth in 1..4 {
        let l2 = path([7; 4], depth);
        assert!(matches!(walked(&l2, PML4, NGPA, true), Said::Page(..)));
        assert_eq!(l2.fetched.borrow().len(), depth + 1);
        assert_eq!(l2.most_fetches(), 1);
    }
}

/// The same below a PML5 table, at index 1.
fn path_of_five(rights: [u64; 5], depth: usize) -> L2 {
    let mut l2 = path([rights[1], rights[2], rights[3], rights[4]], depth);
    l2.set(PML5, 1, PML4 | rights[0]);
    l2
}

#[test]
fn a_walk_of_five_levels_goes_through_one_table_more() {
    let ngpa = 1 << 48 | NGPA;
    for depth in 1..4 {
        for combination in 0..8u64.pow(depth as u32 + 2) {
            let rights = [0, 1, 2, 3, 4].map(|n| combination >> (3 * n) & 7);
            let l2 = path_of_five(rights, depth);
            let said = walked(&l2, PML5 | FIVE, ngpa, true);
            assert_eq!(said, reference(&l2, PML5 | FIVE, ngpa, true), "{rights:?} to depth {depth}");
            if let Said::Page(_, _, granted, _) = said {
                assert_eq!(granted, rights[..=depth + 1].iter().fold(7, |all, one| all & one));
            }
        }
        let l2 = path_of_five([7; 5], depth);
        assert!(matches!(walked(&l2, PML5 | FIVE, ngpa, true), Said::Page(..)));
        assert_eq!(l2.fetched.borrow().len(), depth + 2);
        assert_eq!(l2.most_fetches(), 1);
        for bit in 57..64 {
            assert_eq!(walked(&l2, PML5 | FIVE, ngpa | 1 << bit, true), Said::Nothing);
            assert!(l2.fetched.borrow().is_empty(), "no table is asked");
        }
    }
}

#[test]
fn no_page_stands_in_a_table_of_the_fifth_level() {
    for bit in [3, 4, 5, 6, 7] {
        let mut l2 = path_of_five([7; 5], 3);
        l2.set(PML5, 1, PML4 | 7 | 1 << bit);
        assert_eq!(walked(&l2, PML5 | FIVE, 1 << 48 | NGPA, true), Said::Wrong, "bit {bit}");
    }
}

#[test]
fn an_address_of_more_than_48_bits_has_no_translation() {
    let l2 = path([7; 4], 3);
    for bit in 48..64 {
        assert_eq!(walked(&l2, PML4, NGPA | 1 << bit, true), Said::Nothing);
        assert!(l2.fetched.borrow().is_empty(), "no table is asked");
    }
}

#[test]
fn the_entry_of_the_page_and_its_level_are_told() {
    for (depth, level, entry) in
        [(1, Level::Pdpt, PDPT + 5 * 8), (2, Level::Pd, PD + 7 * 8), (3, Level::Pt, PT + 9 * 8)]
    {
        match walk(&mut GuestTables(&path([7; 4], depth)), (Gpa::new(PML4), Level::Pml4), NGPA, &rules()) {
            Walk::Leaf(leaf) => assert_eq!((leaf.level, leaf.entry), (level, Gpa::new(entry))),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_walk_stops_at_the_first_entry_that_is_not_present() {
    for (n, level) in [Level::Pml4, Level::Pdpt, Level::Pd, Level::Pt].into_iter().enumerate() {
        let mut rights = [7; 4];
        rights[n] = 0;
        let l2 = path(rights, 3);
        assert_eq!(walk(&mut GuestTables(&l2), (Gpa::new(PML4), Level::Pml4), NGPA, &rules()), Walk::NotPresent(level));
        assert_eq!(l2.fetched.borrow().len(), n + 1);
    }
}

#[test]
fn a_table_in_memory_that_l2_does_not_own_cannot_be_read() {
    let mut l2 = path([7; 4], 3);
    l2.set(PD, 7, (OWN.0 + 0x1000) | 7);
    match walk(&mut GuestTables(&l2), (Gpa::new(PML4), Level::Pml4), NGPA, &rules()) {
        Walk::Unreadable(error) => assert_eq!(error.0, Gpa::new(OWN.0 + 0x1000 + 9 * 8)),
        other => panic!("{other:?}"),
    }
}

/// Entries that are mostly sensible, so that walks get deep, with any bit wrong now and then.
pub fn entry() -> impl Strategy<Value = u64> {
    let address = prop_oneof![
        8 => (0u64..4).prop_map(|n| PML4 + n * KIB4),
        2 => (0u64..8).prop_map(|n| n * GIB1),
        2 => (0u64..2000).prop_map(|n| n * MIB2),
        2 => (0u64..1 << 20).prop_map(|n| n * KIB4),
    ];
    let low =
        prop_oneof![6 => Just(7u64), 3 => 0u64..8, 3 => 0u64..0x1000, 3 => Just(WB | LARGE | 7), 1 => Just(WB | 7)];
    let noise = prop_oneof![9 => Just(0u64), 1 => (0u32..64).prop_map(|bit| 1 << bit)];
    (address, low, noise).prop_map(|(address, low, noise)| (address | low) ^ noise)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn random_trees_mean_to_the_walker_what_they_mean_to_the_reference(
        entries in prop::collection::vec((0u64..4, 0u64..4, entry()), 1..24),
        probes in prop::collection::vec((prop::array::uniform5(0u64..4), 0u64..KIB4), 16),
        execute_only: bool,
    ) {
        // Four tables that reference each other at will, so any of them may serve at any level.
        let mut l2 = L2::default();
        for (table, index, entry) in entries {
            l2.set(PML4 + table * KIB4, index, entry);
        }
        for (indexes, offset) in probes {
            let ngpa = [48, 39, 30, 21, 12].into_iter().zip(indexes).fold(offset, |at, (shift, index)| at | index << shift);
            for root in [PML4, PML4 | FIVE] {
                prop_assert_eq!(walked(&l2, root, ngpa, execute_only), reference(&l2, root, ngpa, execute_only));
            }
        }
    }
}
