//! One active vmcs12: nvmx's copy, its vmcs02, and moving between the two.

use crate::addr::{Gpa, Hpa};
use crate::ept::{Activation, Eptp, Watch};
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Invalidate, Vmx};
use crate::mm::PhysMem;
use crate::rules::checks::host_field_holds;
use crate::rules::merge::{Duties, Vmcs02Controls};
use crate::vmcs::inherit::Inherited;
use crate::vmcs::msr_lists::MsrLists;
use crate::vmcs::stale::Stale;
use crate::vmcs::timer::Timer;
use crate::vmcs::vmcs12::{FieldSet, Vmcs12};
use crate::vmx::controls::{PrimaryControls, SecondaryControls};
use crate::vmx::field::PDPTES;
use crate::vmx::region::{NO_LINK, SHADOW_INDICATOR};
use crate::vmx::{Capabilities, Field};

/// What vmcs02 is at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// An ordinary VMCS; launched since its last VMCLEAR?
    Ordinary {
        /// VMRESUME instead of VMLAUNCH.
        launched: bool,
    },
    /// A shadow VMCS, linked from vmcs01 while its vmcs12 is current.
    Shadow,
    /// The same, under a hypervisor that keeps it in memory: it was not cleared to become one, so its launch state lasts.
    ShadowInMemory {
        /// VMRESUME instead of VMLAUNCH.
        launched: bool,
    },
}

/// A slot.
pub struct Slot {
    /// Address of the vmcs12 that this slot is for; free if none.
    pub vmptr: Option<Gpa>,
    /// VMPTRLD made the vmcs12 active, and no VMCLEAR inactive. An inactive one is in L2's memory, and stays here as well:
    /// the next VMPTRLD finds it good if that memory has not changed.
    pub active: bool,
    /// The region says that it is a shadow VMCS.
    pub shadow12: bool,
    /// nvmx's copy.
    pub vmcs12: Vmcs12,
    /// The VMCS that runs L3.
    vmcs02: Hpa,
    form: Form,
    /// What must be checked or merged again because L2 wrote a field.
    pub stale: Stale,
    /// The controls that vmcs02 is to run with.
    pub merged: Option<Vmcs02Controls>,
    /// Those that are in vmcs02.
    pub written: Option<Vmcs02Controls>,
    /// `merged` is not in vmcs02 yet.
    pub unwritten: bool,
    /// ept12 is under mode-based execute control.
    pub mode_based: bool,
    /// VMREAD and VMWRITE bitmap for vmcs02, merged: frames of nvmx, all ones but where nvmx opens fields.
    pub shadow_bitmaps: (Hpa, Hpa),
    /// The slot of the shadow VMCS that L3 reaches.
    pub linked: Option<usize>,
    /// What vmcs02 is to link to.
    pub link_to: u64,
    /// The link pointer in vmcs02.
    pub link02: u64,
    /// EPTP in vmcs02.
    pub eptp02: u64,
    /// VPID in vmcs02.
    pub vpid02: u16,
    /// The preemption timer, which goes on over exits that L2 does not see.
    pub timer: Timer,
    /// L2's PDPTEs, where the last entry wrote others to vmcs02.
    pub pdptes12: Option<[u64; 4]>,
    /// The OR of nvmx's and L2's MSR bitmaps: a frame of nvmx.
    pub msr_bitmap: Hpa,
    /// Address of L2's MSR bitmap, if it uses one.
    pub bitmap12: Option<u64>,
    /// Tells when L2 writes to it.
    pub bitmap_watch: Option<Watch>,
    /// nvmx's copies of the MSR areas.
    pub msr_lists: MsrLists,
    /// State that L3 and L2 share because vmcs12 asks for neither load nor save.
    pub inherited: Inherited,
    /// Order of use.
    pub used: u64,
}

impl Slot {
    /// A free slot on frames of its own.
    pub fn new(vmcs02: Hpa, msr_bitmap: Hpa, shadow_bitmaps: (Hpa, Hpa), msr_lists: MsrLists) -> Self {
        Slot {
            vmptr: None,
            active: false,
            shadow12: false,
            vmcs12: Vmcs12::new(),
            vmcs02,
            form: Form::Ordinary { launched: false },
            stale: Stale::all(),
            merged: None,
            written: None,
            unwritten: true,
            mode_based: false,
            shadow_bitmaps,
            linked: None,
            link_to: NO_LINK,
            link02: NO_LINK,
            eptp02: 0,
            vpid02: 0,
            timer: Timer::default(),
            pdptes12: None,
            msr_bitmap,
            bitmap12: None,
            bitmap_watch: None,
            msr_lists,
            inherited: Inherited::default(),
            used: 0,
        }
    }

