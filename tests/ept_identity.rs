//! ept01: one to one, without nvmx, in the largest pages; splitting and the dirty watch.

mod ept_model;

use ept_model::{ACCESSED, Frames, GIB1, KIB4, LARGE, MIB2, Watcher, Written};
use nvmx::addr::Gpa;
use nvmx::ept::{Ept01, EptRules, MemoryType, Resolved, TableFrames, WatchError};
use nvmx::mm::Span;
use proptest::prelude::*;

const DIRTY: u64 = 1 << 9;

fn rules() -> EptRules {
    EptRules::new(40, true, true, true)
}

fn write_back(_: Gpa, _: u64) -> Option<MemoryType> {
    Some(MemoryType::WriteBack)
}

/// Uncacheable from 3 to 4 GiB and from 0xa0000 to 0xc0000, write-back elsewhere.
fn pc(start: Gpa, bytes: u64) -> Option<MemoryType> {
    let block = Span::sized(start.get(), bytes);
    let holes = [Span::new(3 * GIB1, 4 * GIB1), Span::new(0xa_0000, 0xc_0000)];
    if holes.iter().any(|hole| hole.contains(block)) {
        return Some(MemoryType::Uncacheable);
    }
    (!holes.iter().any(|hole| hole.overlaps(block))).then_some(MemoryType::WriteBack)
}

fn leaves(ept: &Ept01, frames: &Frames) -> Vec<(u64, u64, u64)> {
    frames.leaves(ept.eptp().ep4ta())
}

/// The leaf over an address.
fn leaf_at(ept: &Ept01, frames: &Frames, at: u64) -> Option<(u64, u64, u64)> {
    leaves(ept, frames).into_iter().find(|(start, size, _)| (*start..start + size).contains(&at))
}

#[test]
fn the_pointer_says_write_back_and_four_levels() {
    let mut frames = Frames::new(8);
    for accessed_dirty in [false, true] {
        let ept =
            Ept01::new(rules(), accessed_dirty, Gpa::new(GIB1), Span::new(0, 0), write_back, &mut frames).unwrap();
        assert_eq!(ept.eptp().get() & 0xfff, 0x1e | u64::from(accessed_dirty) << 6);
        assert_eq!(ept.eptp().accessed_dirty(), accessed_dirty);
    }
}

#[test]
fn a_plain_machine_is_mapped_by_gibibytes() {
    let mut frames = Frames::new(8);
    let ept = Ept01::new(rules(), true, Gpa::new(3 * GIB1 + 1), Span::new(0, 0), write_back, &mut frames).unwrap();
    let expected: Vec<_> = (0..4).map(|n| (n * GIB1, GIB1, (n * GIB1) | LARGE | 6 << 3 | 7)).collect();
    assert_eq!(leaves(&ept, &frames), expected);
    assert_eq!(ept.tables() as usize, frames.used.len());
}

#[test]
fn pages_shrink_where_types_change_and_where_nvmx_lies() {
    let mut frames = Frames::new(32);
    let own = Span::new(2 * GIB1 + 3 * MIB2 + 0x5000, 2 * GIB1 + 5 * MIB2);
    let ept = Ept01::new(rules(), true, Gpa::new(4 * GIB1), own, pc, &mut frames).unwrap();
    let at = |address| leaf_at(&ept, &frames, address);
    assert_eq!(at(0), Some((0, KIB4, 6 << 3 | 7)));
    assert_eq!(at(0xa_0000), Some((0xa_0000, KIB4, 0xa_0007)));
    assert_eq!(at(MIB2), Some((MIB2, MIB2, MIB2 | LARGE | 6 << 3 | 7)));
    assert_eq!(at(GIB1), Some((GIB1, GIB1, GIB1 | LARGE | 6 << 3 | 7)));
    assert_eq!(at(own.start() - 1), Some((own.start() - KIB4, KIB4, (own.start() - KIB4) | 6 << 3 | 7)));
    assert_eq!(at(own.start()), None);
    assert_eq!(at(own.end() - 1), None);
    assert_eq!(at(own.end()), Some((own.end(), MIB2, own.end() | LARGE | 6 << 3 | 7)));
    assert_eq!(at(3 * GIB1), Some((3 * GIB1, GIB1, (3 * GIB1) | LARGE | 7)));
}

