//! What vmcs02 runs with: nvmx's needs and a checked vmcs12, merged.
//!
//! Pure; only [`shadow_bitmap`] works in memory. Every address comes in translated; what L2 wants intercepted is a subset of
//! what comes out (invariant I3), and nothing of vmcs12 reaches the host side of the VM exit (invariant I4).
//!
//! Exception bitmap, CR masks and shadows, CR3 targets, TSC offset, the PF mask and all guest state are not here: L2's
//! values live in vmcs02 and nvmx adds none of its own.

use crate::addr::{Gpa, Hpa};
use crate::mm::{Frame, GuestMemory, PhysMem};
use crate::rules::checks::ControlsChecked;
use crate::rules::switched;
use crate::vmx::bitmap::Words;
use crate::vmx::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::{Capabilities, Field, Fields};
use bitflags::bitflags;

/// The controls that nvmx needs in vmcs02 whatever L2 asks for; made once per processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NvmxNeeds {
    pin: PinControls,
    primary: PrimaryControls,
    secondary: SecondaryControls,
    exit: ExitControls,
    entry: EntryControls,
    save_timer: ExitControls,
}

impl NvmxNeeds {
    /// For a processor that meets [`crate::vmx::requirements::REQUIREMENTS`].
    pub fn new(hardware: &Capabilities) -> Self {
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | switched::exit_controls();
        let entry = switched::entry_controls();
        Self {
            pin: hardware.pin.with_required(PinControls::empty()),
            primary: hardware.primary.with_required(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS),
            secondary: hardware.secondary.with_required(SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID),
            exit: hardware.exit.with_required(exit),
            entry: hardware.entry.with_required(entry),
            save_timer: hardware.exit.settable() & ExitControls::SAVE_PREEMPTION_TIMER,
        }
    }
}

/// Pages of L2 that the processor uses to virtualize L3's APIC, as addresses for vmcs02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApicPages {
    /// The virtual-APIC page.
    pub virtual_apic: Hpa,
    /// The APIC-access page: never accessed, only compared with.
    pub apic_access: Hpa,
    /// The posted-interrupt descriptor.
    pub posted_descriptor: Hpa,
}

/// The addresses that stand for those in vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translated {
    /// L2's I/O bitmaps A and B, if it uses them and both lie in its memory.
    pub io_bitmaps: Option<(Hpa, Hpa)>,
    /// The merged MSR bitmap, if L2 uses one and it lies in its memory.
    pub msr_bitmap: Option<Hpa>,
    /// What vmcs12 names for those of its controls that use it.
    pub apic: ApicPages,
    /// The merged VMREAD and VMWRITE bitmaps, if the hardware is to use them.
    pub shadow_bitmaps: Option<(Hpa, Hpa)>,
}

bitflags! {
    /// What the merged controls leave to the code around an entry of L3.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Duties: u32 {
        /// The guest has no EPT of L2: with PAE paging, fill the PDPTE fields from the table at CR3.
        const LOAD_PDPTES = 1 << 0;
        /// L2 gives no VPID: each entry and exit must flush the linear translations of the VPID that nvmx uses.
        const FLUSH_VPID = 1 << 1;
        /// The guest runs on ept01 with virtualized APIC accesses: each entry must flush what L2 itself, and guests without,
        /// left cached of ept01.
        const FLUSH_EPT01 = 1 << 2;
        /// L2 uses VMCS shadowing: its shadow VMCS must be active, and within L3's reach.
        const LINK_SHADOW_VMCS = 1 << 3;
        /// L2 uses sub-page write permissions: vmcs02 must point to the table composed for the ept02 that it runs on.
        const POINT_TO_SUB_PAGES = 1 << 4;
    }
}

/// The controls of vmcs02, but for EPTP and VPID, which each entry chooses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Vmcs02Controls {
    pub pin: PinControls,
    pub primary: PrimaryControls,
    pub secondary: SecondaryControls,
    /// To be written if the primary controls activate them.
    pub tertiary: u64,
    pub exit: ExitControls,
    pub entry: EntryControls,
    /// To be written if the primary controls use I/O bitmaps.
    pub io_bitmaps: Option<(Hpa, Hpa)>,
    /// To be written if the primary controls use MSR bitmaps.
    pub msr_bitmap: Option<Hpa>,
    /// The virtual-APIC page, if L2 uses the TPR shadow.
    pub virtual_apic: Option<Hpa>,
    /// The APIC-access page, if L2 virtualizes APIC accesses.
    pub apic_access: Option<Hpa>,
    /// The posted-interrupt descriptor, if L2 uses one.
    pub posted_descriptor: Option<Hpa>,
    /// To be written if the secondary controls use VMCS shadowing.
    pub shadow_bitmaps: Option<(Hpa, Hpa)>,
    /// To be written if the secondary controls enable XSAVES.
    pub xss_exiting_bitmap: u64,
    /// To be written if the secondary controls enable PAUSE-loop exiting.
    pub ple_gap: u32,
    /// As `ple_gap`.
    pub ple_window: u32,
    /// What remains to be done around an entry.
    pub duties: Duties,
}

