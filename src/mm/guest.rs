//! L2's memory: the one place where a [`Gpa`] becomes an [`Hpa`] (invariant I5).
//!
//! L2 sees the machine one to one, minus nvmx's own range. So translating is a comparison, not a walk; but every guest
//! address in a VMCS, an EPT entry or an operand comes through here.

use crate::{
    addr::{Gpa, Hpa, PAGE_SIZE},
    mm::{PhysMem, Place, Span},
    vmx::ept_entry::{ADDRESS, DIRTY, LARGE},
};

/// The address is nvmx's own memory or beyond the processor's physical-address width: L2 has no memory there.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotOwned(pub Gpa);

/// L2's view of physical memory.
///
/// What holding one proves: accesses through it never reach nvmx's own range. What it does not: that there is RAM at an
/// address, or that the content stays the same between two reads. L2 may change it at any moment, so fetch once.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory<P> {
    phys: P,
    own_start: u64,
    own_len: u64,
    limit: u64,
    /// The root of an ept01 whose dirty flags follow nvmx's own writes; 0 if there is none.
    marks: u64,
}

impl<P> GuestMemory<P> {
    /// L2's memory on a machine with `max_phys_addr` physical-address bits of which nvmx keeps `own`.
    pub fn new(phys: P, own: Span, max_phys_addr: u8) -> Self {
        let limit = 1u64.checked_shl(max_phys_addr.into()).unwrap_or(u64::MAX);
        // Whole pages: a page that nvmx owns in part is not L2's.
        let own = own.outer_pages();
        Self { phys, own_start: own.start(), own_len: own.len(), limit, marks: 0 }
    }

    /// The same memory; each write through it sets the dirty flag of the 4 KiB leaf, if there is one, in the ept01 with this root
    /// table: as a write of L2's does. Only the processor whose ept01 it is may write through it.
    pub fn marking(self, ept01: Hpa) -> Self {
        Self { marks: ept01.get(), ..self }
    }

    /// The host-physical address behind `gpa`. Ownership is by whole 4 KiB pages.
    #[inline]
    pub const fn translate(&self, gpa: Gpa) -> Result<Hpa, NotOwned> {
        let at = gpa.get();
        if at.wrapping_sub(self.own_start) < self.own_len || at >= self.limit {
            return Err(NotOwned(gpa));
        }
        Ok(Hpa::new(at))
    }

    /// The right to write to what is behind `gpa`, as far as its page goes.
    #[inline]
    pub const fn place(&self, gpa: Gpa) -> Result<Place<'_>, NotOwned> {
        match self.translate(gpa) {
            Ok(at) => Ok(Place::new(at)),
            Err(error) => Err(error),
        }
    }

    /// nvmx's own range, which L2 does not have.
    pub fn own(&self) -> Span {
        Span::new(self.own_start, self.own_start.saturating_add(self.own_len))
    }

    /// First address beyond the processor's physical-address width.
    #[inline]
    pub const fn limit(&self) -> u64 {
        self.limit
    }
}

impl<P: PhysMem> GuestMemory<P> {
    /// The memory behind it, by [`Hpa`].
    #[inline]
    pub const fn phys(&self) -> &P {
        &self.phys
    }