#[test]
fn a_processor_without_large_pages_gets_small_ones() {
    for (pages_2m, pages_1g, size) in [(false, false, KIB4), (true, false, MIB2), (false, true, KIB4)] {
        let rules = EptRules::new(40, true, pages_2m, pages_1g);
        let mut frames = Frames::new(600);
        let ept = Ept01::new(rules, true, Gpa::new(1), Span::new(0, 0), write_back, &mut frames).unwrap();
        assert!(leaves(&ept, &frames).iter().all(|leaf| leaf.1 == size));
        assert_eq!(leaves(&ept, &frames).len() as u64, GIB1 / size);
    }
}

#[test]
fn what_is_missing_is_mapped_when_it_is_touched() {
    let mut frames = Frames::new(16);
    let own = Span::new(GIB1 - MIB2, GIB1);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), own, pc, &mut frames).unwrap();
    let mut touch = |ept: &mut Ept01, at| ept.map_missing(Gpa::new(at), pc, &mut frames).unwrap();
    assert_eq!(touch(&mut ept, 0x80_0000_1234), Resolved::Mapped);
    assert_eq!(touch(&mut ept, 0x80_0000_1234), Resolved::Present);
    assert_eq!(touch(&mut ept, 3 * GIB1 + 5), Resolved::Mapped);
    assert_eq!(touch(&mut ept, own.start()), Resolved::Forbidden);
    assert_eq!(touch(&mut ept, own.end() - 1), Resolved::Forbidden);
    assert_eq!(touch(&mut ept, 1 << 40), Resolved::BeyondPhysical);
    assert_eq!(touch(&mut ept, u64::MAX), Resolved::BeyondPhysical);
    assert_eq!(
        leaf_at(&ept, &frames, 0x80_0000_1234),
        Some((0x80_0000_0000, GIB1, 0x80_0000_0000 | LARGE | 6 << 3 | 7))
    );
    assert_eq!(leaf_at(&ept, &frames, 3 * GIB1 + 5), Some((3 * GIB1, GIB1, (3 * GIB1) | LARGE | 7)));
    assert_eq!(leaf_at(&ept, &frames, own.start()), None);
}

#[test]
fn an_address_of_more_than_48_bits_is_beyond_a_walk_of_four_levels() {
    let mut frames = Frames::new(4);
    let wide = EptRules::new(52, true, true, true);
    let mut ept = Ept01::new(wide, true, Gpa::new(0), Span::new(0, 0), write_back, &mut frames).unwrap();
    assert_eq!(ept.map_missing(Gpa::new(1 << 48), write_back, &mut frames), Ok(Resolved::BeyondPhysical));
}

#[test]
fn mapping_goes_on_where_it_ran_out_of_frames() {
    let own = Span::new(MIB2, MIB2 + KIB4);
    let mut frames = Frames::new(2);
    let mut ept = Ept01::new(rules(), true, Gpa::new(0), own, pc, &mut frames).unwrap();
    let mut rounds = 0;
    while ept.map_missing(Gpa::new(0), pc, &mut frames).is_err() {
        frames.free.push(0x71_0000_0000 + rounds * KIB4);
        rounds += 1;
    }
    // Out of frames after part of it was there; the part stayed, none was lost.
    assert!(rounds > 0);
    assert_eq!(ept.map_missing(Gpa::new(GIB1 - 1), pc, &mut frames), Ok(Resolved::Mapped));
    assert_eq!(frames.used.len() as u32, ept.tables());
    let mut whole = Frames::new(16);
    let other = Ept01::new(rules(), true, Gpa::new(1), own, pc, &mut whole).unwrap();
    assert_eq!(leaves(&ept, &frames), leaves(&other, &whole));
}

