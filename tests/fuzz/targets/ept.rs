//! ept02: histories of L2 that writes ept12, switches and invalidates, and of L3 that accesses memory, against the
//! reference walker and the processor model of the property tests; histories with sub-page write permissions against the statement of
//! theirs.
#![no_main]

#[path = "../input.rs"]
mod input;
#[allow(dead_code, unused_imports)]
#[path = "../../ept_sequences.rs"]
mod model;
#[allow(dead_code, unused_imports, clippy::duplicate_mod, reason = "as the other model, with a memory of its own")]
#[path = "../../ept_sub_pages.rs"]
mod sub_pages;

use input::Input;
use libfuzzer_sys::fuzz_target;
use model::ept_model::{GIB1, KIB4, LARGE, MIB2, OWN, WB};
use model::{ROLES, Step, TABLES, run};
use sub_pages::{ACCESSES, ALL, Change, PAGES, SPP};

const MOST: usize = 200;
/// From this first byte on a history is one with sub-page write permissions.
const SUB_PAGES: u8 = 0xC0;

fn change(input: &mut Input<'_>) -> Change {
    let page = usize::from(input.u8()) % PAGES.len();
    match input.u8() % 4 {
        0 => {
            let rights = input.pick(&[1, 1, 1, 5, 3, 7, 4, 0]);
            let bits = rights | input.pick(&[0, 1 << 8, 3 << 8, 1 << 9]) | input.pick(&[1 << 61, 1 << 61, 1 << 61, 0]);
            Change::Leaf { page, bits, own: input.u8() > 240 }
        }
        1 => Change::Upper { page, rights: input.pick(&[7, 7, 5, 1]) },
        _ => {
            let entry = match input.u8() % 8 {
                0..=3 => (SPP + input.below(sub_pages::TABLES) * KIB4) | input.pick(&[1, 1, 1, 0, 3, 1 | 1 << 62]),
                4 => OWN.0 | 1,
                5 => input.u64(),
                6 => ALL,
                _ => input.u64() & ALL,
            };
            Change::Spp { table: input.below(sub_pages::TABLES), level: u32::from(input.u8() % 4), page, entry }
        }
    }
}

fn with_sub_pages(input: &mut Input<'_>, size: u8) {
    let mut steps = Vec::new();
    while !input.is_empty() && steps.len() < MOST {
        steps.push(match input.u8() % 14 {
            0..=7 => {
                let page = usize::from(input.u8()) % PAGES.len();
                // Most are plain writes.
                let access = usize::from(input.u8()) % (ACCESSES.len() + 4);
                let access = if access < ACCESSES.len() { access } else { 1 };
                let how = input.u8();
                let (flags, with, second) = (how & 1 != 0, how & 0xE != 0, how & 0x10 != 0);
                sub_pages::Step::Access { page, piece: input.below(KIB4 / 8), access, flags, sub_pages: with, second }
            }
            8..=10 => {
                let count = 1 + input.u8() % 3;
                sub_pages::Step::Change((0..count).map(|_| change(input)).collect(), input.u8() % 2 == 0)
            }
            _ => sub_pages::Step::Again(change(input)),
        });
    }
    let (budget, splits) = [(40, 0), (40, 100), (0, 0), (7, 3)][usize::from(size % 4)];
    sub_pages::run(&steps, budget, splits);
}

fn entry(input: &mut Input<'_>) -> u64 {
    let address = match input.u8() % 4 {
        0 | 1 => TABLES + input.below(7) * KIB4,
        2 => input.below(4) * GIB1 + input.below(8) * MIB2,
        _ => OWN.0 - 3 * KIB4 + input.below(10) * KIB4,
    };
    let low = match input.u8() % 4 {
        0 => 7,
        1 => u64::from(input.u8()),
        2 => LARGE | WB | input.below(8),
        _ => WB | input.below(8),
    };
    let noise = if input.u8() > 240 { 1 << (input.u8() % 64) } else { 0 };
    (address | low) ^ noise
}

fn step(input: &mut Input<'_>) -> Step {
    let number = |input: &mut Input<'_>| usize::from(input.u8()) % ROLES.len();
    match input.u8() % 16 {
        0..=4 => Step::Write { table: input.below(7), index: input.below(3), entry: entry(input) },
        5..=9 => {
            let index = |input: &mut Input<'_>| u64::from(input.u8() % 3);
            // Beyond four levels at times.
            let top = input.u8();
            let top = u64::from(top > 240) << 48 | u64::from(top % 3) << 39;
            let ngpa = top | index(input) << 30 | index(input) << 21 | index(input) << 12;
            Step::Access { ngpa: ngpa | input.below(KIB4), access: input.pick(&[1, 2, 4, 3]) }
        }
        10..=11 => Step::AccessNear { page: input.below(3), access: input.pick(&[1, 2, 4]) },
        12 => Step::Switch(number(input)),
        13 => Step::InveptSingle(number(input)),
        14 => Step::InveptAll,
        _ => Step::Forget,
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let size = input.u8();
    if size >= SUB_PAGES {
        return with_sub_pages(&mut input, size);
    }
    let mut steps = Vec::new();
    while !input.is_empty() && steps.len() < MOST {
        steps.push(step(&mut input));
    }
    let result = match size % 4 {
        0 => run::<2, 4>(0, 0, &steps),
        1 => run::<1, 4>(2, 5, &steps),
        2 => run::<3, 4>(100, u64::from(size >> 2) % 9, &steps),
        _ => run::<8, 16>(400, 400, &steps),
    };
    if let Err(error) = result {
        panic!("{error}: {steps:?}");
    }
});
