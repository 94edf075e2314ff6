//! Pages of L2's memory that may be written without a mark in ept01: L3 may write them through ept02, or the processor
//! writes there by an address that L2 gave it.
//!
//! A bit for each page of 4 KiB, in frames that come as they are needed: a directory, and below it a frame for each 128 MiB. What
//! was exposed stays so until L2 leaves VMX operation: who maps a page last is not known, and a page that was memory of L3
//! once is only compared more often than it must be. Above 64 GiB all is exposed, and everything is when frames run out.

use super::TableFrames;
use crate::addr::Hpa;

/// Bytes that one frame of bits stands for.
const CHUNK: u64 = 1 << 27;
/// Chunks that the directory has room for.
const CHUNKS: u64 = 512;
/// In the directory: the whole chunk is exposed.
const WHOLE: u64 = 1;
/// Bytes that one word of bits stands for.
const WORD: u64 = 64 << 12;

/// The pages that are exposed.
#[derive(Debug, Default)]
pub(super) struct Exposed {
    /// `None` as long as nobody asks.
    directory: Option<Hpa>,
    everything: bool,
    /// How often the set grew.
    growths: u64,
}

impl Exposed {
    /// Keeps the set from now on; false if there is no frame, and then everything counts as exposed.
    pub(super) fn start<F: TableFrames>(&mut self, frames: &mut F) -> bool {
        self.directory = self.directory.or_else(|| frames.alloc());
        self.everything |= self.directory.is_none();
        !self.everything
    }

    /// Nothing is exposed any more, and the set is not kept.
    pub(super) fn stop<F: TableFrames>(&mut self, frames: &mut F) {
        if let Some(directory) = self.directory {
            for index in 0..CHUNKS {
                match frames.read(Hpa::new(directory.get() + index * 8)) {
                    0 | WHOLE => {}
                    chunk => frames.free(Hpa::new(chunk)),
                }
            }
            frames.free(directory);
        }
        *self = Self { growths: self.growths, ..Self::default() };
    }

    /// How often the set grew: as long as the number is the same, so is the set.
    pub(super) const fn growths(&self) -> u64 {
        self.growths
    }

    /// Adds the 4 KiB page at `page`.
    #[inline(always)]
    pub(super) fn add_page<F: TableFrames>(&mut self, page: u64, frames: &mut F) {
        let Some(directory) = self.directory else { return };
        if page >= CHUNK * CHUNKS {
            return;
        }
        let chunk = frames.read(Hpa::new(directory.get() + page / CHUNK * 8));
        if chunk > WHOLE {
            let (at, bit) = (word_at(chunk, page), 1 << (page >> 12 & 63));
            let word = frames.read(at);
            if word & bit == 0 {
                frames.write(at, word | bit);
                self.growths += 1;
            }
        } else if chunk == 0 {
            self.add(page, 1 << 12, frames);
        }
    }

    /// Adds `bytes` from `start` on: a page of any size.
    #[cold]
    pub(super) fn add<F: TableFrames>(&mut self, start: u64, bytes: u64, frames: &mut F) {
        let Some(directory) = self.directory else { return };
        let end = start.saturating_add(bytes).min(CHUNK * CHUNKS);
        let mut at = start;
        while at < end && !self.everything {
            let entry = Hpa::new(directory.get() + at / CHUNK * 8);
            let mut chunk = frames.read(entry);
            let here = end.min((at / CHUNK + 1) * CHUNK);
            if here - at == CHUNK && chunk != WHOLE {
                if chunk != 0 {
                    frames.free(Hpa::new(chunk));
                }
                frames.write(entry, WHOLE);
                self.growths += 1;
            } else if chunk != WHOLE {
                if chunk == 0 {
                    let Some(frame) = frames.alloc() else {
                        self.everything = true;
                        self.growths += 1;
                        return;
                    };
                    chunk = frame.get();
                    frames.write(entry, chunk);
                }
                self.add_bits(chunk, at, here, frames);
            }
            at = here;
        }
    }

    /// Adds the pages of `from .. to`, in one chunk.
    fn add_bits<F: TableFrames>(&mut self, chunk: u64, from: u64, to: u64, frames: &mut F) {
        let mut at = from;
        while at < to {
            let next = ((at / WORD + 1) * WORD).min(to);
            let (first, pages) = (at >> 12 & 63, (next - at).div_ceil(1 << 12));
            let bits = (u64::MAX >> (64 - pages.clamp(1, 64))) << first;
            let place = word_at(chunk, at);
            let word = frames.read(place);
            if word | bits != word {
                frames.write(place, word | bits);
                self.growths += 1;
            }
            at = next;
        }
    }

    /// Is the page at `page` exposed?
    pub(super) fn contains<F: TableFrames>(&self, page: u64, frames: &F) -> bool {
        let Some(directory) = self.directory.filter(|_| !self.everything && page < CHUNK * CHUNKS) else { return true };
        match frames.read(Hpa::new(directory.get() + page / CHUNK * 8)) {
            0 => false,
            WHOLE => true,
            chunk => frames.read(word_at(chunk, page)) >> (page >> 12 & 63) & 1 != 0,
        }
    }
}

/// Where the word with the bit of a page lies.
#[inline(always)]
const fn word_at(chunk: u64, page: u64) -> Hpa {
    Hpa::new(chunk + (page / WORD % 512) * 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ept::PoolFrames;
    use crate::mm::phys::VecMem;
    use crate::mm::{FramePool, Span};
    use proptest::prelude::*;

    const GIB1: u64 = 1 << 30;

    /// A page of one of the three sizes; near the bounds of words, chunks and the whole.
    fn page() -> impl Strategy<Value = (u64, u64)> {
        let small = (prop::sample::select(vec![0, WORD, CHUNK, 5 * CHUNK, CHUNK * CHUNKS]), 0u64..70)
            .prop_map(|(at, n)| ((at + (n << 12)).saturating_sub(35 << 12) & !0xfff, 1 << 12));
        let middle = (0u64..200).prop_map(|n| (n << 21, 1 << 21));
        let large = (0u64..3).prop_map(|n| (n * GIB1, GIB1));
        prop_oneof![8 => small, 4 => middle, 1 => large]
    }

    proptest! {
        #[test]
        fn exactly_what_was_added_is_exposed(pages in prop::collection::vec(page(), 1..40), frames in 0u64..20) {
            let mut pool = FramePool::new(Span::new(0x1000, 0x1000 + frames * 0x1000));
            let memory = VecMem::new(0x1000 + frames as usize * 0x1000);
            let mut frames = PoolFrames { pool: &mut pool, memory: &memory };
            let mut exposed = Exposed::default();
            let started = exposed.start(&mut frames);
            for (n, &(start, bytes)) in pages.iter().enumerate() {
                let before = (exposed.growths(), exposed.contains(start, &frames));
                if bytes == 1 << 12 { exposed.add_page(start, &mut frames) } else { exposed.add(start, bytes, &mut frames) }
                let whole = started && !exposed.everything;
                for at in (0..3).map(|n| n << 20).chain(pages.iter().flat_map(|page| [page.0, page.0 + page.1 - 0x1000, page.0 + page.1])) {
                    let added = pages[..=n].iter().any(|page| (page.0..page.0 + page.1).contains(&at));
                    let expected = added || !whole || at >= CHUNK * CHUNKS;
                    prop_assert_eq!(exposed.contains(at, &frames), expected, "{:#x}", at);
                }
                prop_assert!(before.1 || exposed.growths() > before.0, "a growth is counted");
            }
            exposed.stop(&mut frames);
            prop_assert_eq!(pool.available(), pool.total());
        }
    }
}
