//! Physical memory through the direct map: every address of RAM and of the devices below 4 GiB, at a fixed offset.

use core::{
    arch::asm,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use crate::addr::{Hpa, PAGE_SIZE};
use crate::mm::{PhysMem, Place};

/// Linear address of physical address 0. Present from the first Rust instruction on, in the tables of the entry code as
/// well as in nvmx's own.
pub const DIRECT_MAP: u64 = 0xFFFF_8000_0000_0000;

/// The direct map: physical memory below `end` is mapped at [`DIRECT_MAP`], readable and writable.
///
/// Accesses are single instructions that the compiler neither repeats nor drops: L2 and devices may change the same
/// memory at any moment. At or above `end` there is nothing: reads give all ones, writes are lost.
#[derive(Clone, Copy, Debug)]
pub struct DirectMap {
    /// On a host memory lies where the allocator puts it.
    #[cfg(not(target_os = "none"))]
    base: u64,
    end: u64,
    /// Where the last word may begin.
    last_word: u64,
}

impl DirectMap {
    /// Uses the direct map up to `end`.
    ///
    /// # Safety
    ///
    /// 1. The active page tables map `DIRECT_MAP .. DIRECT_MAP + end` to physical `0 .. end`, writable, for as long as
    ///    the value or a copy of it is used.
    /// 2. No Rust object that is reached otherwise (nvmx's image, stacks, per-CPU blocks) is written through it: a [`Place`] is
    ///    an own frame or L2's memory, and what `hw` writes without one is neither image nor stack.
    pub const unsafe fn new(end: Hpa) -> Self {
        Self {
            #[cfg(not(target_os = "none"))]
            base: DIRECT_MAP,
            end: end.get(),
            // There is more than a word.
            last_word: end.get().saturating_sub(8),
        }
    }

    /// Memory of a machine on a host: zeros from 0 to `end`, for good.
    #[cfg(not(target_os = "none"))]
    pub fn of_host(end: Hpa) -> Self {
        use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
        const PAGE: usize = crate::addr::PAGE_SIZE as usize;
        let layout = match Layout::from_size_align((end.get() as usize).max(PAGE), PAGE) {
            Ok(layout) => layout,
            Err(error) => unreachable!("{error}"),
        };
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        Self { base: base.expose_provenance() as u64, end: end.get(), last_word: end.get().saturating_sub(8) }
    }

    /// Where physical address 0 is.
    #[inline(always)]
    const fn base(&self) -> u64 {
        #[cfg(not(target_os = "none"))]
        return self.base;
        #[cfg(target_os = "none")]
        DIRECT_MAP
    }

    /// First physical address that is not mapped.
    pub const fn end(&self) -> Hpa {
        Hpa::new(self.end)
    }

    /// The linear address of `len` bytes at `at`, if they are all mapped.
    #[inline]
    pub fn linear(&self, at: Hpa, len: u64) -> Option<*mut u8> {
        #[cfg(not(target_os = "none"))]
        if silence::falls_on(at) {
            return None;
        }
        let last = at.get().checked_add(len)?;
        (last <= self.end).then_some((self.base() + at.get()) as *mut u8)
    }

    /// The linear address of the eight bytes at `at`, if they are all mapped.
    #[inline(always)]
    fn word(&self, at: Hpa) -> Option<*mut u8> {
        #[cfg(not(target_os = "none"))]
        if silence::falls_on(at) {
            return None;
        }
        (at.get() <= self.last_word).then_some((self.base() + at.get()) as *mut u8)
    }

    /// The eight bytes at `at` for one atomic access, if they are mapped and aligned.
    #[inline]
    fn atomic(&self, at: Hpa) -> Option<&AtomicU64> {
        let pointer = self.linear(at, 8).filter(|_| at.is_aligned(8))?;
        // SAFETY: 1. the eight bytes are mapped and writable for as long as `self` lives (condition 1 of `new`). 2. They are
        // aligned. 3. They are no Rust object (condition 2 of `new`); whoever else changes them does so atomically.
        Some(unsafe { AtomicU64::from_ptr(pointer.cast()) })
    }
}

/// Writes at an address that needs no owner: for `hw`, which has the registers and pages of the machine, and for [`Place`]s.
impl DirectMap {
    #[inline(always)]
    pub(in crate::hw) fn poke_u64(&self, at: Hpa, value: u64) {
        let Some(pointer) = self.word(at) else { return };
        // SAFETY: 1. the eight bytes are mapped and writable. 2. They are no Rust object (condition 2 of `new`).
        unsafe { asm!("mov [{}], {}", in(reg) pointer, in(reg) value, options(nostack, preserves_flags)) };
    }

    pub(in crate::hw) fn poke_bytes(&self, at: Hpa, bytes: &[u8]) {
        let Some(pointer) = self.linear(at, bytes.len() as u64) else { return };
        // SAFETY: 1. the destination is mapped and writable and no Rust object. 2. The source is a Rust slice.
        unsafe { copy_bytes(bytes.as_ptr(), pointer, bytes.len()) };
    }

    /// Fills with zeros.
    pub(in crate::hw) fn wipe(&self, at: Hpa, len: u64) {
        let Some(pointer) = self.linear(at, len) else { return };
        // SAFETY: the destination is mapped, writable and no Rust object. Direction flag is clear in Rust code.
        unsafe {
            asm!("rep stosq", inout("rcx") len / 8 => _, inout("rdi") pointer => _, in("rax") 0u64,
                options(nostack, preserves_flags));
            asm!("rep stosb", inout("rcx") len % 8 => _, inout("rdi") pointer.add((len & !7) as usize) => _,
                in("al") 0u8, options(nostack, preserves_flags));
        }
    }
}

/// On a host a test can let one access of nvmx to memory outside of its own range find nothing there.
#[cfg(not(target_os = "none"))]
pub mod silence {
    use crate::addr::Hpa;
    use crate::mm::Span;
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
        static COUNT: Cell<u64> = const { Cell::new(0) };
        static PAUSED: Cell<bool> = const { Cell::new(false) };
        static OWN: Cell<Span> = const { Cell::new(Span::new(0, u64::MAX)) };
    }

    /// The access behind so many further ones outside of `own` finds nothing; with `None` they are only counted.
    pub fn behind(accesses: Option<u64>, own: Span) {
        LEFT.set(accesses);
        COUNT.set(0);
        OWN.set(own);
    }

    /// Ends that; tells how many accesses there were.
    pub fn end() -> u64 {
        LEFT.set(None);
        OWN.set(Span::new(0, u64::MAX));
        COUNT.get()
    }

    /// While it is paused accesses are not nvmx's; tells whether it was.
    pub fn pause(paused: bool) -> bool {
        PAUSED.replace(paused)
    }

    pub(super) fn falls_on(at: Hpa) -> bool {
        let own = OWN.get();
        if PAUSED.get() || (own.start()..own.end()).contains(&at.get()) {
            return false;
        }
        COUNT.set(COUNT.get() + 1);
        match LEFT.get() {
            Some(left) => {
                LEFT.set(left.checked_sub(1));
                left == 0
            }
            None => false,
        }
    }
}

