//! One active vmcs12: nvmx's copy, its vmcs02, and what was made of the one for the other.

use crate::addr::{Gpa, Ngpa};
use crate::ept::{Eptp, Qualification};
use crate::hw::vmx::Vmx;
use crate::mm::{Frame, FramePool};
use crate::rules::checks::host_field_holds;
use crate::rules::merge::{Duties, Vmcs02Controls};
use crate::vmcs::inherit::Inherited;
use crate::vmcs::lending::Lending;
use crate::vmcs::msr_bitmap::MsrBitmap02;
use crate::vmcs::msr_lists::MsrLists;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::tracked::{Version, is_host_field};
use crate::vmcs::vmcs02::Vmcs02;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::controls::{PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::{Capabilities, Field};
use bitflags::bitflags;

/// What the revision identifier of a VMCS says that it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmcsKind {
    /// It can be entered.
    Ordinary,
    /// It is reached by the VMREAD and VMWRITE of a guest.
    Shadow,
}

bitflags! {
    /// What entries and exits of a vmcs12 do, as far as its controls tell beforehand. Nothing: it must be asked each time.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Usual: u8 {
        /// What all do.
        const ALL = 1 << 0;
        /// The preemption timer of L3 starts and stops with them.
        const TIMER = 1 << 1;
        /// State that vmcs12 does not load or does not save is carried between L2 and L3.
        const CARRIES = 1 << 2;
        /// What not all do.
        const MORE = Self::TIMER.bits() | Self::CARRIES.bits();
    }
}

/// A slot.
pub struct Slot {
    /// Address of the vmcs12 that this slot is for; free if none.
    pub vmptr: Option<Gpa>,
    /// Loaded by VMPTRLD and not yet cleared. A vmcs12 that is not active is in L2's memory, and stays here as well: the next
    /// VMPTRLD finds it good if that memory has not changed.
    pub active: bool,
    /// What the region says that it is.
    pub kind: VmcsKind,
    /// nvmx's copy.
    pub vmcs12: Vmcs12,
    /// The VMCS that runs L3.
    pub vmcs02: Vmcs02,
    /// What L2 is lent of the host-state area whenever vmcs02 is a shadow VMCS: the copy has it only while it is an ordinary one.
    pub loan: Lending,
    /// What must be checked, merged or written again because L2 wrote a field.
    pub stale: Stale,
    /// The controls that vmcs02 is to run with.
    pub merged: Option<Vmcs02Controls>,
    /// The MSR bitmap of vmcs02.
    pub msr_bitmap: MsrBitmap02,
    /// VMREAD and VMWRITE bitmap for vmcs02, merged: frames of nvmx, all ones but where nvmx opens fields.
    pub shadow_bitmaps: [Frame; 2],
    /// The slot of the shadow VMCS that L3 reaches.
    pub linked: Option<SlotId>,
    /// nvmx's copies of the MSR areas.
    pub msr_lists: MsrLists,
    /// State that L3 and L2 share because vmcs12 asks for neither load nor save.
    pub inherited: Inherited,
    /// The violation of L3 that L2 saw since the last entry: where, and by what access.
    pub violated: Option<(Ngpa, Qualification)>,
    /// What its entries and exits do: settled by each entry that finds [`Stale::WAY`].
    pub usual: Usual,
    /// L2's MSRs are those of vmcs12's host-state area as long as they have this version.
    pub host_msrs: Version,
    /// As long as the slot is not stale and nothing has changed since, entries are usual, and vmcs02 has the EPTP and the VPID for them.
    pub settled: Version,
    /// Order of use.
    pub used: u64,
}

