//! What was seen, as text.

use arrayvec::ArrayString;
use core::{
    cell::UnsafeCell,
    fmt::{self, Write},
};
use l2_kit::arrayvec;

/// A sequence of traps and exits.
pub type Text = ArrayString<480>;

struct Log(UnsafeCell<Text>);
// SAFETY: single CPU, and no reference outlives the functions below, which no trap interrupts.
unsafe impl Sync for Log {}

static LOG: Log = Log(UnsafeCell::new(Text::new_const()));

fn with<T>(f: impl FnOnce(&mut Text) -> T) -> T {
    // SAFETY: as above.
    f(unsafe { &mut *LOG.0.get() })
}

/// Forgets everything.
pub fn clear() {
    with(Text::clear);
}

/// Whether anything was written since.
pub fn is_empty() -> bool {
    with(|text| text.is_empty())
}

/// All of it.
pub fn text() -> Text {
    with(|text| *text)
}

/// Three characters that stand for it.
pub fn digest() -> [u8; 3] {
    const LETTERS: &[u8; 64] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
    // FNV-1a, folded.
    let hash =
        with(|text| text.bytes().fold(0x811C_9DC5u32, |h, byte| (h ^ u32::from(byte)).wrapping_mul(0x0100_0193)));
    let folded = hash ^ hash >> 18;
    [folded >> 12, folded >> 6, folded].map(|six| LETTERS[(six & 63) as usize])
}

/// Adds to the log; what does not fit is cut off.
pub fn add(what: fmt::Arguments<'_>) {
    with(|text| {
        let _ = text.write_fmt(what);
    });
}
