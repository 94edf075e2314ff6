//! L3's memory, for the operands of an instruction that nvmx completes for L3: through L3's paging and ept12.
//!
//! Where ept12 has no such page, or its flags are still to be set, the access is given up and told: the code for EPT
//! violations then fills, sets flags or tells L2, and L3 executes its instruction again.

use crate::addr::{Gpa, Hpa, Ngpa};
use crate::ept::entry::SUB_PAGES;
use crate::ept::sub_page_table::look_up;
use crate::ept::walk::{GuestTables, Leaf, Walk, walk};
use crate::ept::{EptRules, Eptp, Level, Qualification, Rights};
use crate::mm::linear::{AccessError, DataAccess, Paging, Privilege};
use crate::mm::{GuestMemory, PhysMem, Place, Span};
use crate::vmx::ept_entry::{ACCESSED, DIRTY};
use core::cell::Cell;

/// An access that ept12 does not serve.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Miss {
    /// The address in L3's physical memory.
    pub at: u64,
    /// The linear address of the operand.
    pub linear: u64,
    /// As an EPT violation would report the access.
    pub qualification: Qualification,
}

/// Why an operand of L3's is not accessible.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failed {
    /// L3's own paging, or memory that L2 does not own.
    Access(AccessError),
    /// ept12.
    Miss(Miss),
}

/// How L3's physical addresses become L2's.
#[derive(Clone, Copy)]
pub struct NestedView<'a, P> {
    /// L2's memory.
    pub guest: &'a GuestMemory<P>,
    /// L2's EPT, if it uses one for this guest.
    pub eptp12: Option<Eptp>,
    /// L2's table of sub-page write permissions, if it uses them for this guest.
    pub spptp12: Option<Gpa>,
    /// What is reserved in it.
    pub rules: EptRules,
    /// L3's paging.
    pub paging: Paging,
}

impl<P: PhysMem> NestedView<'_, P> {
    /// Reads an operand.
    pub fn read(&self, linear: u64, into: &mut [u8]) -> Result<(), Failed> {
        let memory = self.memory();
        let result = self.paging.read(&memory, linear, into);
        self.conclude(&memory, linear, into.len(), result)
    }

    /// Writes an operand.
    pub fn write(&self, linear: u64, bytes: &[u8]) -> Result<(), Failed> {
        let memory = self.memory();
        let result = self.paging.write(&memory, linear, bytes);
        self.conclude(&memory, linear, bytes.len(), result)
    }

    fn conclude(
        &self,
        memory: &GuestMemory<Physical<P>>,
        linear: u64,
        bytes: usize,
        result: Result<(), AccessError>,
    ) -> Result<(), Failed> {
        // After a miss the rest of the walk was on all ones.
        let Some((at, qualification)) = memory.phys().missed.get() else { return result.map_err(Failed::Access) };
        if !qualification.contains(Qualification::LINEAR_TRANSLATED) {
            return Err(Failed::Miss(Miss { at, linear, qualification }));
        }
        // An operand that crosses pages does not begin at the beginning of one.
        let [first, (behind, rest)] = self.paging.pieces(linear, bytes);
        let linear = if rest != 0 && at & 0xFFF == 0 { behind } else { first.0 };
        Err(Failed::Miss(Miss { at, linear, qualification: qualification | self.advanced(linear) }))
    }

    /// The advanced information on an address whose translation by L3's paging has just worked.
    fn advanced(&self, linear: u64) -> Qualification {
        let mut bits = Qualification::empty();
        if let Ok((_, kind)) = self.paging.page(&self.memory(), linear, DataAccess::Read, Privilege::Supervisor) {
            bits.set(Qualification::USER_LINEAR, kind.user);
            bits.set(Qualification::WRITABLE_LINEAR, kind.writable);
            bits.set(Qualification::NO_EXECUTE_LINEAR, kind.execute_disable);
        }
        bits
    }

    fn memory(&self) -> GuestMemory<Physical<'_, P>> {
        GuestMemory::new(Physical { view: self, missed: Cell::new(None) }, Span::new(0, 0), 52)
    }
}

/// What of an access to a linear address reaches physical memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The walk of L3's paging.
    Walk,
    /// The operand itself, so many bytes of it.
    Operand(usize),
}

/// L3's physical memory.
struct Physical<'a, P> {
    view: &'a NestedView<'a, P>,
    missed: Cell<Option<(u64, Qualification)>>,
}

