//! The checks of a VM entry against a second implementation of them: bit numbers instead of names, all violations instead
//! of the first, written from the SDM's paragraphs. `controls`, `host` and `guest` are the second implementation; `whole`
//! holds the two against each other on states near validity.
#![allow(missing_docs, reason = "public for tests/fuzz and tests/machine only")]

#[path = "../core_support/mod.rs"]
pub mod core_support;

pub mod controls;
pub mod guest;
pub mod host;
pub mod whole;

use nvmx::vmx::{Field, Fields};
use std::collections::BTreeSet;

/// Names of the rules that a state violates.
pub type Violations = BTreeSet<&'static str>;

fn bit(value: u64, number: u32) -> bool {
    (value >> number) % 2 == 1
}

fn none_of(value: u64, mut numbers: impl Iterator<Item = u32>) -> bool {
    !numbers.any(|number| bit(value, number))
}

/// Bits from the sign bit of the linear address upwards are all the same.
fn canonical(address: u64, linear_width: u32) -> bool {
    (linear_width..64).all(|i| bit(address, i) == bit(address, linear_width - 1))
}

/// Each byte of IA32_PAT is UC, WC, WT, WP, WB or UC-.
fn pat(value: u64) -> bool {
    (0..8).all(|i| [0, 1, 4, 5, 6, 7].contains(&(value >> (8 * i) & 0xFF)))
}

/// IA32_S_CET but for the address in its upper part: SH_STK_EN to NO_TRACK_EN, then four reserved bits, SUPPRESS or TRACKER.
fn s_cet(value: u64) -> bool {
    none_of(value, 6..10) && !(bit(value, 10) && bit(value, 11))
}

/// A fixed-bits pair: what is 1 in the first must be 1, what is 0 in the second must be 0.
fn fixed(value: u64, fixed0: u64, fixed1: u64, except: &[u32]) -> bool {
    (0..64).filter(|i| !except.contains(i)).all(|i| if bit(value, i) { bit(fixed1, i) } else { !bit(fixed0, i) })
}

fn get(v: &impl Fields, field: Field) -> u64 {
    v.get(field)
}
