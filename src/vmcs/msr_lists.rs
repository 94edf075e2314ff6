//! The three MSR areas of a vmcs12.
//!
//! The two that load are copied to frames of nvmx and given to the processor, which applies the rules and reports the
//! failing entry exactly as the SDM says; the VM-exit area is loaded by the entry to L2 that follows the reflected exit.
//! The one that stores is done by nvmx: a failing store would be a VMX abort of the real machine.
//! Source: SDM vol. 3C, "VM-Exit Controls for MSRs", "Loading MSRs", table "Format of an MSR Entry".

use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::hw::msr as hw_msr;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::Vmx;
use crate::mm::guest::GuestMemory;
use crate::mm::{Frame, FrameRun, PhysMem};
use crate::rules::checks::REFUSED;
use crate::rules::switched::Item;
use crate::trace::KillReason;
use crate::vmcs::msrs;
use crate::vmx::bitmap::Access;
use crate::vmx::{Field, FieldAccess};

/// Entries that fit: the recommended maximum that IA32_VMX_MISC reports to L2.
pub const MAX_ENTRIES: u64 = 512;
/// Frames of one area.
pub const AREA_FRAMES: usize = (MAX_ENTRIES * 16 / PAGE_SIZE) as usize;

/// VMX abort indicators (SDM table "VMX Aborts").
const ABORT_SAVING: u32 = 1;
/// Failure to load MSRs on VM exit.
pub const ABORT_LOADING: u32 = 4;

/// nvmx's copies: each `AREA_FRAMES` contiguous frames.
pub struct MsrLists {
    entry_load: FrameRun,
    exit_load: FrameRun,
}

impl MsrLists {
    /// On frames that nothing else uses.
    pub fn new(entry_load: FrameRun, exit_load: FrameRun) -> Self {
        MsrLists { entry_load, exit_load }
    }

    /// The frames of both copies, which are free again.
    pub fn into_frames(self) -> impl Iterator<Item = Frame> {
        self.entry_load.into_frames().chain(self.exit_load.into_frames())
    }

    /// Copies the VM-entry MSR-load area of vmcs12; where the copy is, and how many entries it has.
    pub fn copy_entry_area(
        &self,
        phys: &DirectMap,
        memory: &GuestMemory<impl PhysMem>,
        at: u64,
        count: u64,
    ) -> (Hpa, u64) {
        (self.entry_load.hpa(), copy_area(phys, memory, Gpa::new(at), count, &self.entry_load))
    }

    /// The first word of the entry with this number, counted from 1, as the processor saw it.
    pub fn index_of_entry(&self, phys: &impl PhysMem, number: u64) -> u64 {
        let place = number.clamp(1, MAX_ENTRIES) - 1;
        phys.read_u64(Hpa::new(self.entry_load.hpa().get() + 16 * place))
    }

    /// The value that the entry loaded into an MSR before it failed at the entry with this number, if it did.
    pub fn loaded_by_entry(&self, phys: &impl PhysMem, failed: u64, msr: u32) -> Option<u64> {
        loaded(phys, self.entry_load.hpa(), failed, msr)
    }

    /// Stores MSRs to the VM-exit MSR-store area of vmcs12; vmcs02 is current. `own` is what RDMSR of L2 yields for an MSR
    /// that nvmx answers.
    pub fn store(
        vmx: &mut Vmx,
        own: impl Fn(u32) -> Option<u64>,
        memory: &GuestMemory<impl PhysMem>,
        at: u64,
        count: u64,
    ) -> Result<(), KillReason> {
        for i in 0..count.min(MAX_ENTRIES) {
            let entry = Gpa::new(at).checked_add(16 * i).ok_or(KillReason::VmxAbort(ABORT_SAVING))?;
            let index = memory.read_u64(entry).unwrap_or(REFUSED);
            let value = (index >> 32 == 0).then(|| read_of_nested(vmx, &own, index as u32)).flatten();
            let value = value.ok_or(KillReason::VmxAbort(ABORT_SAVING))?;
            // Memory that L2 does not own takes no write, like an address without memory behind it.
            let _ = entry.checked_add(8).map(|to| memory.write_u64(to, value));
        }
        Ok(())
    }