impl Slot {
    /// A free slot on frames of its own.
    pub fn new(vmcs02: Vmcs02, msr_bitmap: MsrBitmap02, shadow_bitmaps: [Frame; 2], msr_lists: MsrLists) -> Self {
        Slot {
            vmptr: None,
            active: false,
            kind: VmcsKind::Ordinary,
            vmcs12: Vmcs12::new(),
            vmcs02,
            loan: Lending::NOTHING,
            stale: Stale::all(),
            merged: None,
            msr_bitmap,
            shadow_bitmaps,
            linked: None,
            msr_lists,
            inherited: Inherited::default(),
            violated: None,
            usual: Usual::empty(),
            host_msrs: Version::NONE,
            settled: Version::NONE,
            used: 0,
        }
    }

    /// Ends, and gives every frame back that it owns besides the one that it lies in.
    pub fn give_back(self, frames: &mut FramePool) {
        let single = [self.vmcs02.into_frame(), self.msr_bitmap.into_frame()].into_iter().chain(self.shadow_bitmaps);
        single.chain(self.msr_lists.into_frames()).for_each(|frame| frames.free(frame));
    }

    /// L2's pin-based controls.
    #[inline(always)]
    pub fn pin12(&self) -> PinControls {
        PinControls::from_bits_retain(self.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32)
    }

    /// This is left to do around an entry.
    #[inline(always)]
    pub fn has_duty(&self, duty: Duties) -> bool {
        self.merged.as_ref().is_some_and(|merged| merged.duties.contains(duty))
    }

    /// L2's EPTP as the role of an ept02.
    #[inline(always)]
    pub fn eptp12(&self) -> Eptp {
        let secondary = self.merged.as_ref().map_or(SecondaryControls::empty(), |merged| merged.secondary);
        Eptp::new(self.vmcs12.get(Field::EPT_POINTER)).under(secondary)
    }

    /// L2 writes a field of the copy.
    #[inline(always)]
    pub fn write_copy(&mut self, field: Field, value: u64, offered: &Capabilities) {
        let (old, value) = (self.vmcs12.get(field), value & field.mask());
        if old != value {
            self.vmcs12.set(field, value);
            if !self.stays_good(field, old, value, offered) {
                self.stale |= Stale::of(field);
            }
        }
    }

    /// L2 has changed a field of the copy. True if nothing has to be judged or merged again for it.
    fn stays_good(&mut self, field: Field, old: u64, new: u64, offered: &Capabilities) -> bool {
        if is_host_field(field) {
            self.host_msrs = Version::NONE;
            self.settled = Version::NONE;
        }
        if field != Field::CPU_BASED_VM_EXEC_CONTROL {
            return host_field_holds(field, new, offered);
        }
        let primary = |value| PrimaryControls::from_bits_retain(value as u32);
        let follows = |merged: &mut Vmcs02Controls| merged.follow(primary(old), primary(new), offered);
        let good = !self.stale.contains(Stale::CONTROLS) && self.merged.as_mut().is_some_and(follows);
        if good {
            self.stale |= Stale::WINDOWS;
        }
        good
    }

    /// Writes to vmcs02, which is current, what the merge has changed.
    #[cold]
    pub fn write_controls(&mut self, vmx: &mut Vmx) {
        let Some(merged) = &self.merged else { return };
        self.vmcs02.write_controls(vmx, merged, self.stale);
        self.stale -= Stale::TO_WRITE;
    }

    /// VMCLEAR: the launch state is clear.
    pub fn clear_launch_state(&mut self) {
        self.vmcs12.exits = 0;
        self.settled = Version::NONE;
    }

    /// Forgets the vmcs12; the copy must have been stored before if it is wanted. What is in vmcs02 stays.
    pub fn release(&mut self) {
        self.vmptr = None;
        self.active = false;
        self.vmcs12 = Vmcs12::new();
        self.loan = Lending::NOTHING;
        self.violated = None;
        self.usual = Usual::empty();
        self.host_msrs = Version::NONE;
        self.settled = Version::NONE;
        self.msr_bitmap.forget();
        self.stale = Stale::all();
        self.merged = None;
        self.linked = None;
        self.inherited.forget();
    }
}