#[test]
fn a_watched_page_has_its_own_leaf_and_the_rest_stays_as_it_was() {
    let mut frames = Frames::new(8);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), Span::new(0, 0), write_back, &mut frames).unwrap();
    let page = 7 * MIB2 + 3 * KIB4;
    let mut watch = Watcher::new(&mut ept, page + 0x123, &mut frames).unwrap();
    assert_eq!(leaf_at(&ept, &frames, page), Some((page, KIB4, page | 6 << 3 | 7)));
    assert_eq!(leaf_at(&ept, &frames, 8 * MIB2), Some((8 * MIB2, MIB2, (8 * MIB2) | LARGE | 6 << 3 | 7)));
    let all = leaves(&ept, &frames);
    assert_eq!(all.iter().map(|leaf| leaf.1).sum::<u64>(), GIB1);
    assert!(all.iter().all(|(start, size, entry)| entry & 0xf_ffff_ffff_f000 == *start && start % size == 0));
    assert_eq!(watch.ask(&mut ept, &mut frames), NO);
    assert_eq!(ept.tables() as usize, frames.used.len());
    assert_eq!(Watcher::new(&mut ept, page, &mut frames), Ok(watch), "a second watch finds the same leaf");
    assert_eq!(ept.tables() as usize, frames.used.len());
}

#[test]
fn a_page_is_mapped_small_wherever_l2_may_have_it() {
    let own = Span::new(4 * MIB2, 5 * MIB2);
    let mut frames = Frames::new(12);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), own, write_back, &mut frames).unwrap();
    let mut small = |ept: &mut Ept01, at| ept.make_small(Gpa::new(at), write_back, &mut frames);
    let (inside, beyond) = (7 * MIB2 + 3 * KIB4, 3 * GIB1 + KIB4);
    assert_eq!(small(&mut ept, inside), Ok(()));
    assert_eq!(small(&mut ept, beyond), Ok(()), "was not mapped before");
    assert_eq!(small(&mut ept, 4 * MIB2), Ok(()), "nvmx's own: stays away");
    assert_eq!(small(&mut ept, !0xFFF), Ok(()), "no address at all");
    let mut before = ept.tables();
    while small(&mut ept, u64::from(before) * MIB2 * 16 + GIB1).is_ok() {
        assert!(ept.tables() > before, "it takes frames");
        before = ept.tables();
    }
    for page in [inside, beyond] {
        assert_eq!(leaf_at(&ept, &frames, page), Some((page, KIB4, page | 6 << 3 | 7)));
    }
    assert_eq!(leaf_at(&ept, &frames, 4 * MIB2), None);
}

#[test]
fn pages_that_were_split_are_joined_again() {
    let own = Span::new(4 * MIB2, 5 * MIB2);
    let mut frames = Frames::new(12);
    let mut ept = Ept01::new(rules(), true, Gpa::new(2 * GIB1), own, pc, &mut frames).unwrap();
    let (before, tables) = (leaves(&ept, &frames), ept.tables());
    assert!(!ept.join(&mut frames), "nothing was split");
    for page in [7 * MIB2 + 3 * KIB4, 7 * MIB2, GIB1 + MIB2, 0xa_1000] {
        // The last one is no memory, but small all the same.
        let watched = Watcher::new(&mut ept, page, &mut frames);
        assert_eq!(watched.is_err(), page == 0xa_1000);
        processor_writes(&ept, &mut frames, page);
    }
    assert_ne!(ept.tables(), tables);
    assert!(ept.join(&mut frames));
    let plain = |list: Vec<(u64, u64, u64)>| -> Vec<_> {
        list.into_iter().map(|(start, size, entry)| (start, size, entry & !(ACCESSED | DIRTY))).collect()
    };
    assert_eq!(plain(leaves(&ept, &frames)), before);
    assert_eq!((ept.tables(), frames.used.len() as u32), (tables, tables));
    let mut watch = Watcher::new(&mut ept, 7 * MIB2, &mut frames).unwrap();
    assert_eq!(watch.ask(&mut ept, &mut frames), NO, "what was written before is forgotten");
}

