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

/// A number that stands for it (FNV-1a).
pub fn digest() -> u32 {
    with(|text| text.bytes().fold(0x811C_9DC5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
}

/// Two characters that stand for a digest.
pub fn short(digest: u32) -> [char; 2] {
    const LETTERS: &[u8; 64] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
    let folded = digest ^ digest >> 12 ^ digest >> 24;
    [folded >> 6, folded].map(|six| char::from(LETTERS[(six & 63) as usize]))
}

/// A digest of digests.
pub struct Digest(u64);

impl Digest {
    /// Of none
    pub fn new() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }

    /// One more
    pub fn add(&mut self, digest: u32) {
        self.0 = (self.0 ^ u64::from(digest)).wrapping_mul(0x100_0000_01B3);
    }

    /// The number
    pub fn value(&self) -> u64 {
        self.0
    }
}

/// Adds to the log; what does not fit is cut off.
pub fn add(what: fmt::Arguments<'_>) {
    with(|text| {
        let _ = text.write_fmt(what);
    });
}
