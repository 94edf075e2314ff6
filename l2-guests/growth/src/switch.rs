//! Guests that take turns: what a switch costs among 1, 2, 4 ... of them.

use crate::{
    bracket::measure,
    guest::{Guest, Stop, tables},
};
use l2_kit::{arrayvec::ArrayVec, ept::Ept};

/// The most guests.
pub const MOST: usize = 64;
/// Just above the powers of two something may overflow.
const NUMBERS: [usize; 10] = [1, 2, 4, 8, 9, 16, 17, 32, 33, 64];
/// Rounds of a bracket.
pub const SWITCHES: u64 = 1024;

/// Whose memory the guests have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// One EPT for all
    Shared,
    /// An EPT each
    Own,
}

/// All numbers up to `most`, with new guests for each.
///
/// # Errors
/// If a guest does not run.
pub fn all(name: &str, memory: Memory, most: usize) -> Result<(), Stop> {
    let cr3 = tables();
    let shared = Ept::identity();
    let mut guests: ArrayVec<Guest, MOST> = ArrayVec::new();
    for number in NUMBERS.into_iter().filter(|number| *number <= most) {
        while guests.len() < number {
            let own = if memory == Memory::Own { Ept::identity() } else { shared };
            guests.push(Guest::new(cr3, &own, 1 + guests.len() as u16)?);
        }
        let warm_up = 2 * number as u64;
        measure(format_args!("{name}_{number}"), warm_up, SWITCHES, |round| {
            let guest = &mut guests[round as usize % number];
            guest.load()?;
            guest.round()
        })?;
    }
    Ok(())
}