/// `or_words` where a page is not mapped.
#[cold]
fn or_missing(phys: &DirectMap, from: Hpa, to: Hpa, words: &[(u16, u64)]) {
    for (number, bits) in words {
        let offset = 8 * u64::from(number % 512);
        phys.poke_u64(Hpa::new(to.get() + offset), bits | phys.read_u64(Hpa::new(from.get() + offset)));
    }
}

impl PhysMem for DirectMap {
    #[inline]
    fn read_u64(&self, at: Hpa) -> u64 {
        let Some(pointer) = self.word(at) else { return u64::MAX };
        let value: u64;
        // SAFETY: 1. the eight bytes are mapped (condition 1 of `new`). 2. One load, no side effect on Rust's memory.
        unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) pointer, options(nostack, preserves_flags, readonly)) };
        value
    }

    #[inline(always)]
    fn read_pair(&self, at: Hpa) -> [u64; 2] {
        #[cfg(not(target_os = "none"))]
        if silence::falls_on(at) {
            return [u64::MAX; 2];
        }
        if at.get() >= self.last_word.saturating_sub(7) {
            return [u64::MAX; 2];
        }
        let (first, second): (u64, u64);
        // SAFETY: 1. the sixteen bytes are mapped (condition 1 of `new`): the second word begins at `last_word` at most. 2. Loads alone, no
        // side effect on Rust's memory.
        unsafe {
            asm!("mov {first}, [{at}]", "mov {second}, [{at} + 8]", at = in(reg) self.base() + at.get(),
                first = out(reg) first, second = lateout(reg) second, options(nostack, preserves_flags, readonly));
        }
        [first, second]
    }

    #[inline]
    fn write_u64(&self, at: Place<'_>, value: u64) {
        self.poke_u64(at.hpa(), value);
    }

    #[inline(always)]
    fn or_words(&self, from: Hpa, to: Place<'_>, words: &[(u16, u64)]) {
        // A page is mapped if its last word is.
        const LAST: u64 = PAGE_SIZE - 8;
        let page = |at: Hpa| self.word(Hpa::new(at.page().get() | LAST)).map(|last| last.wrapping_sub(LAST as usize));
        let (Some(from), Some(to)) = (page(from), page(to.hpa())) else {
            // What is not there reads as all ones.
            return or_missing(self, from, to.hpa(), words);
        };
        for (number, bits) in words {
            // SAFETY: 1. both pages are mapped, and the word lies within them. 2. They are no Rust objects (condition 2 of
            // `new`). 3. One load and one store.
            unsafe {
                asm!("mov {v}, [{from} + 8*{n}]", "or {v}, {bits}", "mov [{to} + 8*{n}], {v}", v = out(reg) _,
                    bits = in(reg) *bits, from = in(reg) from, to = in(reg) to, n = in(reg) u64::from(number % 512),
                    options(nostack));
            };
        }
    }

    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        let Some(pointer) = self.linear(at, into.len() as u64) else {
            into.fill(0xFF);
            return;
        };
        // SAFETY: 1. the source is mapped. 2. The destination is a Rust slice of that length, disjoint from it
        // (condition 2 of `new`).
        unsafe { copy_bytes(pointer, into.as_mut_ptr(), into.len()) };
    }

    #[inline]
    fn read_words(&self, at: Hpa, into: &mut [u64]) {
        let len = size_of_val(into);
        let Some(pointer) = self.linear(at, len as u64) else {
            into.fill(u64::MAX);
            return;
        };
        // SAFETY: 1. the source is mapped. 2. The destination is a Rust slice of that length, disjoint from it (condition 2
        // of `new`), and any bytes are good words.
        unsafe { copy_bytes(pointer, into.as_mut_ptr().cast(), len) };
    }

    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        self.poke_bytes(at.hpa(), bytes);
    }

    fn write_words(&self, at: Place<'_>, words: &[u64]) {
        let len = size_of_val(words);
        let Some(pointer) = self.linear(at.hpa(), len as u64) else { return };
        // SAFETY: 1. the destination is mapped and writable and no Rust object. 2. The source is a Rust slice.
        unsafe { copy_bytes(words.as_ptr().cast(), pointer, len) };
    }

    fn holds_words(&self, at: Hpa, words: &[u64]) -> bool {
        let Some(pointer) = self.linear(at, size_of_val(words) as u64) else { return false };
        let equal: u8;
        // SAFETY: 1. both are mapped for the length of the slice and only read. 2. Rust code keeps the direction flag clear.
        // CMP of a register with itself sets ZF first: no words are equal words.
        unsafe {
            asm!("cmp rcx, rcx", "repe cmpsq", "sete {equal}", equal = out(reg_byte) equal,
                inout("rcx") words.len() => _, inout("rsi") words.as_ptr() => _, inout("rdi") pointer => _,
                options(nostack, readonly));
        }
        equal != 0
    }

    fn zeros(&self, at: Hpa, most: usize) -> usize {
        let Some(pointer) = self.linear(at, 8 * most as u64) else { return 0 };
        let (left, other): (usize, u8);
        // SAFETY: the words are mapped and only read. Rust code keeps the direction flag clear. CMP of a register with itself
        // sets ZF first: of no words none is another than zero.
        unsafe {
            asm!("cmp rcx, rcx", "repe scasq", "setne {other}", other = out(reg_byte) other,
                inout("rcx") most => left, inout("rdi") pointer => _, in("rax") 0u64, options(nostack, readonly));
        }
        // The word that is not zero is counted as looked at.
        most - left - usize::from(other)
    }

    fn equal_words(&self, a: Hpa, b: Hpa, most: usize) -> usize {
        let len = 8 * most as u64;
        let (Some(a), Some(b)) = (self.linear(a, len), self.linear(b, len)) else { return 0 };
        let (left, other): (usize, u8);
        // SAFETY: the words are mapped and only read. Rust code keeps the direction flag clear. CMP of a register with itself
        // sets ZF first: of no words none is another.
        unsafe {
            asm!("cmp rcx, rcx", "repe cmpsq", "setne {other}", other = out(reg_byte) other,
                inout("rcx") most => left, inout("rsi") a => _, inout("rdi") b => _, options(nostack, readonly));
        }
        // The pair that differs is counted as looked at.
        most - left - usize::from(other)
    }

    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        self.atomic(at.hpa()).map_or(0, |word| word.fetch_and(!bits, Ordering::AcqRel) & bits)
    }

    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        // Where nothing answers, reads give all ones and writes are lost.
        self.atomic(at.hpa()).map_or(old == u64::MAX, |word| {
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        let Some(pointer) = self.linear(at.hpa(), 4).filter(|_| at.hpa().is_aligned(4)) else { return old == u32::MAX };
        // SAFETY: as in `atomic`, with four bytes.
        let word = unsafe { AtomicU32::from_ptr(pointer.cast()) };
        word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn zero(&self, at: Place<'_>, len: u64) {
        self.wipe(at.hpa(), len);
    }

    fn copy(&self, from: Hpa, to: Place<'_>, len: u64) {
        let (Some(from), Some(to)) = (self.linear(from, len), self.linear(to.hpa(), len)) else { return };
        // SAFETY: both are mapped, the destination is writable and no Rust object.
        unsafe { copy_bytes(from, to, len as usize) };
    }
}

/// Copies with one pass of string moves: each byte is read once.
///
/// # Safety
///
/// Both are valid for `len` bytes and disjoint.
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as promised by the caller; Rust code keeps the direction flag clear.
    unsafe {
        asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) len & 7,
            inout("rcx") len >> 3 => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
    }
}
