//! Physical memory as an interface, so that everything above it runs under `cargo test`.

use super::Place;
use crate::addr::{Hpa, PAGE_SIZE};

/// Physical memory of the machine.
///
/// Every call is one access: what is read is fetched exactly once (invariant I8), a write is never torn into a read and
/// a write. An address with nothing behind it reads as all ones and swallows writes, as on a bus. Any address may be read;
/// writing takes a [`Place`].
pub trait PhysMem {
    /// Reads eight bytes, at any alignment.
    fn read_u64(&self, at: Hpa) -> u64;
    /// Writes eight bytes, at any alignment.
    fn write_u64(&self, at: Place<'_>, value: u64);
    /// Fills `into` with the bytes from `at` on.
    fn read_bytes(&self, at: Hpa, into: &mut [u8]);
    /// Writes `bytes` from `at` on.
    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]);

    /// Reads eight bytes each, from `at` on, which is aligned to eight; no word is torn.
    #[inline]
    fn read_words(&self, at: Hpa, into: &mut [u64]) {
        for (n, word) in into.iter_mut().enumerate() {
            *word = self.read_u64(Hpa::new(at.get().wrapping_add(8 * n as u64)));
        }
    }

    /// Reads the words at `at` and behind it, each once. If one of them is not there, the other may read as ones too.
    #[inline(always)]
    fn read_pair(&self, at: Hpa) -> [u64; 2] {
        [self.read_u64(at), self.read_u64(Hpa::new(at.get().wrapping_add(8)))]
    }

    /// Writes `words` from `at` on.
    fn write_words(&self, at: Place<'_>, words: &[u64]) {
        (0..).zip(words).for_each(|(i, word)| self.write_u64(at.behind(8 * i), *word));
    }

    /// True if `words` stand from `at` on; each is read once at most.
    fn holds_words(&self, at: Hpa, words: &[u64]) -> bool {
        (0..).zip(words).all(|(i, word)| self.read_u64(Hpa::new(at.get() + 8 * i)) == *word)
    }

    /// How many of the `most` words from `at` on are zero before the first that is not; each is read once at most.
    fn zeros(&self, at: Hpa, most: usize) -> usize {
        (0..most).take_while(|i| self.read_u64(Hpa::new(at.get() + 8 * *i as u64)) == 0).count()
    }

    /// How many of the `most` words from `a` on are the same as those from `b` on, before the first that is not; each is read
    /// once at most.
    fn equal_words(&self, a: Hpa, b: Hpa, most: usize) -> usize {
        let word = |start: Hpa, i: usize| self.read_u64(Hpa::new(start.get() + 8 * i as u64));
        (0..most).take_while(|i| word(a, *i) == word(b, *i)).count()
    }

    /// Makes words of the page at `to` the OR of those of the page at `from` and the bits given, by their numbers in the page.
    #[inline]
    fn or_words(&self, from: Hpa, to: Place<'_>, words: &[(u16, u64)]) {
        for (number, bits) in words {
            let offset = 8 * u64::from(number % 512);
            self.write_u64(to.behind(offset), bits | self.read_u64(Hpa::new(from.get() + offset)));
        }
    }

    /// Clears `bits` of the eight aligned bytes at `at` in one atomic step, since a processor may set flags in an entry
    /// at the same time, and tells which of them were set.
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64;

    /// Replaces the eight aligned bytes at `at` by `new` in one atomic step if they are `old`; tells whether they were.
    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool;

    /// The same with four aligned bytes.
    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool;

    /// Reads a little-endian 32-bit value, at any alignment.
    #[inline]
    fn read_u32(&self, at: Hpa) -> u32 {
        let mut bytes = [0; 4];
        self.read_bytes(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes `len` zero bytes from `at` on.
    fn zero(&self, at: Place<'_>, len: u64) {
        const ZEROS: [u8; 512] = [0; 512];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROS.len() as u64);
            self.write_bytes(at.behind(done), &ZEROS[..part as usize]);
            done += part;
        }
    }

    /// Writes zeros to the 4 KiB frame that starts at `at`.
    #[inline]
    fn zero_page(&self, at: Place<'_>) {
        self.zero(at, PAGE_SIZE);
    }

    /// Copies `len` bytes between two places that do not overlap.
    fn copy(&self, from: Hpa, to: Place<'_>, len: u64) {
        let mut buffer = [0; 512];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(buffer.len() as u64);
            let chunk = &mut buffer[..part as usize];
            self.read_bytes(Hpa::new(from.get().wrapping_add(done)), chunk);
            self.write_bytes(to.behind(done), chunk);
            done += part;
        }
    }
}

