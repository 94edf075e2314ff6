//! ept02: histories of L2 that writes ept12, switches and invalidates, and of L3 that accesses memory, against the
//! reference walker and the processor model of the property tests.
#![no_main]

#[path = "../input.rs"]
mod input;
#[allow(dead_code, unused_imports)]
#[path = "../../ept_sequences.rs"]
mod model;

use input::Input;
use libfuzzer_sys::fuzz_target;
use model::ept_model::{GIB1, KIB4, LARGE, MIB2, OWN, WB};
use model::{ROLES, Step, TABLES, run};

const MOST: usize = 200;

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
