//! Accessed and dirty flags in ept12, and L2's page-modification log.
//!
//! The processor sets the flags of ept02, which L2 never sees; those of ept12 are set here, when a leaf is composed. So
//! that a dirty flag is set by the first write and not before, a leaf whose page is clean is composed without the right
//! to write. For the rest ept02 is under the same regime as ept12: with its flags enabled the processor treats accesses
//! to L3's paging structures as writes.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Accessed and Dirty Flags for EPT", "Page-Modification Logging".

use super::entry::{ACCESSED, DIRTY, Level, Rights};
use super::walk::TableReader;
use super::{GuestView, NotOwned};
use crate::addr::{Gpa, Ngpa};
use arrayvec::ArrayVec;

/// The page-modification log of a vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageLog {
    /// PML address: a page of L2 with 512 entries.
    pub address: Gpa,
    /// PML index: the next entry. It counts down, and wraps when the log is full.
    pub index: u16,
}

impl PageLog {
    const ENTRIES: u16 = 512;

    const fn is_full(&self) -> bool {
        self.index >= Self::ENTRIES
    }

    /// Logs the page of `ngpa`; the log is not full.
    fn push(&mut self, ngpa: Ngpa, guest: &impl GuestView) {
        guest.write_word(Gpa::new(self.address.page().get() | u64::from(self.index) << 3), ngpa.page().get());
        self.index = self.index.wrapping_sub(1);
    }
}

/// The entries of an ept12 of four levels above a page table, where they lie and what they were when it was found.
pub(super) type Way = [(Gpa, u64); 3];

/// Reads ept12 and remembers the entries of the walk.
pub(super) struct Path<'a, G> {
    guest: &'a G,
    entries: ArrayVec<(Gpa, u64), { Level::DOWN.len() }>,
    /// So many of them are the walk's; those behind were read before it.
    walked: usize,
}

impl<G: GuestView> TableReader for Path<'_, G> {
    type Address = Gpa;
    type Error = NotOwned;

    #[inline(always)]
    fn read(&mut self, at: Gpa) -> Result<u64, NotOwned> {
        if let Some((_, entry)) = self.entries.get(self.walked).filter(|(there, _)| *there == at) {
            self.walked += 1;
            return Ok(*entry);
        }
        let entry = self.guest.read_entry(at)?;
        // A walk reads no more than one entry a level.
        self.entries.truncate(self.walked);
        let _ = self.entries.try_push((at, entry));
        self.walked = self.entries.len();
        Ok(entry)
    }
}

/// What setting flags came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Marked {
    /// All flags are set that the access sets; is the page dirty?
    Done { dirty: bool },
    /// A flag would have to be set and the log is full: nothing was changed.
    LogFull,
    /// L2 changed an entry since it was read.
    Changed,
}

impl<'a, G: GuestView> Path<'a, G> {
    pub(super) const fn new(guest: &'a G) -> Self {
        Self { guest, entries: ArrayVec::new_const(), walked: 0 }
    }

    /// A walk begins anew; what was read is not read again.
    pub(super) const fn again(&mut self) -> &mut Self {
        self.walked = 0;
        self
    }

    /// These entries were read for the walk that is to come, in its order, and then this one.
    #[cold]
    pub(super) fn has_read(&mut self, first: &[(Gpa, u64)], then: Option<(Gpa, u64)>) {
        self.entries.clear();
        // There are no more than levels.
        self.entries.extend(first.iter().copied().chain(then).take(Level::DOWN.len()));
        self.walked = 0;
    }

    /// The entries above the page table to which a walk of four levels came.
    #[inline(always)]
    pub(super) fn way(&self) -> Option<Way> {
        match *self.entries.as_slice() {
            [pml4e, pdpte, pde, _] => Some([pml4e, pdpte, pde]),
            _ => None,
        }
    }

    /// The entry that was read last; 0 if none was.
    pub(super) fn last(&self) -> u64 {
        self.entries.last().map_or(0, |(_, entry)| *entry)
    }

    /// The page is marked accessed on the whole way: whether it is dirty too. An access that does not come about may be answered from
    /// such a page alone, and may write to it only if it is dirty.
    pub(super) fn marked(&self) -> Option<bool> {
        let accessed = self.entries.iter().all(|(_, entry)| entry & ACCESSED != 0);
        accessed.then(|| self.last() & DIRTY != 0)
    }

    /// Sets the flags that an access to `ngpa`, the address of the walk, sets; the walk ended with a leaf that allows it.
    pub(super) fn mark(&self, ngpa: Ngpa, access: Rights, log: Option<&mut PageLog>) -> Marked {
        let write = access.contains(Rights::WRITE);
        let is_leaf = |n: usize| n + 1 == self.entries.len();
        let missing = |n, entry: u64| !entry & if write && is_leaf(n) { ACCESSED | DIRTY } else { ACCESSED };
        let complete = self.entries.iter().enumerate().all(|(n, (_, entry))| missing(n, *entry) == 0);
        if !complete && log.as_ref().is_some_and(|log| log.is_full()) {
            return Marked::LogFull;
        }
        let (mut dirty, mut newly_dirty) = (false, false);
        for (n, &(at, entry)) in self.entries.iter().enumerate() {
            let flags = missing(n, entry);
            if flags != 0 && !self.guest.set_flags(at, entry, flags) {
                return Marked::Changed;
            }
            newly_dirty = flags & DIRTY != 0;
            dirty = is_leaf(n) && (entry | flags) & DIRTY != 0;
        }
        if let Some(log) = log.filter(|_| newly_dirty) {
            log.push(ngpa, self.guest);
        }
        Marked::Done { dirty }
    }
}