impl<P: PhysMem> Physical<'_, P> {
    /// L2's address behind `at`, or `None` and a note of the miss. Once something is missing nothing more happens.
    fn gpa(&self, at: Hpa, rights: Rights, part: Part) -> Option<Gpa> {
        if self.missed.get().is_some() {
            return None;
        }
        let Some(eptp12) = self.view.eptp12 else { return Some(Gpa::new(at.get())) };
        // With accessed and dirty flags in ept12 an access to L3's paging structures counts as a write.
        let counts_as_write = part == Part::Walk && eptp12.accessed_dirty();
        let rights = if counts_as_write { Rights::READ | Rights::WRITE } else { rights };
        let found = self.walk(eptp12, at.get(), rights, part);
        if found.is_none() {
            let mut qualification = Qualification::LINEAR_VALID;
            qualification.set(Qualification::READ, rights.contains(Rights::READ));
            qualification.set(Qualification::WRITE, rights.contains(Rights::WRITE));
            qualification.set(Qualification::LINEAR_TRANSLATED, part != Part::Walk);
            self.missed.set(Some((at.get(), qualification)));
        }
        found
    }

    fn walk(&self, eptp12: Eptp, at: u64, rights: Rights, part: Part) -> Option<Gpa> {
        let guest = self.view.guest;
        let Walk::Leaf(leaf) = walk(&mut GuestTables(guest), eptp12.root(), at, &self.view.rules) else {
            return None;
        };
        let flags = match (eptp12.accessed_dirty(), rights.contains(Rights::WRITE)) {
            (false, _) => 0,
            (true, false) => ACCESSED,
            (true, true) => ACCESSED | DIRTY,
        };
        let flagged = flags == 0 || guest.read_u64(leaf.entry).is_ok_and(|entry| entry & flags == flags);
        let gpa = Gpa::new(leaf.page.get() | leaf.level.offset(at));
        // A page that L2 does not own is a miss too, and a misconfiguration for L2, whoever makes the access.
        let allowed = leaf.rights.contains(rights) || rights == Rights::WRITE && self.sub_pages_allow(&leaf, at, part);
        (allowed && flagged && guest.translate(gpa).is_ok()).then_some(gpa)
    }

    /// Sub-pages allow the write to a page that is not writable.
    fn sub_pages_allow(&self, leaf: &Leaf<Gpa>, at: u64, part: Part) -> bool {
        let (Part::Operand(bytes), Some(spptp12)) = (part, self.view.spptp12) else { return false };
        let guest = self.view.guest;
        let has_some = leaf.level == Level::Pt
            && leaf.rights.contains(Rights::READ)
            && Level::Pml4.reaches(at)
            && guest.read_u64(leaf.entry).is_ok_and(|entry| entry & SUB_PAGES != 0);
        has_some && look_up(spptp12, Ngpa::new(at), guest).allows(Ngpa::new(at), bytes as u64)
    }
}

impl<P: PhysMem> PhysMem for Physical<'_, P> {
    fn read_u64(&self, at: Hpa) -> u64 {
        let gpa = self.gpa(at, Rights::READ, Part::Walk);
        gpa.and_then(|gpa| self.view.guest.read_u64(gpa).ok()).unwrap_or(u64::MAX)
    }

    fn write_u64(&self, at: Place<'_>, value: u64) {
        if let Some(gpa) = self.gpa(at.hpa(), Rights::READ | Rights::WRITE, Part::Walk) {
            let _ = self.view.guest.write_u64(gpa, value);
        }
    }

    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        let gpa = self.gpa(at, Rights::READ, Part::Operand(into.len()));
        if gpa.is_none_or(|gpa| self.view.guest.read_bytes(gpa, into).is_err()) {
            into.fill(0xFF);
        }
    }

    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        if let Some(gpa) = self.gpa(at.hpa(), Rights::WRITE, Part::Operand(bytes.len())) {
            let _ = self.view.guest.write_bytes(gpa, bytes);
        }
    }

    fn take_bits(&self, _: Place<'_>, _: u64) -> u64 {
        // No walk of linear addresses takes flags back.
        0
    }

    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        // After a miss nothing more happens, and the walk is not repeated.
        self.gpa(at.hpa(), Rights::READ | Rights::WRITE, Part::Walk)
            .is_none_or(|gpa| self.view.guest.compare_exchange_u64(gpa, old, new).unwrap_or(true))
    }

    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        self.gpa(at.hpa(), Rights::READ | Rights::WRITE, Part::Walk)
            .is_none_or(|gpa| self.view.guest.compare_exchange_u32(gpa, old, new).unwrap_or(true))
    }
}
