//! Where attacks aim: the memory of the hypervisor below, its edges and its neighbours.
//!
//! A machine without such a hypervisor has ordinary memory there. It is filled with ones, which is what memory that does not
//! exist reads as, so that what reads it finds the same on both machines.

use core::fmt::Write;
use l2_kit::{
    BootInfo, Global,
    arrayvec::ArrayString,
    identity::Slot,
    pages::{LARGE, PAGE},
};

/// First byte of the range, and the first byte after it; 0 if there is none.
static RANGE: Global<(u64, u64)> = Global::new((0, 0));
static BARE: Global<bool> = Global::new(false);

/// A place that an attack aims at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The first page of the range
    First,
    /// Some page of it
    Within,
    /// The last page
    Last,
    /// The last page below the range
    Below,
    /// The first page above it
    Above,
}

impl Place {
    /// The places inside.
    pub const INSIDE: [Self; 3] = [Place::First, Place::Within, Place::Last];
    /// The places beside it, where this guest has memory.
    pub const BESIDE: [Self; 2] = [Place::Below, Place::Above];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Place::First => "in the first page",
            Place::Within => "within",
            Place::Last => "in the last page",
            Place::Below => "just below",
            Place::Above => "just above",
        }
    }

    /// Its address; `choice` chooses the page within.
    pub fn page(self, choice: u64) -> u64 {
        let (start, end) = RANGE.get();
        match self {
            Place::First => start,
            Place::Within => start + choice % ((end - start) / PAGE) * PAGE,
            Place::Last => end - PAGE,
            Place::Below => start - PAGE,
            Place::Above => end,
        }
    }
}

/// Finds the range around `inside`, which the command line names.
///
/// # Errors
/// Why there is none.
pub fn init(info: &BootInfo, inside: u64) -> Result<(), ArrayString<96>> {
    let slot = Slot::find();
    let mut why = ArrayString::new();
    let usable = |at: u64| info.memory.iter().any(|r| r.usable && (r.start..r.end).contains(&at));
    let range = if slot == Slot::Nvmx {
        let below = info.memory.iter().filter(|r| r.usable && r.end <= inside).map(|r| r.end).max();
        let above = info.memory.iter().filter(|r| r.usable && r.start > inside).map(|r| r.start).min();
        let reserved = info.memory.iter().find(|r| !r.usable && (r.start..r.end).contains(&inside)).map(|r| r.end);
        (below.unwrap_or(0).next_multiple_of(PAGE), above.or(reserved).unwrap_or(0) & !(PAGE - 1))
    } else {
        (inside & !(LARGE - 1), (inside & !(LARGE - 1)) + LARGE)
    };
    let (start, end) = range;
    if usable(inside) != (slot != Slot::Nvmx) || end <= start || !usable(start.wrapping_sub(PAGE)) || !usable(end) {
        let _ = write!(why, "inside={inside:#x} is not inside of anything: {start:#x} to {end:#x}");
        return Err(why);
    }
    RANGE.set(range);
    BARE.set(slot != Slot::Nvmx);
    Ok(())
}

/// The range.
pub fn range() -> (u64, u64) {
    RANGE.get()
}

/// Whether this guest owns the range.
pub fn is_bare() -> bool {
    BARE.get()
}

/// What a page beside the range holds, beside the word's own address.
const CANARY: u64 = 0xCA9A_41E5_0000_0000;

/// Prepares a page: ones where this machine has memory inside of the range, canaries beside it.
pub fn fill(page: u64) {
    let (start, end) = RANGE.get();
    let inside = (start..end).contains(&page);
    if inside && !is_bare() {
        return;
    }
    for at in (page..page + PAGE).step_by(8) {
        let value = if inside { u64::MAX } else { CANARY | at & 0xFFFF_FFFF };
        // SAFETY: memory of this guest that nothing else uses.
        unsafe { (at as *mut u64).write_volatile(value) };
    }
}

/// Words of a page beside the range that are no canaries any more.
pub fn damaged(page: u64) -> u64 {
    // SAFETY: as above.
    let word = |at: u64| unsafe { (at as *const u64).read_volatile() };
    (page..page + PAGE).step_by(8).filter(|at| word(*at) != CANARY | at & 0xFFFF_FFFF).count() as u64
}

/// Sets a word of a page of this guest's memory, beside the range or of tables of its own.
pub fn put(page: u64, word: u64, value: u64) {
    // SAFETY: nothing of Rust's lies in pages that attacks use.
    unsafe { ((page + word % 512 * 8) as *mut u64).write_volatile(value) };
}