impl<M: PhysMem + ?Sized> PhysMem for &M {
    fn write_words(&self, at: Place<'_>, words: &[u64]) {
        (**self).write_words(at, words);
    }
    fn holds_words(&self, at: Hpa, words: &[u64]) -> bool {
        (**self).holds_words(at, words)
    }
    fn zeros(&self, at: Hpa, most: usize) -> usize {
        (**self).zeros(at, most)
    }
    fn equal_words(&self, a: Hpa, b: Hpa, most: usize) -> usize {
        (**self).equal_words(a, b, most)
    }
    #[inline]
    fn or_words(&self, from: Hpa, to: Place<'_>, words: &[(u16, u64)]) {
        (**self).or_words(from, to, words);
    }
    #[inline]
    fn read_u64(&self, at: Hpa) -> u64 {
        (**self).read_u64(at)
    }
    #[inline(always)]
    fn read_pair(&self, at: Hpa) -> [u64; 2] {
        (**self).read_pair(at)
    }
    #[inline]
    fn write_u64(&self, at: Place<'_>, value: u64) {
        (**self).write_u64(at, value);
    }
    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        (**self).read_bytes(at, into);
    }
    #[inline]
    fn read_words(&self, at: Hpa, into: &mut [u64]) {
        (**self).read_words(at, into);
    }
    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        (**self).write_bytes(at, bytes);
    }
    #[inline]
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        (**self).take_bits(at, bits)
    }
    #[inline]
    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        (**self).compare_exchange(at, old, new)
    }
    #[inline]
    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        (**self).compare_exchange_u32(at, old, new)
    }
    fn zero(&self, at: Place<'_>, len: u64) {
        (**self).zero(at, len);
    }
}

/// Physical memory from address 0 on, in a vector: for host tests.
#[cfg(not(target_os = "none"))]
#[derive(Clone, Debug)]
pub struct VecMem(std::cell::RefCell<Vec<u8>>);

#[cfg(not(target_os = "none"))]
impl VecMem {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Self {
        Self::from_bytes(vec![0; len])
    }

    /// Memory that holds `bytes` from address 0 on.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(std::cell::RefCell::new(bytes))
    }

    /// A copy of the bytes of `span`; what is past the end reads as all ones.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_bytes(Hpa::new(at), &mut bytes);
        bytes
    }

    /// Writes eight bytes anywhere.
    pub fn write_u64(&self, at: Hpa, value: u64) {
        self.write_bytes(at, &value.to_le_bytes());
    }

    /// Writes bytes anywhere.
    pub fn write_bytes(&self, at: Hpa, bytes: &[u8]) {
        let mut memory = self.0.borrow_mut();
        let there = usize::try_from(at.get()).ok().and_then(|at| memory.get_mut(at..)).unwrap_or_default();
        let known = there.len().min(bytes.len());
        there[..known].copy_from_slice(&bytes[..known]);
    }
}

#[cfg(not(target_os = "none"))]
impl PhysMem for VecMem {
    fn read_u64(&self, at: Hpa) -> u64 {
        let mut bytes = [0; 8];
        self.read_bytes(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write_u64(&self, at: Place<'_>, value: u64) {
        VecMem::write_u64(self, at.hpa(), value);
    }

    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        let memory = self.0.borrow();
        let there = usize::try_from(at.get()).ok().and_then(|at| memory.get(at..)).unwrap_or_default();
        let (known, beyond) = into.split_at_mut(there.len().min(into.len()));
        known.copy_from_slice(&there[..known.len()]);
        beyond.fill(0xFF);
    }

    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        VecMem::write_bytes(self, at.hpa(), bytes);
    }

    /// No processor shares the vector, so two steps are as good as one.
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        let old = self.read_u64(at.hpa());
        self.write_u64(at.hpa(), old & !bits);
        old & bits
    }

    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        let same = self.read_u64(at.hpa()) == old;
        if same {
            self.write_u64(at.hpa(), new);
        }
        same
    }

    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        let same = self.read_u32(at.hpa()) == old;
        if same {
            self.write_bytes(at.hpa(), &new.to_le_bytes());
        }
        same
    }
}
