//! vmcs02, the VMCS that runs L3: its region, the form it is in, and what nvmx keeps in it.
//!
//! Guest state, exit information and some controls in it are L2's, reached as the field-access strategy says. The fields
//! here are nvmx's alone: L2's VMREAD and VMWRITE of them go to nvmx's copy of vmcs12, but for what L2 is lent while vmcs02 is a shadow
//! VMCS.

use crate::addr::Hpa;
use crate::ept::{Activation, Eptp, SubPages};
use crate::hw::host_area::{self, Lent, LentInMemory, Places};
use crate::hw::phys::DirectMap;
use crate::hw::vmenter::GuestRegs;
use crate::hw::vmx::{Invalidate, Region, Vmx};
use crate::mm::Frame;
use crate::rules::merge::Vmcs02Controls;
use crate::vmcs::kept::Kept;
use crate::vmcs::stale::Stale;
use crate::vmcs::timer::Timer;
use crate::vmx::controls::{PinControls, PrimaryControls};
use crate::vmx::field::PDPTES;
use crate::vmx::lent::{self, IN_MEMORY, LentValues, Returned};
use crate::vmx::region::{NO_LINK, SHADOW_INDICATOR};
use crate::vmx::{Field, FieldAccess};
use core::mem;

/// What vmcs02 is at the moment.
#[derive(Debug)]
enum Form {
    /// An ordinary VMCS; launched since its last VMCLEAR?
    Ordinary {
        /// VMRESUME instead of VMLAUNCH.
        launched: bool,
    },
    /// A shadow VMCS, linked from vmcs01 while its vmcs12 is current.
    Shadow,
    /// The same, with the stack pointer of the host-state area lent to L2.
    LentStack(Lent<1>),
    /// The same, with all that belongs to a thread.
    LentThread(Lent<{ lent::COUNT }>),
    /// The same, under a hypervisor that keeps it in memory, with all that is ever lent: it was not cleared to become one, so its launch
    /// state lasts.
    LentInMemory {
        /// L2's values in it.
        lent: LentInMemory,
        /// VMRESUME instead of VMLAUNCH.
        launched: bool,
    },
}

/// The VMCS that runs L3.
pub struct Vmcs02 {
    frame: Frame,
    region: Region,
    form: Form,
    eptp: Kept,
    vpid: Kept,
    spptp: Kept,
    /// The link pointer.
    pub link: Kept,
    /// L3's IA32_PAT. L3's own writes exit.
    pub pat: Kept,
    msr_load_address: Kept,
    msr_load_count: Kept,
    pin: Kept,
    primary: Kept,
    entry: Kept,
    /// The other controls, in the order of [`Vmcs02Controls::OTHERS`].
    others: [Kept; Vmcs02Controls::OTHERS.len()],
    /// The preemption timer, which goes on over exits that L2 does not see.
    pub timer: Timer,
    /// L2's PDPTEs, where the last entry wrote others.
    pub pdptes12: Option<[u64; 4]>,
}

impl Vmcs02 {
    /// In a frame of its own.
    pub fn new(frame: Frame, phys: &DirectMap, revision: u32) -> Self {
        Vmcs02 {
            region: Region::new(&frame, phys, revision),
            frame,
            form: Form::Ordinary { launched: false },
            eptp: Kept::new(Field::EPT_POINTER),
            vpid: Kept::new(Field::VIRTUAL_PROCESSOR_ID),
            spptp: Kept::new(Field::SUB_PAGE_PERMISSION_TABLE_POINTER),
            link: Kept::new(Field::VMCS_LINK_POINTER),
            pat: Kept::new(Field::GUEST_IA32_PAT),
            msr_load_address: Kept::new(Field::VM_ENTRY_MSR_LOAD_ADDR),
            msr_load_count: Kept::new(Field::VM_ENTRY_MSR_LOAD_COUNT),
            pin: Kept::new(Field::PIN_BASED_VM_EXEC_CONTROL),
            primary: Kept::new(Field::CPU_BASED_VM_EXEC_CONTROL),
            entry: Kept::new(Field::VM_ENTRY_CONTROLS),
            others: Vmcs02Controls::OTHERS.map(Kept::new),
            timer: Timer::default(),
            pdptes12: None,
        }
    }

    /// Writes what is the same in every vmcs02, of the fields that the processor `has`; it is clear afterwards, and no VMCS is current.
    pub fn set_up(&mut self, vmx: &mut Vmx, regs: &mut GuestRegs, has: impl Fn(Field) -> bool) {
        vmx.clear(self.region);
        vmx.ptrld(self.region);
        host_area::write(vmx, regs);
        vmx.write(Field::VM_EXIT_MSR_STORE_COUNT, 0);
        vmx.write(Field::VM_EXIT_MSR_LOAD_COUNT, 0);
        self.msr_load_count.put(vmx, 0);
        self.link.put(vmx, NO_LINK);
        // VM functions are nvmx's to emulate (`nested::vmfunc`).
        if has(Field::VM_FUNCTION_CONTROLS) {
            vmx.write(Field::VM_FUNCTION_CONTROLS, 0);
        }
        vmx.clear(self.region);
    }