#[test]
fn pages_are_not_joined_beyond_what_the_processor_can_map() {
    let small = EptRules::new(40, true, false, true);
    let mut frames = Frames::new(600);
    let mut ept = Ept01::new(small, true, Gpa::new(1), Span::new(0, 0), write_back, &mut frames).unwrap();
    let before = leaves(&ept, &frames);
    assert!(!ept.join(&mut frames));
    assert_eq!(leaves(&ept, &frames), before);
}

/// Sets flags like a processor that writes at an address.
fn processor_writes(ept: &Ept01, frames: &mut Frames, at: u64) {
    let mut table = ept.eptp().ep4ta();
    for shift in [39, 30, 21, 12] {
        let entry = nvmx::addr::Hpa::new(table + (at >> shift & 511) * 8);
        let value = frames.read(entry);
        assert_ne!(value & 7, 0);
        let leaf = shift == 12 || value & LARGE != 0;
        frames.write(entry, value | ACCESSED | if leaf { DIRTY } else { 0 });
        if leaf {
            return;
        }
        table = value & 0xf_ffff_ffff_f000;
    }
}

const NO: Written = Written::No;
const YES: Written = Written::Yes { invept: true };

#[test]
fn a_write_is_noticed_once() {
    let mut frames = Frames::new(8);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), Span::new(0, 0), write_back, &mut frames).unwrap();
    // The large page was written before: its pages start clean all the same.
    processor_writes(&ept, &mut frames, MIB2);
    let mut watch = Watcher::new(&mut ept, MIB2, &mut frames).unwrap();
    let mut other = Watcher::new(&mut ept, MIB2 + KIB4, &mut frames).unwrap();
    assert_eq!(watch.ask(&mut ept, &mut frames), NO);
    processor_writes(&ept, &mut frames, MIB2 + 8);
    assert_eq!(other.ask(&mut ept, &mut frames), NO);
    assert_eq!(watch.ask(&mut ept, &mut frames), YES);
    assert_eq!(watch.ask(&mut ept, &mut frames), NO);
    processor_writes(&ept, &mut frames, MIB2 + 0xfff);
    assert_eq!(watch.ask(&mut ept, &mut frames), YES);
}

#[test]
fn everyone_who_watches_a_page_learns_of_a_write() {
    let mut frames = Frames::new(8);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), Span::new(0, 0), write_back, &mut frames).unwrap();
    let mut first = Watcher::new(&mut ept, MIB2, &mut frames).unwrap();
    let mut second = Watcher::new(&mut ept, MIB2 + 8, &mut frames).unwrap();
    processor_writes(&ept, &mut frames, MIB2);
    assert_eq!(first.ask(&mut ept, &mut frames), YES);
    assert_eq!(second.ask(&mut ept, &mut frames), Written::Yes { invept: false }, "the flag is clear already");
    assert_eq!(second.ask(&mut ept, &mut frames), NO);
    // A watch that begins after a write takes the flag, and does not hide the write from the others.
    processor_writes(&ept, &mut frames, MIB2);
    let mut third = Watcher::new(&mut ept, MIB2, &mut frames).unwrap();
    assert_eq!(third.ask(&mut ept, &mut frames), NO);
    assert_eq!(first.ask(&mut ept, &mut frames), Written::Yes { invept: false });
    assert_eq!(second.ask(&mut ept, &mut frames), Written::Yes { invept: false });
    assert_eq!(first.ask(&mut ept, &mut frames), NO);
}