    /// Has vmcs01, which is current, load the VM-exit MSR-load area of vmcs12 with the next entry.
    pub fn arm_exit(&self, vmx: &mut Vmx, phys: &DirectMap, memory: &GuestMemory<impl PhysMem>, at: u64, count: u64) {
        let count = copy_area(phys, memory, Gpa::new(at), count, &self.exit_load);
        vmx.write(Field::VM_ENTRY_MSR_LOAD_ADDR, self.exit_load.hpa().get());
        vmx.write(Field::VM_ENTRY_MSR_LOAD_COUNT, count);
    }
}

/// Copies `count` entries once, or as many as fit, and tells how many. What nvmx would not let L2 write becomes an entry that
/// the processor refuses.
fn copy_area(phys: &impl PhysMem, memory: &GuestMemory<impl PhysMem>, at: Gpa, count: u64, to: &FrameRun) -> u64 {
    let count = count.min(MAX_ENTRIES);
    for offset in (0..count).map(|i| 16 * i) {
        let word = |further| at.checked_add(offset + further).and_then(|e| memory.read_u64(e).ok());
        let (index, value) = (word(0).unwrap_or(REFUSED), word(8).unwrap_or(0));
        let refused = index >> 32 == 0 && !msrs::may_load(index as u32, value, memory);
        phys.write_u64(to.at(offset), if refused { REFUSED } else { index });
        phys.write_u64(to.at(offset + 8), value);
    }
    count
}

/// The last value for an MSR among the entries of a list before the one with this number, counted from 1.
fn loaded(phys: &impl PhysMem, list: Hpa, failed: u64, msr: u32) -> Option<u64> {
    let word = |at| phys.read_u64(Hpa::new(list.get() + at));
    let before = failed.saturating_sub(1).min(MAX_ENTRIES);
    (0..before).rev().map(|i| 16 * i).find(|at| word(*at) == u64::from(msr)).map(|at| word(at + 8))
}