    /// The frame, which is free again. It is clear, and nobody keeps its region.
    pub fn into_frame(self) -> Frame {
        self.frame
    }

    /// Its region; under the zero-copy strategy vmcs01 links to it.
    #[inline(always)]
    pub fn region(&self) -> Region {
        self.region
    }

    /// Makes it the current VMCS, and an ordinary one. Answers with what L2 left where it was lent something.
    #[inline(always)]
    pub(super) fn load(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) -> Returned {
        // The processor may hold parts of a linked shadow VMCS: VMCLEAR brings them to memory before the indicator
        // changes (SDM vol. 3C, "Shadow VMCSs": software should execute VMCLEAR before it modifies the indicator).
        if matches!(self.form, Form::Shadow) {
            self.form = Form::Ordinary { launched: false };
            vmx.exchange(phys, &self.region, revision, &self.region);
            return Returned::Nothing;
        }
        self.load_other(vmx, phys, revision)
    }

    /// The same, from the other forms.
    #[inline(never)]
    fn load_other(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) -> Returned {
        let launched = match mem::replace(&mut self.form, Form::Ordinary { launched: false }) {
            Form::LentStack(lent) => return Returned::Stack(lent.take_back(vmx, phys, revision)),
            Form::LentThread(lent) => return Returned::Thread(lent.take_back(vmx, phys, revision)),
            Form::LentInMemory { lent, launched } => {
                self.form = Form::Ordinary { launched };
                let values = lent.take_back(vmx, phys, self.region, revision);
                vmx.ptrld(self.region);
                return Returned::All(values);
            }
            Form::Shadow => false,
            Form::Ordinary { launched } => launched,
        };
        self.form = Form::Ordinary { launched };
        vmx.ptrld(self.region);
        Returned::Nothing
    }

    /// An ordinary VMCS in memory again, if it is lent from: L2's values.
    pub(super) fn take_back_in_memory(&mut self, vmx: &Vmx, phys: &DirectMap, revision: u32) -> Returned {
        let Form::LentInMemory { launched, .. } = self.form else { return Returned::Nothing };
        match mem::replace(&mut self.form, Form::Ordinary { launched }) {
            Form::LentInMemory { lent, .. } => Returned::All(lent.take_back(vmx, phys, self.region, revision)),
            _ => Returned::Nothing,
        }
    }

    /// What L2 has at the moment where it is lent something in memory, which goes on.
    pub(super) fn lent_in_memory(&self, phys: &DirectMap) -> Returned {
        match &self.form {
            Form::LentInMemory { lent, .. } => Returned::All(lent.values(phys, self.region)),
            _ => Returned::Nothing,
        }
    }

    /// An ordinary VMCS, it becomes the shadow VMCS by writes to memory: it is not current, so the hypervisor below has it there. Fields in
    /// these places are L2's from now on, with these values.
    #[inline(always)]
    pub(super) fn become_shadow_in_memory(
        &mut self,
        phys: &DirectMap,
        revision: u32,
        places: Places,
        values: [u64; IN_MEMORY.len()],
    ) {
        let Form::Ordinary { launched } = self.form else { return };
        let lent = LentInMemory::by_becoming_shadow(phys, self.region, places, revision, values);
        self.form = Form::LentInMemory { lent, launched };
    }

    /// From the current VMCS it becomes the shadow VMCS that L2's VMREAD and VMWRITE reach, with the values of what L2 is lent;
    /// `next` becomes current.
    #[inline(always)]
    pub(super) fn become_shadow(
        &mut self,
        vmx: &mut Vmx,
        phys: &DirectMap,
        revision: u32,
        lend: LentValues,
        next: &Region,
    ) {
        let at = &self.region;
        self.form = match lend {
            LentValues::Nothing => {
                vmx.exchange(phys, at, revision | SHADOW_INDICATOR, next);
                Form::Shadow
            }
            LentValues::Stack(values) => {
                Form::LentStack(Lent::by_becoming_shadow(vmx, phys, at, revision, values, next))
            }
            LentValues::Thread(values) => {
                Form::LentThread(Lent::by_becoming_shadow(vmx, phys, at, revision, values, next))
            }
        };
    }

    /// Not current, it takes the form in which vmcs01 and other vmcs02s may link to it.
    pub(super) fn rest(&mut self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) {
        if !self.is_shadow() {
            vmx.clear(self.region);
            self.region.mark(phys, revision | SHADOW_INDICATOR);
            self.form = Form::Shadow;
        }
    }

    /// In a form that L2's VMREAD and VMWRITE may reach, and that cannot be entered.
    pub(super) fn is_shadow(&self) -> bool {
        !matches!(self.form, Form::Ordinary { .. })
    }