#[test]
fn a_watch_outlives_mapping_that_goes_on_around_it() {
    let own = Span::new(GIB1 - KIB4, GIB1);
    let mut frames = Frames::new(3);
    let mut ept = Ept01::new(rules(), true, Gpa::new(0), own, write_back, &mut frames).unwrap();
    // All pages of 2 MiB but the last, which needs a table.
    assert!(ept.map_missing(Gpa::new(0), write_back, &mut frames).is_err());
    frames.free.push(0x71_0000_0000);
    let mut watch = Watcher::new(&mut ept, KIB4, &mut frames).unwrap();
    processor_writes(&ept, &mut frames, KIB4);
    processor_writes(&ept, &mut frames, MIB2);
    frames.free.push(0x71_0000_1000);
    assert_eq!(ept.map_missing(Gpa::new(GIB1 - MIB2), write_back, &mut frames), Ok(Resolved::Mapped));
    assert_eq!(watch.ask(&mut ept, &mut frames), YES, "the mark is still there");
    processor_writes(&ept, &mut frames, KIB4);
    assert_eq!(watch.ask(&mut ept, &mut frames), YES, "and the leaf is still in use");
    assert_ne!(leaf_at(&ept, &frames, MIB2).unwrap().2 & DIRTY, 0, "other pages keep their flags");
}

#[test]
fn a_page_that_cannot_be_watched_says_why() {
    let mut frames = Frames::new(4);
    let own = Span::new(MIB2, 2 * MIB2);
    let mut without = Ept01::new(rules(), false, Gpa::new(0), own, write_back, &mut frames).unwrap();
    assert_eq!(Watcher::new(&mut without, 0, &mut frames), Err(WatchError::NoDirtyFlags));
    let mut ept = Ept01::new(rules(), true, Gpa::new(1), own, write_back, &mut frames).unwrap();
    assert_eq!(Watcher::new(&mut ept, own.start(), &mut frames), Err(WatchError::NotMapped));
    assert_eq!(Watcher::new(&mut ept, GIB1, &mut frames), Err(WatchError::NotMapped));
    assert_eq!(Watcher::new(&mut ept, 0, &mut frames), Err(WatchError::OutOfFrames));
    assert_eq!(leaf_at(&ept, &frames, 0), Some((0, MIB2, LARGE | 6 << 3 | 7)), "nothing changed");
}