    /// Reads eight bytes with one access when `gpa` is aligned, byte by byte across a page boundary otherwise.
    #[inline]
    pub fn read_u64(&self, gpa: Gpa) -> Result<u64, NotOwned> {
        if gpa.page_offset() <= PAGE_SIZE - 8 {
            return Ok(self.phys.read_u64(self.translate(gpa)?));
        }
        let mut bytes = [0; 8];
        self.read_bytes(gpa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes eight bytes. Nothing is written when a part of them is not L2's.
    #[inline]
    pub fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), NotOwned> {
        if gpa.page_offset() <= PAGE_SIZE - 8 {
            let at = self.place(gpa)?;
            self.mark(at);
            self.phys.write_u64(at, value);
            return Ok(());
        }
        self.write_bytes(gpa, &value.to_le_bytes())
    }

    /// Replaces eight aligned bytes by `new` in one atomic step if they are `old`; tells whether they were.
    pub fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, NotOwned> {
        let at = self.place(gpa)?;
        self.mark(at);
        Ok(self.phys.compare_exchange(at, old, new))
    }

    /// Replaces four aligned bytes by `new` in one atomic step if they are `old`; tells whether they were.
    pub fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, NotOwned> {
        let at = self.place(gpa)?;
        self.mark(at);
        Ok(self.phys.compare_exchange_u32(at, old, new))
    }

    /// Sets `bits` of the byte at `gpa` in one atomic step.
    pub fn set_bits(&self, gpa: Gpa, bits: u8) -> Result<(), NotOwned> {
        self.change_byte(gpa, |byte| byte | bits)
    }

    /// Clears `bits` of the byte at `gpa` in one atomic step.
    pub fn clear_bits(&self, gpa: Gpa, bits: u8) -> Result<(), NotOwned> {
        self.change_byte(gpa, |byte| byte & !bits)
    }

    fn change_byte(&self, gpa: Gpa, change: impl Fn(u8) -> u8) -> Result<(), NotOwned> {
        /// As often as the bytes around it may change meanwhile.
        const TRIES: u32 = 64;
        let (at, word) = (self.place(gpa)?, self.place(Gpa::new(gpa.get() & !3))?);
        self.mark(at);
        let place = (gpa.get() & 3) as usize;
        for _ in 0..TRIES {
            let old = self.phys.read_u32(word.hpa());
            let mut bytes = old.to_le_bytes();
            bytes[place] = change(bytes[place]);
            if self.phys.compare_exchange_u32(word, old, u32::from_le_bytes(bytes)) {
                return Ok(());
            }
        }
        // Who writes there all the time without a lock loses the bit to a processor as well.
        let mut byte = [0];
        self.phys.read_bytes(at.hpa(), &mut byte);
        self.phys.write_bytes(at, &byte.map(change));
        Ok(())
    }

    /// nvmx writes to the page of `at`: who watches it in ept01 is to see that.
    #[inline]
    fn mark(&self, at: Place<'_>) {
        if self.marks != 0 {
            self.set_dirty(at.hpa());
        }
    }

    /// SDM vol. 3C, "EPT Translation Mechanism": four levels, present if any right is granted, and bit 7 maps a large page.
    #[inline(never)]
    fn set_dirty(&self, at: Hpa) {
        const RIGHTS: u64 = 7;
        let mut table = self.marks;
        for shift in [39, 30, 21, 12] {
            let entry_at = Hpa::new(table | (at.get() >> shift & 511) << 3);
            let entry = self.phys.read_u64(entry_at);
            if entry & RIGHTS == 0 || (shift > 12 && shift < 39 && entry & LARGE != 0) {
                return;
            }
            if shift == 12 && entry & DIRTY == 0 {
                self.phys.write_u64(Place::new(entry_at), entry | DIRTY);
            }
            table = entry & ADDRESS;
        }
    }

    /// Reads a little-endian 32-bit value.
    #[inline]
    pub fn read_u32(&self, gpa: Gpa) -> Result<u32, NotOwned> {
        let mut bytes = [0; 4];
        self.read_bytes(gpa, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Fills `into` from `gpa` on; on error its content is unspecified.
    pub fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), NotOwned> {
        let mut at = gpa;
        let mut rest = into;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at_mut(in_this_page(at, rest.len()));
            self.phys.read_bytes(self.translate(at)?, part);
            at = Gpa::new(at.get().wrapping_add(part.len() as u64));
            rest = tail;
        }
        Ok(())
    }

    /// Writes `bytes` from `gpa` on. Nothing is written when a part of them is not L2's.
    pub fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), NotOwned> {
        self.owns(gpa, bytes.len() as u64)?;
        let mut at = gpa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(in_this_page(at, rest.len()));
            let place = self.place(at)?;
            self.mark(place);
            self.phys.write_bytes(place, part);
            at = Gpa::new(at.get().wrapping_add(part.len() as u64));
            rest = tail;
        }
        Ok(())
    }

    /// Writes `words` from `gpa` on, which lie in one page.
    pub fn write_words(&self, gpa: Gpa, words: &[u64]) -> Result<(), NotOwned> {
        self.owns(gpa, size_of_val(words) as u64)?;
        let at = self.place(gpa)?;
        self.mark(at);
        self.phys.write_words(at, words);
        Ok(())
    }

    /// Writes zeros to all of `to`.
    pub fn zero(&self, to: Span) -> Result<(), NotOwned> {
        self.owns(Gpa::new(to.start()), to.len())?;
        if !to.is_empty() {
            self.phys.zero(self.place(Gpa::new(to.start()))?, to.len());
        }
        Ok(())
    }

    /// Copies what lies at `from` to all of `to`, which is as long and does not overlap.
    pub fn copy(&self, from: Hpa, to: Span) -> Result<(), NotOwned> {
        self.owns(Gpa::new(to.start()), to.len())?;
        if !to.is_empty() {
            self.phys.copy(from, self.place(Gpa::new(to.start()))?, to.len());
        }
        Ok(())
    }

    /// True if `words` stand from `gpa` on, in one page of L2's.
    pub fn holds_words(&self, gpa: Gpa, words: &[u64]) -> bool {
        self.owns(gpa, size_of_val(words) as u64).is_ok()
            && self.translate(gpa).is_ok_and(|at| self.phys.holds_words(at, words))
    }

    /// Checks that every byte of `gpa .. gpa + len` is L2's.
    pub fn owns(&self, gpa: Gpa, len: u64) -> Result<(), NotOwned> {
        let Some(last) = len.checked_sub(1) else { return Ok(()) };
        let last = gpa.checked_add(last).ok_or(NotOwned(gpa))?;
        let _ = self.translate(gpa)?;
        let _ = self.translate(last)?;
        // Both ends are outside of nvmx's range; a span that swallows it whole is refused here.
        if gpa.get() < self.own_start && last.get() > self.own_start && self.own_len != 0 {
            return Err(NotOwned(Gpa::new(self.own_start)));
        }
        Ok(())
    }
}