/// Merges the controls of a checked vmcs12 with nvmx's.
pub fn merge(needs: &NvmxNeeds, vmcs12: &impl Fields, checked: ControlsChecked, to: &Translated) -> Vmcs02Controls {
    // The proof says that vmcs12 sets no control that nvmx does not offer; so all of them may run.
    let _ = checked;
    let get32 = |field| vmcs12.get(field) as u32;
    let pin12 = PinControls::from_bits_retain(get32(Field::PIN_BASED_VM_EXEC_CONTROL));
    let primary12 = PrimaryControls::from_bits_retain(get32(Field::CPU_BASED_VM_EXEC_CONTROL));
    let exit12 = ExitControls::from_bits_retain(get32(Field::VM_EXIT_CONTROLS));
    let entry12 = EntryControls::from_bits_retain(get32(Field::VM_ENTRY_CONTROLS));
    let secondary12 = if primary12.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
        SecondaryControls::from_bits_retain(get32(Field::SECONDARY_VM_EXEC_CONTROL))
    } else {
        SecondaryControls::empty()
    };

    let mut exit = needs.exit | exit12 & ExitControls::ACK_INTERRUPT_ON_EXIT;
    if pin12.contains(PinControls::PREEMPTION_TIMER) {
        exit |= needs.save_timer;
    }
    // What an exit leaves out the next entry must not load.
    if entry12.contains(EntryControls::LOAD_PERF_GLOBAL_CTRL) || exit12.contains(ExitControls::SAVE_PERF_GLOBAL_CTRL) {
        exit |= ExitControls::SAVE_PERF_GLOBAL_CTRL;
    }
    // Both are about L2's tables and not those that run: `ept::flags` writes its log, `nested::ve` makes its #VE.
    let mut run12 = secondary12 - SecondaryControls::ENABLE_PML - SecondaryControls::EPT_VIOLATION_VE;
    let shadow_bitmaps = to.shadow_bitmaps.filter(|_| secondary12.contains(SecondaryControls::VMCS_SHADOWING));
    // Without shadowing each access exits, and nvmx looks into L2's bitmaps.
    run12.set(SecondaryControls::VMCS_SHADOWING, shadow_bitmaps.is_some());
    Vmcs02Controls {
        pin: pin12 | needs.pin,
        primary: merge_primary(primary12, to) | needs.primary,
        secondary: run12 | needs.secondary,
        tertiary: vmcs12.get(Field::TERTIARY_VM_EXEC_CONTROL),
        exit,
        entry: entry12 & (EntryControls::IA32E_MODE_GUEST | switched::RESIDENT_ENTRY) | needs.entry,
        io_bitmaps: to.io_bitmaps,
        msr_bitmap: to.msr_bitmap,
        virtual_apic: primary12.contains(PrimaryControls::USE_TPR_SHADOW).then_some(to.apic.virtual_apic),
        apic_access: secondary12.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES).then_some(to.apic.apic_access),
        posted_descriptor: pin12.contains(PinControls::POSTED_INTERRUPTS).then_some(to.apic.posted_descriptor),
        shadow_bitmaps,
        xss_exiting_bitmap: vmcs12.get(Field::XSS_EXITING_BITMAP),
        ple_gap: get32(Field::PLE_GAP),
        ple_window: get32(Field::PLE_WINDOW),
        duties: duties(secondary12),
    }
}

/// Primary controls that no rule and no other control depends on: vmcs02 has them as L2 sets them.
const INDEPENDENT: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING
    .union(PrimaryControls::USE_TSC_OFFSETTING)
    .union(PrimaryControls::HLT_EXITING)
    .union(PrimaryControls::INVLPG_EXITING)
    .union(PrimaryControls::MWAIT_EXITING)
    .union(PrimaryControls::RDPMC_EXITING)
    .union(PrimaryControls::RDTSC_EXITING)
    .union(PrimaryControls::MOV_DR_EXITING)
    .union(PrimaryControls::MONITOR_EXITING)
    .union(PrimaryControls::PAUSE_EXITING);