proptest! {
    /// A watcher may be told too often, but never too seldom, however many there are and whatever they share.
    #[test]
    fn no_write_is_ever_missed(steps in prop::collection::vec((0u8..3, 0usize..40, 0u64..24), 1..200)) {
        let mut frames = Frames::new(8);
        let mut ept = Ept01::new(rules(), true, Gpa::new(1), Span::new(0, 0), write_back, &mut frames).unwrap();
        // Each watcher with its page, and whether it must learn of a write.
        let mut watchers: Vec<(Watcher, u64, bool)> = vec![];
        for (step, who, page) in steps {
            match (step, watchers.is_empty()) {
                (0, _) => watchers.push((Watcher::new(&mut ept, page * KIB4, &mut frames).unwrap(), page, false)),
                (1, false) => {
                    let count = watchers.len();
                    let (watch, _, due) = &mut watchers[who % count];
                    let written = watch.ask(&mut ept, &mut frames);
                    prop_assert!(!*due || written != NO);
                    *due = false;
                }
                (2, false) => {
                    processor_writes(&ept, &mut frames, page * KIB4);
                    watchers.iter_mut().filter(|watcher| watcher.1 == page).for_each(|watcher| watcher.2 = true);
                }
                _ => {}
            }
        }
    }

    #[test]
    fn up_to_sixty_four_pages_are_told_apart_exactly(steps in prop::collection::vec((any::<bool>(), 0usize..64), 1..400)) {
        let mut frames = Frames::new(8);
        let mut ept = Ept01::new(rules(), true, Gpa::new(1), Span::new(0, 0), write_back, &mut frames).unwrap();
        let mut watchers: Vec<_> =
            (0..64).map(|page| (Watcher::new(&mut ept, page * KIB4, &mut frames).unwrap(), false)).collect();
        for (writes, page) in steps {
            if writes {
                processor_writes(&ept, &mut frames, page as u64 * KIB4);
                watchers[page].1 = true;
            } else {
                let (watch, written) = &mut watchers[page];
                prop_assert_eq!(watch.ask(&mut ept, &mut frames), if *written { YES } else { NO });
                *written = false;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_address_but_nvmxs_maps_to_itself_with_its_type(
        own_start in 0u64..3 * GIB1, own_len in 0u64..GIB1,
        hole_start in 0u64..0xc_0000, hole_pages in 0u64..0x1000,
        touched in prop::collection::vec(0u64..6 * GIB1, 0..4),
        watched in prop::collection::vec(0u64..2 * GIB1, 0..4),
    ) {
        let own = Span::sized(own_start, own_len);
        let hole = Span::sized(hole_start * KIB4, hole_pages * KIB4);
        let types = |start: Gpa, bytes: u64| {
            let block = Span::sized(start.get(), bytes);
            match (hole.contains(block), hole.overlaps(block)) {
                (true, _) => Some(MemoryType::WriteThrough),
                (_, false) => Some(MemoryType::WriteBack),
                _ => None,
            }
        };
        let mut frames = Frames::new(64);
        let mut ept = Ept01::new(rules(), true, Gpa::new(2 * GIB1), own, types, &mut frames).unwrap();
        for at in &touched {
            let _ = ept.map_missing(Gpa::new(*at), types, &mut frames).unwrap();
        }
        let (unsplit, tables) = (leaves(&ept, &frames), ept.tables());
        for at in &watched {
            let _ = Watcher::new(&mut ept, *at, &mut frames);
        }
        prop_assert_eq!(ept.tables() as usize, frames.used.len());
        let all = leaves(&ept, &frames);
        for (start, size, entry) in &all {
            let block = Span::sized(*start, *size);
            prop_assert!(!block.overlaps(own.outer_pages()), "I1");
            prop_assert_eq!(entry & 0xf_ffff_ffff_f000, *start);
            prop_assert_eq!(entry & 0x47, 7);
            let uniform = types(Gpa::new(*start), *size);
            prop_assert_eq!(uniform.map(|uniform| uniform as u64), Some(entry >> 3 & 7));
        }
        // Nothing that should be mapped is missing.
        let own = own.outer_pages();
        let below = |end: u64| end - own.intersection(Span::new(0, end)).len();
        let mapped: u64 = all.iter().filter(|leaf| leaf.0 < 2 * GIB1).map(|leaf| leaf.1).sum();
        prop_assert_eq!(mapped, below(2 * GIB1));
        for at in touched {
            let covered = all.iter().any(|(start, size, _)| (*start..start + size).contains(&at));
            prop_assert_eq!(covered, !own.overlaps(Span::sized(at, 1)));
        }
        prop_assert_eq!(ept.join(&mut frames), all.len() != unsplit.len());
        prop_assert_eq!((leaves(&ept, &frames), ept.tables()), (unsplit, tables));
    }
}

#[test]
fn a_version_that_comes_round_is_not_taken_for_the_old_one() {
    let mut frames = Frames::new(8);
    let mut ept = Ept01::new(rules(), true, Gpa::new(GIB1), Span::new(0, 0), write_back, &mut frames).unwrap();
    let mut busy = Watcher::new(&mut ept, MIB2, &mut frames).unwrap();
    let (mut idle, mut elsewhere) =
        (Watcher::new(&mut ept, MIB2, &mut frames).unwrap(), Watcher::new(&mut ept, MIB2 + KIB4, &mut frames).unwrap());
    let leaf = leaf_at(&ept, &frames, MIB2);
    for _ in 0..1 << 11 {
        processor_writes(&ept, &mut frames, MIB2);
        assert_eq!(busy.ask(&mut ept, &mut frames), YES);
    }
    let now = leaf_at(&ept, &frames, MIB2).map(|leaf| leaf.2 & !ACCESSED);
    assert_eq!(now, leaf.map(|leaf| leaf.2), "all eleven bits came round");
    assert_eq!(idle.ask(&mut ept, &mut frames), Written::Yes { invept: false });
    assert_eq!(idle.ask(&mut ept, &mut frames), NO);
    assert_eq!(busy.ask(&mut ept, &mut frames), NO);
    assert_eq!(
        elsewhere.ask(&mut ept, &mut frames),
        Written::Yes { invept: false },
        "once too often rather than never"
    );
    assert_eq!(elsewhere.ask(&mut ept, &mut frames), NO);
}