    /// It is a shadow VMCS, not lent from, and current: fields in it are L2's from now on.
    #[cold]
    pub(super) fn lend(&mut self, vmx: &mut Vmx, phys: &DirectMap, lend: LentValues) {
        if !matches!(self.form, Form::Shadow) {
            return;
        }
        self.form = match lend {
            LentValues::Nothing => Form::Shadow,
            LentValues::Stack(values) => Form::LentStack(Lent::from_shadow(vmx, phys, self.region, values)),
            LentValues::Thread(values) => Form::LentThread(Lent::from_shadow(vmx, phys, self.region, values)),
        };
    }

    /// A shadow VMCS, which is current, is lent from no more: what L2 left.
    #[cold]
    pub(super) fn end_loan(&mut self, vmx: &mut Vmx) -> Returned {
        match mem::replace(&mut self.form, Form::Shadow) {
            Form::LentStack(lent) => Returned::Stack(lent.end(vmx)),
            Form::LentThread(lent) => Returned::Thread(lent.end(vmx)),
            other => {
                self.form = other;
                Returned::Nothing
            }
        }
    }

    /// Must the next entry be a VMLAUNCH? It is current.
    #[inline(always)]
    pub fn needs_launch(&self) -> bool {
        !matches!(self.form, Form::Ordinary { launched: true })
    }

    /// L3 was entered: VMRESUME from now on.
    #[inline(always)]
    pub fn mark_launched(&mut self) {
        self.form = Form::Ordinary { launched: true };
    }

    /// It runs on this ept02 already.
    #[inline(always)]
    pub fn is_on(&self, eptp02: Eptp) -> bool {
        self.eptp.holds(eptp02.get())
    }

    /// It runs with this VPID already.
    #[inline(always)]
    pub fn has_vpid(&self, vpid02: u16) -> bool {
        self.vpid.holds(vpid02.into())
    }

    /// Current, it runs on this ept02.
    #[inline(always)]
    pub fn run_on(&mut self, vmx: &mut Vmx, ept02: Activation, ept01: Eptp) {
        let eptp02 = ept02.eptp02.get();
        self.eptp.put(vmx, eptp02);
        if ept02.invept {
            vmx.invept(Invalidate::Single, eptp02);
        }
        if ept02.invept01 {
            vmx.invept(Invalidate::Single, ept01.get());
        }
    }

    /// Current, it runs with this table of sub-page write permissions, that of its ept02.
    pub fn point_to_sub_pages(&mut self, vmx: &mut Vmx, sub_pages: SubPages) {
        self.spptp.put(vmx, sub_pages.spptp02.get());
        if sub_pages.invept {
            let eptp02 = self.eptp.get(vmx);
            vmx.invept(Invalidate::Single, eptp02);
        }
    }

    /// Current, it runs with this VPID.
    #[inline(always)]
    pub fn run_with_vpid(&mut self, vmx: &mut Vmx, vpid02: u16) {
        self.vpid.put(vmx, vpid02.into());
    }

    /// The next entry loads so many MSRs from a list; it is current.
    pub fn load_msrs(&mut self, vmx: &mut Vmx, list: Hpa, count: u64) {
        self.msr_load_address.put(vmx, list.get());
        self.msr_load_count.put(vmx, count);
    }

    /// The next entry loads no MSRs from a list; it is current.
    #[inline(always)]
    pub fn load_no_msrs(&mut self, vmx: &mut Vmx) {
        self.msr_load_count.put(vmx, 0);
    }

    /// Current, it gets the merged controls that `stale` says are not in it.
    #[cold]
    pub fn write_controls(&mut self, vmcs: &mut impl FieldAccess, controls: &Vmcs02Controls, stale: Stale) {
        self.pin.put(vmcs, controls.pin.bits().into());
        self.primary.put(vmcs, controls.primary.bits().into());
        if !stale.contains(Stale::UNWRITTEN) {
            return;
        }
        // The processor changes the entry controls at exits, with the mode of an unrestricted guest.
        self.entry.forget();
        self.entry.put(vmcs, controls.entry.bits().into());
        for (cell, value) in self.others.iter_mut().zip(controls.others()) {
            if let Some(value) = value {
                cell.put(vmcs, value);
            }
        }
    }

    /// Sets or clears controls for an event of nvmx's own; it is current. L2's are to be written again before L3 runs for L2.
    pub fn alter_controls(
        &mut self,
        vmcs: &mut impl FieldAccess,
        pin: PinControls,
        primary: PrimaryControls,
        on: bool,
    ) {
        for (cell, bits) in [(&mut self.pin, pin.bits()), (&mut self.primary, primary.bits())] {
            let (old, bits) = (cell.get(vmcs), u64::from(bits));
            cell.put(vmcs, if on { old | bits } else { old & !bits });
        }
    }

    /// An entry failed, which leaves the guest-state area alone; it is current. `loaded` tells whether the entry wrote PDPTEs.
    #[cold]
    pub fn give_pdptes_back(&mut self, vmx: &mut Vmx, loaded: bool) {
        if let Some(values) = self.pdptes12.take().filter(|_| loaded) {
            PDPTES.into_iter().zip(values).for_each(|(field, value)| vmx.write(field, value));
        }
    }
}
