//! One active vmcs12: nvmx's copy, its vmcs02, and moving between the two.

use super::inherit::Inherited;
use super::merge::Vmcs02Controls;
use super::msr_lists::MsrLists;
use super::vmcs12::{FieldSet, Vmcs12};
use crate::addr::{Gpa, Hpa};
use crate::ept::{Activation, Watch};
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Invalidate, Vmx};
use crate::mm::PhysMem;
use crate::vcpu::Config;
use crate::vmx::Field;
use crate::vmx::field::Home;
use l2_protocol::abi::Strategy;

/// Bit 31 of the first word of a VMCS region: the shadow-VMCS indicator (SDM table "Format of the VMCS Region").
const SHADOW_INDICATOR: u32 = 1 << 31;

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
    /// Address of the vmcs12 that holds this slot; free if none.
    pub vmptr: Option<Gpa>,
    /// nvmx's copy.
    pub vmcs12: Vmcs12,
    /// The VMCS that runs L3.
    vmcs02: Hpa,
    form: Form,
    /// L2 wrote a field that the checks or the merge depend on.
    pub stale: bool,
    /// The merged controls are not in vmcs02 yet.
    pub unwritten: bool,
    /// The controls that vmcs02 runs with.
    pub merged: Option<Vmcs02Controls>,
    /// L2 wrote a field of the guest state that the processor does not check for it.
    pub guest_stale: bool,
    /// EPTP in vmcs02.
    pub eptp02: u64,
    /// VPID in vmcs02.
    pub vpid02: u16,
    /// The OR of nvmx's and L2's MSR bitmaps: a frame of nvmx.
    pub msr_bitmap: Hpa,
    /// Tells when L2 writes to its own MSR bitmap.
    pub bitmap_watch: Option<Watch>,
    /// nvmx's copies of the MSR areas.
    pub msr_lists: MsrLists,
    /// State that L3 and L2 share because vmcs12 asks for neither load nor save.
    pub inherited: Inherited,
    /// Order of use.
    pub used: u64,
}

impl Slot {
    /// A free slot on three kinds of frames of its own.
    pub fn new(vmcs02: Hpa, msr_bitmap: Hpa, msr_lists: MsrLists) -> Self {
        Slot {
            vmptr: None,
            vmcs12: Vmcs12::new(),
            vmcs02,
            form: Form::Ordinary { launched: false },
            stale: true,
            unwritten: true,
            merged: None,
            guest_stale: true,
            eptp02: 0,
            vpid02: 0,
            msr_bitmap,
            bitmap_watch: None,
            msr_lists,
            inherited: Inherited::default(),
            used: 0,
        }
    }

    /// The region of vmcs02; under the zero-copy strategy vmcs01 links to it.
    pub fn vmcs02(&self) -> Hpa {
        self.vmcs02
    }

    /// Makes vmcs02 the current VMCS.
    #[inline(always)]
    pub fn load_vmcs02(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
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
    pub fn become_shadow_in_memory(&mut self, phys: &DirectMap, revision: u32) {
        if let Form::Ordinary { launched } = self.form {
            phys.write_u64(self.vmcs02, (revision | SHADOW_INDICATOR) as u64);
            self.form = Form::ShadowInMemory { launched };
        }
    }

    /// vmcs02, which is current, becomes the shadow VMCS that L2's VMREAD and VMWRITE reach.
    #[inline(always)]
    pub fn become_shadow(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
        vmx.clear(self.vmcs02);
        phys.write_u64(self.vmcs02, (revision | SHADOW_INDICATOR) as u64);
        self.form = Form::Shadow;
    }

    /// Goes back from vmcs02 to vmcs01; what L2 may reach by VMCS shadowing becomes reachable again.
    pub fn leave_vmcs02(&mut self, vmx: &mut Vmx, phys: &DirectMap, config: &Config, vmcs01: Hpa) {
        let revision = config.hardware.basic.revision();
        let shadow = config.strategy == Strategy::ZeroCopy;
        if shadow && config.layout.is_none() {
            self.become_shadow(vmx, phys, revision);
        }
        vmx.ptrld(vmcs01);
        if shadow && config.layout.is_some() {
            self.become_shadow_in_memory(phys, revision);
        }
    }

    /// vmcs02, which is current, runs on this ept02.
    #[inline(always)]
    pub fn run_on(&mut self, vmx: &mut Vmx, ept02: Activation) {
        if self.eptp02 != ept02.eptp02.get() {
            self.eptp02 = ept02.eptp02.get();
            vmx.write(Field::EPT_POINTER, self.eptp02);
        }
        if ept02.invept {
            vmx.invept(Invalidate::Single, self.eptp02);
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

    /// Writes L2's pending values to vmcs02, which is current.
    #[inline(always)]
    pub fn flush_dirty(&mut self, vmx: &mut Vmx, strategy: Strategy, exists: &FieldSet) {
        if !self.vmcs12.dirty.is_empty() {
            self.write_dirty(vmx, strategy, exists);
        }
    }

    fn write_dirty(&mut self, vmx: &mut Vmx, strategy: Strategy, exists: &FieldSet) {
        // Without shadowing exit information stays in the copy: not every processor can VMWRITE it.
        let wanted = |f: &Field| exists.contains(*f) && (strategy == Strategy::ZeroCopy || !f.is_read_only());
        for field in self.vmcs12.dirty.iter().filter(wanted) {
            vmx.write(field, self.vmcs12.get(field));
        }
        self.vmcs12.dirty = FieldSet::EMPTY;
        if strategy == Strategy::ZeroCopy {
            self.vmcs12.valid = FieldSet::CACHED;
        }
    }

    /// Fetches every field that only vmcs02 has, which is current.
    pub fn fetch_all(&mut self, vmx: &mut Vmx, exists: &FieldSet) {
        for field in Field::ALL.iter().copied().filter(|f| f.home() != Home::Cache && exists.contains(*f)) {
            if !self.vmcs12.valid.contains(field) {
                let value = vmx.read(field);
                self.vmcs12.fetched(field, value);
            }
        }
    }

    /// Frees the slot; the copy must have been stored before.
    pub fn release(&mut self, vmx: &mut Vmx) {
        vmx.clear(self.vmcs02);
        self.form = Form::Ordinary { launched: false };
        self.vmptr = None;
        self.vmcs12 = Vmcs12::new();
        self.bitmap_watch = None;
        self.merged = None;
        self.inherited.forget();
        self.stale = true;
        self.unwritten = true;
        self.guest_stale = true;
    }
}