    /// Every frame that the slot owns besides the one that it lies in.
    pub fn frames(&self) -> impl Iterator<Item = Hpa> {
        let (read, write) = self.shadow_bitmaps;
        [self.vmcs02, self.msr_bitmap, read, write].into_iter().chain(self.msr_lists.frames())
    }

    /// The region of vmcs02; under the zero-copy strategy vmcs01 links to it.
    pub fn vmcs02(&self) -> Hpa {
        self.vmcs02
    }

    /// Makes vmcs02 the current VMCS.
    #[inline(always)]
    pub(super) fn load_vmcs02(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
        if self.form == Form::Shadow {
            // The processor may hold parts of a linked shadow VMCS: VMCLEAR brings them to memory before the indicator
            // changes (SDM vol. 3C, "Shadow VMCSs": software should execute VMCLEAR before it modifies the indicator).
            vmx.clear(self.vmcs02);
            phys.write_u64(self.vmcs02, revision as u64);
            self.form = Form::Ordinary { launched: false };
        }
        if let Form::ShadowInMemory { launched } = self.form {
            phys.write_u64(self.vmcs02, revision as u64);
            self.form = Form::Ordinary { launched };
        }
        vmx.ptrld(self.vmcs02);
    }

    /// vmcs02 becomes the shadow VMCS by a write to memory: it is not current, so the hypervisor below has it there.
    #[inline(always)]
    pub(super) fn become_shadow_in_memory(&mut self, phys: &DirectMap, revision: u32) {
        if let Form::Ordinary { launched } = self.form {
            phys.write_u64(self.vmcs02, (revision | SHADOW_INDICATOR) as u64);
            self.form = Form::ShadowInMemory { launched };
        }
    }

    /// vmcs02, which is current, becomes the shadow VMCS that L2's VMREAD and VMWRITE reach.
    #[inline(always)]
    pub(super) fn become_shadow(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
        vmx.clear(self.vmcs02);
        phys.write_u64(self.vmcs02, (revision | SHADOW_INDICATOR) as u64);
        self.form = Form::Shadow;
    }

    /// L2's EPTP as the role of an ept02.
    #[inline(always)]
    pub fn eptp12(&self) -> Eptp {
        Eptp::new(self.vmcs12.get(Field::EPT_POINTER)).with_mode_based(self.mode_based)
    }

    /// vmcs02, which is current, runs on this ept02.
    #[inline(always)]
    pub fn run_on(&mut self, vmx: &mut Vmx, ept02: Activation, ept01: Eptp) {
        if self.eptp02 != ept02.eptp02.get() {
            self.eptp02 = ept02.eptp02.get();
            vmx.write(Field::EPT_POINTER, self.eptp02);
        }
        if ept02.invept {
            vmx.invept(Invalidate::Single, self.eptp02);
        }
        if ept02.invept01 {
            vmx.invept(Invalidate::Single, ept01.get());
        }
    }

    /// L2 has changed a field of the copy. True if nothing has to be judged or merged again for it.
    pub fn stays_good(&mut self, field: Field, old: u64, new: u64, offered: &Capabilities) -> bool {
        if field != Field::CPU_BASED_VM_EXEC_CONTROL {
            return host_field_holds(field, new, offered);
        }
        let primary = |value| PrimaryControls::from_bits_retain(value as u32);
        let follows = |merged: &mut Vmcs02Controls| merged.follow(primary(old), primary(new), offered);
        let good = !self.stale.contains(Stale::CONTROLS) && self.merged.as_mut().is_some_and(follows);
        self.unwritten |= good;
        good
    }

    /// vmcs02 has controls besides the merged ones: the next entry writes all of them.
    pub fn write_controls_anew(&mut self) {
        self.written = None;
        self.unwritten = true;
    }