impl Vmcs02Controls {
    /// The fields that [`Vmcs02Controls::others`] has values for.
    pub const OTHERS: [Field; 14] = [
        Field::SECONDARY_VM_EXEC_CONTROL,
        Field::TERTIARY_VM_EXEC_CONTROL,
        Field::VM_EXIT_CONTROLS,
        Field::IO_BITMAP_A,
        Field::IO_BITMAP_B,
        Field::MSR_BITMAP,
        Field::VIRTUAL_APIC_ADDRESS,
        Field::APIC_ACCESS_ADDRESS,
        Field::POSTED_INTR_DESC_ADDR,
        Field::VMREAD_BITMAP,
        Field::VMWRITE_BITMAP,
        Field::XSS_EXITING_BITMAP,
        Field::PLE_GAP,
        Field::PLE_WINDOW,
    ];

    /// All but the pin-based, the primary and the VM-entry controls, in the order of [`Vmcs02Controls::OTHERS`]; `None` where
    /// no control makes the processor look at the field, which it may not have.
    pub fn others(&self) -> [Option<u64>; Self::OTHERS.len()] {
        let (a, b) = self.io_bitmaps.map_or((None, None), |(a, b)| (Some(a.get()), Some(b.get())));
        let (read, write) = self.shadow_bitmaps.map_or((None, None), |(r, w)| (Some(r.get()), Some(w.get())));
        let tertiary = self.primary.contains(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS);
        let with = |control, value| self.secondary.contains(control).then_some(value);
        [
            Some(self.secondary.bits().into()),
            tertiary.then_some(self.tertiary),
            Some(self.exit.bits().into()),
            a,
            b,
            self.msr_bitmap.map(Hpa::get),
            self.virtual_apic.map(Hpa::get),
            self.apic_access.map(Hpa::get),
            self.posted_descriptor.map(Hpa::get),
            read,
            write,
            with(SecondaryControls::ENABLE_XSAVES, self.xss_exiting_bitmap),
            with(SecondaryControls::PAUSE_LOOP_EXITING, self.ple_gap.into()),
            with(SecondaryControls::PAUSE_LOOP_EXITING, self.ple_window.into()),
        ]
    }

    /// L2 changes its primary controls from `old`, with which these were merged, to `new`. True if the merge is up to date
    /// again; else it must be made anew. Windows open and close this way before many entries.
    pub fn follow(&mut self, old: PrimaryControls, new: PrimaryControls, offered: &Capabilities) -> bool {
        let changed = old ^ new;
        let may = (changed - INDEPENDENT).is_empty() && offered.primary.accepts(new.bits());
        if may {
            self.primary ^= changed;
        }
        may
    }
}

/// A bitmap outside of L2's memory reads as all ones, as it does on a machine with nothing at that address: everything
/// exits, which is what the controls mean without a bitmap.
fn merge_primary(primary12: PrimaryControls, to: &Translated) -> PrimaryControls {
    let mut primary = primary12;
    if to.msr_bitmap.is_none() {
        primary -= PrimaryControls::USE_MSR_BITMAPS;
    }
    if primary12.contains(PrimaryControls::USE_IO_BITMAPS) && to.io_bitmaps.is_none() {
        primary -= PrimaryControls::USE_IO_BITMAPS;
        primary |= PrimaryControls::UNCONDITIONAL_IO_EXITING;
    }
    primary
}

fn duties(secondary12: SecondaryControls) -> Duties {
    let mut duties = Duties::empty();
    duties.set(Duties::LOAD_PDPTES, !secondary12.contains(SecondaryControls::ENABLE_EPT));
    duties.set(Duties::LINK_SHADOW_VMCS, secondary12.contains(SecondaryControls::VMCS_SHADOWING));
    let sub_pages = secondary12.contains(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS);
    duties.set(Duties::POINT_TO_SUB_PAGES, sub_pages);
    duties.set(Duties::FLUSH_VPID, !secondary12.contains(SecondaryControls::ENABLE_VPID));
    let virtualizes_accesses = secondary12.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
    duties.set(Duties::FLUSH_EPT01, virtualizes_accesses && duties.contains(Duties::LOAD_PDPTES));
    duties
}

/// Makes the bitmap in the frame `to`, which is all ones elsewhere, the union of nvmx's VMREAD or VMWRITE bitmap and L2's at
/// `theirs`: `ours` are the words of nvmx's in which a field is open. A page that L2 does not own reads as all ones.
pub fn shadow_bitmap<P: PhysMem>(phys: &P, ours: &Words, guest: &GuestMemory<P>, theirs: Gpa, to: &Frame) {
    let theirs = guest.translate(theirs.page()).ok();
    for (offset, word) in ours.iter() {
        let theirs = theirs.map_or(u64::MAX, |page| phys.read_u64(Hpa::new(page.get() + offset)));
        phys.write_u64(to.at(offset), word | theirs);
    }
}