/// How many of `len` bytes from `at` on lie in the page of `at`.
#[inline]
fn in_this_page(at: Gpa, len: usize) -> usize {
    len.min((PAGE_SIZE - at.page_offset()) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mm::phys::VecMem;

    const OWN: Span = Span::new(0x4000, 0x6000);

    fn memory() -> GuestMemory<VecMem> {
        GuestMemory::new(VecMem::new(0x10000), OWN, 36)
    }

    #[test]
    fn translation_is_one_to_one_outside_of_nvmx() {
        let memory = memory();
        assert_eq!(memory.translate(Gpa::new(0x3FFF)), Ok(Hpa::new(0x3FFF)));
        assert_eq!(memory.translate(Gpa::new(0x4000)), Err(NotOwned(Gpa::new(0x4000))));
        assert_eq!(memory.translate(Gpa::new(0x5FFF)), Err(NotOwned(Gpa::new(0x5FFF))));
        assert_eq!(memory.translate(Gpa::new(0x6000)), Ok(Hpa::new(0x6000)));
        assert_eq!(memory.translate(Gpa::new((1 << 36) - 1)), Ok(Hpa::new((1 << 36) - 1)));
        assert_eq!(memory.translate(Gpa::new(1 << 36)), Err(NotOwned(Gpa::new(1 << 36))));
    }

    /// With keys of TME-MK an address above the width is an alias of the memory below.
    #[test]
    fn no_alias_of_nvmx_above_the_width_is_the_guests() {
        for bit in 36..64 {
            for own in [OWN.start(), OWN.end() - 1] {
                assert!(memory().translate(Gpa::new(own | 1 << bit)).is_err(), "bit {bit}");
            }
            assert!(memory().owns(Gpa::new(0x8000 | 1 << bit), 0x1000).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_page_that_nvmx_owns_in_part_is_not_the_guests() {
        let memory = GuestMemory::new(VecMem::new(0), Span::new(0x4100, 0x4200), 36);
        assert!(memory.translate(Gpa::new(0x4000)).is_err());
        assert!(memory.translate(Gpa::new(0x4FFF)).is_err());
        assert!(memory.translate(Gpa::new(0x5000)).is_ok());
    }

    /// A page that has a 4 KiB leaf of its own in ept01 is marked by each way to write; one in a large page has none.
    #[test]
    fn nvmx_s_own_writes_set_the_dirty_flag() {
        const DIRTY: u64 = 1 << 9;
        let ways: [fn(&GuestMemory<VecMem>, Gpa) -> bool; 7] = [
            |m, at| m.write_u64(at, 1).is_ok(),
            |m, at| m.write_bytes(at, &[1]).is_ok(),
            |m, at| m.write_words(at, &[1]).is_ok(),
            |m, at| m.compare_exchange_u64(at, 0, 1).is_ok(),
            |m, at| m.compare_exchange_u32(at, 0, 1).is_ok(),
            |m, at| m.set_bits(at, 1).is_ok(),
            |m, at| m.clear_bits(at, 1).is_ok(),
        ];
        for way in ways {
            let phys = VecMem::new(0x8000);
            let own = Span::new(0x4000, 0x8000);
            for (at, entry) in [(0x4000, 0x5007), (0x5000, 0x6007), (0x6000, 0x7007), (0x6008, 0x20_0087)] {
                phys.write_u64(Hpa::new(at), entry);
            }
            for page in 0..4 {
                phys.write_u64(Hpa::new(0x7000 + page * 8), page << 12 | 0x37);
            }
            let memory = GuestMemory::new(phys, own, 40).marking(Hpa::new(0x4000));
            assert!(way(&memory, Gpa::new(0x2008)) && way(&memory, Gpa::new(0x20_2008)));
            assert!(!way(&memory, Gpa::new(0x5008)), "nvmx's own");
            let marked = (0..4).filter(|n| memory.phys().read_u64(Hpa::new(0x7000 + n * 8)) & DIRTY != 0);
            assert_eq!(marked.collect::<Vec<_>>(), [2]);
            assert_eq!(memory.phys().read_u64(Hpa::new(0x6008)), 0x20_0087);
        }
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let memory = memory();
        assert_eq!(memory.write_u64(Gpa::new(0x3FFC), u64::MAX), Err(NotOwned(Gpa::new(0x4003))));
        assert_eq!(memory.write_bytes(Gpa::new(0x3FF0), &[1; 0x3000]), Err(NotOwned(Gpa::new(0x4000))));
        assert_eq!(memory.phys().bytes(0x3FF0, 0x40), [0; 0x40]);
    }

    proptest! {
        #[test]
        fn no_access_reaches_nvmx(at in 0u64..0x10000, len in 0usize..0x3000) {
            let memory = memory();
            let touched = Span::new(at, at + len as u64);
            let written = memory.write_bytes(Gpa::new(at), &vec![0xAB; len]);
            prop_assert_eq!(written.is_err(), len != 0 && touched.overlaps(OWN));
            prop_assert_eq!(memory.phys().bytes(0x4000, 0x2000), vec![0; 0x2000]);
            let mut back = vec![0; len];
            prop_assert_eq!(memory.read_bytes(Gpa::new(at), &mut back).is_ok(), written.is_ok());
            if written.is_ok() && at + len as u64 <= 0x10000 {
                prop_assert!(back.iter().all(|b| *b == 0xAB));
            }
        }

        #[test]
        fn an_unaligned_word_reads_back(at in 0u64..0x3FF8, value: u64) {
            let memory = memory();
            memory.write_u64(Gpa::new(at), value).unwrap();
            prop_assert_eq!(memory.read_u64(Gpa::new(at)), Ok(value));
        }
    }
}