    /// Writes to vmcs02, which is current, what the merge has changed.
    #[cold]
    pub fn write_controls(&mut self, vmx: &mut Vmx) {
        let Some(new) = self.merged else { return };
        let old = self.written.replace(new);
        self.unwritten = false;
        // An interrupt window comes or goes: nothing else is as frequent.
        if old.is_some_and(|old| Vmcs02Controls { primary: new.primary, entry: new.entry, ..old } == new) {
            vmx.write(Field::CPU_BASED_VM_EXEC_CONTROL, new.primary.bits().into());
            vmx.write(Field::VM_ENTRY_CONTROLS, new.entry.bits().into());
            return;
        }
        let values = |c: &Vmcs02Controls| {
            let (a, b) = c.io_bitmaps.map_or((None, None), |(a, b)| (Some(a.get()), Some(b.get())));
            let (read, write) = c.shadow_bitmaps.map_or((None, None), |(r, w)| (Some(r.get()), Some(w.get())));
            let tertiary = c.primary.contains(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS);
            let with = |control, value| c.secondary.contains(control).then_some(value);
            [
                (Field::PIN_BASED_VM_EXEC_CONTROL, Some(c.pin.bits().into())),
                (Field::CPU_BASED_VM_EXEC_CONTROL, Some(c.primary.bits().into())),
                (Field::SECONDARY_VM_EXEC_CONTROL, Some(c.secondary.bits().into())),
                (Field::TERTIARY_VM_EXEC_CONTROL, tertiary.then_some(c.tertiary)),
                (Field::VM_EXIT_CONTROLS, Some(c.exit.bits().into())),
                (Field::VM_ENTRY_CONTROLS, Some(c.entry.bits().into())),
                (Field::IO_BITMAP_A, a),
                (Field::IO_BITMAP_B, b),
                (Field::MSR_BITMAP, c.msr_bitmap.map(Hpa::get)),
                (Field::VIRTUAL_APIC_ADDRESS, c.virtual_apic.map(Hpa::get)),
                (Field::APIC_ACCESS_ADDRESS, c.apic_access.map(Hpa::get)),
                (Field::POSTED_INTR_DESC_ADDR, c.posted_descriptor.map(Hpa::get)),
                (Field::VMREAD_BITMAP, read),
                (Field::VMWRITE_BITMAP, write),
                (Field::XSS_EXITING_BITMAP, with(SecondaryControls::ENABLE_XSAVES, c.xss_exiting_bitmap)),
                (Field::PLE_GAP, with(SecondaryControls::PAUSE_LOOP_EXITING, c.ple_gap.into())),
                (Field::PLE_WINDOW, with(SecondaryControls::PAUSE_LOOP_EXITING, c.ple_window.into())),
            ]
        };
        let old = old.as_ref().map(values);
        for (i, (field, value)) in values(&new).into_iter().enumerate() {
            // The processor changes the entry controls at exits, with the mode of an unrestricted guest.
            let known = field != Field::VM_ENTRY_CONTROLS && old.is_some_and(|old| old.get(i) == Some(&(field, value)));
            if let (Some(value), false) = (value, known) {
                vmx.write(field, value);
            }
        }
    }

    /// An entry failed, which leaves the guest-state area alone; vmcs02 is current.
    #[cold]
    pub fn give_pdptes_back(&mut self, vmx: &mut Vmx) {
        let loaded = self.merged.as_ref().is_some_and(|merged| merged.duties.contains(Duties::LOAD_PDPTES));
        if let Some(values) = self.pdptes12.take().filter(|_| loaded) {
            PDPTES.into_iter().zip(values).for_each(|(field, value)| vmx.write(field, value));
        }
    }

    /// Must the next entry be a VMLAUNCH? vmcs02 is current.
    #[inline(always)]
    pub fn needs_launch(&self) -> bool {
        self.form != Form::Ordinary { launched: true }
    }

    /// vmcs02 entered: VMRESUME from now on.
    #[inline(always)]
    pub fn mark_launched(&mut self) {
        self.form = Form::Ordinary { launched: true };
    }

    /// Writes L2's pending values to vmcs02, which is current, for fields that it is `wanted` of.
    pub(super) fn write_dirty(&mut self, vmx: &mut Vmx, wanted: impl Fn(Field) -> bool) {
        for field in self.vmcs12.dirty.iter().filter(|field| wanted(*field)) {
            vmx.write(field, self.vmcs12.get(field));
        }
        self.vmcs12.dirty = FieldSet::EMPTY;
    }

    /// Fetches every field that only vmcs02 has, which is current.
    pub(super) fn fetch_all(&mut self, vmx: &mut Vmx, exists: &FieldSet) {
        let missing = exists.without(&self.vmcs12.valid);
        self.vmcs12.fetch(missing, |field| vmx.read(field));
    }

    /// vmcs02, which is not current, takes the form in which vmcs01 and other vmcs02s may link to it.
    pub(super) fn rest(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
        if self.form != Form::Shadow {
            self.become_shadow(vmx, phys, revision);
        }
    }

    /// Forgets the vmcs12; the copy must have been stored before if it is wanted. What is in vmcs02 stays.
    pub fn release(&mut self) {
        self.vmptr = None;
        self.active = false;
        self.vmcs12 = Vmcs12::new();
        self.bitmap12 = None;
        self.bitmap_watch = None;
        self.stale = Stale::all();
        self.merged = None;
        self.linked = None;
        self.link_to = NO_LINK;
        self.inherited.forget();
    }
}