/// The value an MSR has for L3: nvmx's answer, from vmcs02 where VM exits switch it, else from the processor. As RDMSR of L2
/// but for the MSRs of L3's own.
fn read_of_nested(vmx: &mut impl FieldAccess, own: &impl Fn(u32) -> Option<u64>, index: u32) -> Option<u64> {
    /// x2APIC registers and IA32_SMBASE may not be in the list (SDM, "Saving MSRs").
    const X2APIC: core::ops::RangeInclusive<u32> = 0x800..=0x8FF;
    const SMBASE: u32 = 0x9E;
    if X2APIC.contains(&index) || index == SMBASE {
        return None;
    }
    if msrs::is_own(index, Access::Read) {
        return own(index);
    }
    match Item::of_msr(index) {
        Some(item) => Some(vmx.read(item.row().guest)),
        None => hw_msr::rdmsr_safe(index).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::phys::VecMem;
    use crate::mm::{FramePool, Span};
    use proptest::prelude::*;

    const COPY: Hpa = Hpa::new(0x4000);
    const OWN: Span = Span::new(0x4000, 0x8000);

    /// The entries of L2 at `at`, copied.
    fn copied(at: u64, entries: &[(u64, u64)], count: u64) -> Vec<(u64, u64)> {
        let memory = VecMem::new(0x8000);
        for (i, (index, value)) in entries.iter().enumerate() {
            memory.write_u64(Hpa::new(at + 16 * i as u64), *index);
            memory.write_u64(Hpa::new(at + 16 * i as u64 + 8), *value);
        }
        let guest = GuestMemory::new(&memory, OWN, 36);
        let copy = FramePool::new(Span::sized(COPY.get(), 2 * PAGE_SIZE)).alloc_run(&memory, AREA_FRAMES).unwrap();
        copy_area(&memory, &guest, Gpa::new(at), count, &copy);
        let word = |at| memory.read_u64(Hpa::new(COPY.get() + at));
        (0..count).map(|i| (word(16 * i), word(16 * i + 8))).collect()
    }

    proptest! {
        #[test]
        fn entries_are_copied_unless_the_processor_may_not_load_them(
            entries in prop::collection::vec(
                (
                    prop_oneof![0u64..0x2000, Just(0x1B), 0xC000_0000u64..0xC000_2000, 0x47Eu64..0x496, any::<u64>()],
                    prop_oneof![0u64..0x1_0000, any::<u64>()],
                ),
                0..64,
            ),
        ) {
            let guest = GuestMemory::new((), OWN, 36);
            let expected: Vec<_> = entries
                .iter()
                .map(|&(index, value)| match u32::try_from(index) {
                    Ok(index) if !msrs::may_load(index, value, &guest) => (REFUSED, value),
                    _ => (index, value),
                })
                .collect();
            prop_assert_eq!(copied(0x1000, &entries, entries.len() as u64), expected);
        }
    }

    #[test]
    fn an_area_that_runs_into_nvmx_s_memory_or_past_the_last_address_is_refused_there() {
        let ok = (0x174, 5);
        assert_eq!(copied(OWN.start() - 16, &[ok], 2), [ok, (REFUSED, 0)]);
        assert_eq!(copied(u64::MAX - 15, &[], 2), [(REFUSED, 0), (REFUSED, 0)]);
    }

    #[test]
    fn the_processor_refuses_what_stands_for_a_refused_entry() {
        // Bits 63:32 of an entry's first word are reserved (SDM table "Format of an MSR Entry").
        assert_ne!(REFUSED >> 32, 0);
    }

    #[test]
    fn of_a_list_that_failed_the_last_value_before_the_failure_counts() {
        let memory = VecMem::new(0x8000);
        for (i, (msr, value)) in [(0x277u64, 1u64), (0x174, 2), (0x277, 3), (0x277, 4), (0x277, 5)].iter().enumerate() {
            memory.write_u64(Hpa::new(COPY.get() + 16 * i as u64), *msr);
            memory.write_u64(Hpa::new(COPY.get() + 16 * i as u64 + 8), *value);
        }
        for (failed, expected) in [(0, None), (1, None), (2, Some(1)), (3, Some(1)), (4, Some(3)), (5, Some(4))] {
            assert_eq!(loaded(&memory, COPY, failed, 0x277), expected, "failed at {failed}");
        }
        assert_eq!(loaded(&memory, COPY, 5, 0x175), None);
    }

    #[test]
    fn an_msr_that_nvmx_answers_is_stored_with_its_answer() {
        let mut vmcs02 = Vmcs02::default();
        vmcs02.0.insert(Field::GUEST_IA32_PAT, 0x77);
        let own = |index| (index != 0x491).then_some(u64::from(index) + 1);
        let mut read = |index| read_of_nested(&mut vmcs02, &own, index);
        assert_eq!([0x3A, 0x480, 0x491, 0x277].map(&mut read), [Some(0x3B), Some(0x481), None, Some(0x77)]);
        assert_eq!([0x800, 0x8FF, 0x9E].map(read), [None; 3]);
    }

    #[derive(Default)]
    struct Vmcs02(std::collections::HashMap<Field, u64>);

    impl FieldAccess for Vmcs02 {
        fn read(&mut self, field: Field) -> u64 {
            self.0[&field]
        }
        fn write(&mut self, field: Field, value: u64) {
            self.0.insert(field, value);
        }
    }

    #[test]
    fn the_frames_hold_the_longest_area() {
        assert_eq!(AREA_FRAMES as u64 * PAGE_SIZE, MAX_ENTRIES * 16);
    }
}
