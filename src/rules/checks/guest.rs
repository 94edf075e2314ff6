//! Rules on the guest-state area: control registers, MSRs, RIP, RFLAGS, and the order of all of them.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Checks on the Guest State Area" of the chapter "VM Entries".

use crate::addr::Gpa;
use crate::rules::checks::view::{CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_PAE, CR4_PCIDE, View, implies, is_s_cet};
use crate::rules::checks::{CheckId, GuestFailure, first_failure, segments, state};
use crate::vmx::controls::{EntryControls, SecondaryControls};
use crate::vmx::event::EventKind;
use crate::vmx::qualification::EntryFailure;
use crate::vmx::{Capabilities, Field, Fields};
use crate::x86::RFlags;
use crate::x86::efer;
use crate::x86::msr::is_pat;
use crate::x86::rflags;

/// L2's memory, as far as these rules look into it.
pub trait ReadsGuest {
    /// Four bytes at a 4-byte aligned address, or `None` if there is no memory of L2.
    fn read_u32(&self, address: Gpa) -> Option<u32>;
    /// Eight bytes at an 8-byte aligned address, or `None` if there is no memory of L2.
    fn read_u64(&self, address: Gpa) -> Option<u64>;
}

/// What the rules need to know beside the fields.
#[derive(Clone, Copy, Debug)]
pub struct GuestContext {
    /// The VMCS being entered.
    pub current_vmptr: Gpa,
}

/// Reserved bits of IA32_DEBUGCTL on every processor; others depend on the model and are left to it.
const DEBUGCTL_RESERVED: u64 = !0xFFFF | 0x38;

/// Checks all rules on the guest-state area.
///
/// Most values live in vmcs02, so this is for an entry that the processor has refused, and for tests; before an entry,
/// [`check_guest_beyond_hardware`] is enough.
pub fn check_guest(
    fields: &impl Fields,
    caps: &Capabilities,
    context: &GuestContext,
    memory: &impl ReadsGuest,
) -> Result<(), GuestFailure> {
    let v = &View { fields, caps };
    let registers = first_failure! { v;
        GuestCr0 => cr0;
        GuestPgNeedsPe => pg_needs_pe;
        GuestCr4 => cr4;
        GuestCetNeedsWp => cet_needs_wp;
        GuestDebugctl => debugctl;
        GuestIa32eNeedsPaging => ia32e_needs_paging;
        GuestPcideNeedsIa32e => pcide_needs_ia32e;
        GuestCr3 => cr3;
        GuestDr7 => dr7;
        GuestSysenter => sysenter;
        GuestPat => pat;
        GuestEferReserved => efer_reserved;
        GuestEferLma => efer_lma;
        GuestEferLme => efer_lme;
        GuestSCet => s_cet;
        GuestSspTable => ssp_table;
        GuestPkrs => pkrs;
        GuestPerfGlobalCtrl => perf_global_ctrl;
        GuestUinv => uinv;
    };
    let flags = || {
        first_failure! { v;
            GuestRip => rip;
            GuestRflagsReserved => rflags_reserved;
            GuestRflagsVm => rflags_vm;
            GuestRflagsIf => rflags_if;
            GuestSsp => ssp;
        }
    };
    let failed = registers.or_else(|| segments::first_failure(v)).or_else(flags).or_else(|| state::first_failure(v));
    conclude(failed)?;
    state::link_pointer(v, context, memory)?;
    state::pdptes(v, memory)?;
    conclude(state::model_dependent_failure(v))
}

/// The rules on the guest state that the processor cannot check for L2, because vmcs02 differs there or nvmx offers less:
/// activity state, VMCS link pointer, and the PDPTEs of a guest without EPT.
pub fn check_guest_beyond_hardware(
    fields: &impl Fields,
    caps: &Capabilities,
    context: &GuestContext,
    memory: &impl ReadsGuest,
) -> Result<(), GuestFailure> {
    let v = &View { fields, caps };
    conclude(state::activity_failure(v))?;
    state::link_pointer(v, context, memory)?;
    if v.secondary().contains(SecondaryControls::ENABLE_EPT) {
        return Ok(());
    }
    state::pdptes(v, memory)
}

pub(super) fn conclude(failed: Option<CheckId>) -> Result<(), GuestFailure> {
    match failed {
        None => Ok(()),
        Some(check) => Err(GuestFailure { check, qualification: qualification_of(check) as u64 }),
    }
}

const fn qualification_of(check: CheckId) -> EntryFailure {
    match check {
        CheckId::GuestPdptes => EntryFailure::Pdptes,
        CheckId::GuestBlockingNmiSti => EntryFailure::NmiBlockedBySti,
        CheckId::GuestLinkPointerAddress | CheckId::GuestLinkPointerRegion | CheckId::GuestLinkPointerCurrent => {
            EntryFailure::LinkPointer
        }
        _ => EntryFailure::General,
    }
}

/// True if the guest is to run in IA-32e mode.
pub(super) fn is_ia32e(v: &View<impl Fields>) -> bool {
    v.entry().contains(EntryControls::IA32E_MODE_GUEST)
}

fn cr0_has(v: &View<impl Fields>, bit: u64) -> bool {
    v.get(Field::GUEST_CR0) & bit != 0
}

fn cr4_has(v: &View<impl Fields>, bit: u64) -> bool {
    v.get(Field::GUEST_CR4) & bit != 0
}

// Control registers, debug registers, MSRs

fn cr0(v: &View<impl Fields>) -> bool {
    let exempt = if v.unrestricted() { CR0_PE | CR0_PG } else { 0 };
    let (value, must, may) = (v.get(Field::GUEST_CR0), v.caps.cr0_fixed0 & !exempt, v.caps.cr0_fixed1 | exempt);
    value & must == must && value & !may == 0
}

fn pg_needs_pe(v: &View<impl Fields>) -> bool {
    implies(cr0_has(v, CR0_PG), cr0_has(v, CR0_PE))
}

fn cr4(v: &View<impl Fields>) -> bool {
    v.caps.cr4_ok(v.get(Field::GUEST_CR4))
}

fn cet_needs_wp(v: &View<impl Fields>) -> bool {
    implies(cr4_has(v, CR4_CET), cr0_has(v, CR0_WP))
}

fn debugctl(v: &View<impl Fields>) -> bool {
    let loaded = v.entry().contains(EntryControls::LOAD_DEBUG_CONTROLS);
    implies(loaded, v.get(Field::GUEST_IA32_DEBUGCTL) & DEBUGCTL_RESERVED == 0)
}

fn ia32e_needs_paging(v: &View<impl Fields>) -> bool {
    implies(is_ia32e(v), cr0_has(v, CR0_PG) && cr4_has(v, CR4_PAE))
}

fn pcide_needs_ia32e(v: &View<impl Fields>) -> bool {
    implies(cr4_has(v, CR4_PCIDE), is_ia32e(v))
}

fn cr3(v: &View<impl Fields>) -> bool {
    v.is_cr3(Field::GUEST_CR3)
}

fn dr7(v: &View<impl Fields>) -> bool {
    implies(v.entry().contains(EntryControls::LOAD_DEBUG_CONTROLS), v.get(Field::GUEST_DR7) >> 32 == 0)
}

fn sysenter(v: &View<impl Fields>) -> bool {
    v.canonical(Field::GUEST_SYSENTER_ESP) && v.canonical(Field::GUEST_SYSENTER_EIP)
}

fn pat(v: &View<impl Fields>) -> bool {
    implies(v.entry().contains(EntryControls::LOAD_PAT), is_pat(v.get(Field::GUEST_IA32_PAT)))
}

fn with_efer(v: &View<impl Fields>, rule: impl Fn(u64) -> bool) -> bool {
    !v.entry().contains(EntryControls::LOAD_EFER) || rule(v.get(Field::GUEST_IA32_EFER))
}

fn efer_reserved(v: &View<impl Fields>) -> bool {
    with_efer(v, |efer| efer & !efer::DEFINED == 0)
}

fn efer_lma(v: &View<impl Fields>) -> bool {
    with_efer(v, |efer| (efer & efer::LMA != 0) == is_ia32e(v))
}

fn efer_lme(v: &View<impl Fields>) -> bool {
    with_efer(v, |efer| implies(cr0_has(v, CR0_PG), (efer & efer::LMA != 0) == (efer & efer::LME != 0)))
}

fn loads_cet(v: &View<impl Fields>) -> bool {
    v.entry().contains(EntryControls::LOAD_CET)
}

fn s_cet(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), is_s_cet(v.get(Field::GUEST_S_CET)) && v.is_linear(Field::GUEST_S_CET, is_ia32e(v)))
}

fn ssp_table(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), v.canonical(Field::GUEST_INTR_SSP_TABLE))
}

fn pkrs(v: &View<impl Fields>) -> bool {
    implies(v.entry().contains(EntryControls::LOAD_PKRS), v.get(Field::GUEST_IA32_PKRS) >> 32 == 0)
}

fn perf_global_ctrl(v: &View<impl Fields>) -> bool {
    let loads = v.entry().contains(EntryControls::LOAD_PERF_GLOBAL_CTRL);
    implies(loads, v.get(Field::GUEST_IA32_PERF_GLOBAL_CTRL) & !v.caps.counters == 0)
}

fn uinv(v: &View<impl Fields>) -> bool {
    implies(v.entry().contains(EntryControls::LOAD_UINV), v.get(Field::GUEST_UINV) <= 0xFF)
}

// RIP, RFLAGS and SSP

/// RFLAGS.TF
pub(super) const RFLAGS_TF: u64 = RFlags::TRAP_FLAG.bits();
/// RFLAGS.IF
pub(super) const RFLAGS_IF: u64 = RFlags::INTERRUPT_FLAG.bits();
/// RFLAGS.VM
pub(super) const RFLAGS_VM: u64 = RFlags::VIRTUAL_8086_MODE.bits();
/// L in the access rights of CS.
const AR_L: u64 = 1 << 13;

fn rip(v: &View<impl Fields>) -> bool {
    let rip = v.get(Field::GUEST_RIP);
    if is_ia32e(v) && v.get(Field::GUEST_CS_AR_BYTES) & AR_L != 0 {
        // Looser than canonical: only the bits above the linear-address width must be equal.
        let above = if v.caps.linear_width >= 64 { 0 } else { !0 << v.caps.linear_width };
        rip & above == 0 || rip & above == above
    } else {
        rip >> 32 == 0
    }
}

fn rflags_reserved(v: &View<impl Fields>) -> bool {
    v.get(Field::GUEST_RFLAGS) & (rflags::RESERVED | rflags::FIXED) == rflags::FIXED
}

fn rflags_vm(v: &View<impl Fields>) -> bool {
    implies(v.get(Field::GUEST_RFLAGS) & RFLAGS_VM != 0, !is_ia32e(v) && cr0_has(v, CR0_PE))
}

fn rflags_if(v: &View<impl Fields>) -> bool {
    implies(v.event().is(EventKind::ExternalInterrupt), v.get(Field::GUEST_RFLAGS) & RFLAGS_IF != 0)
}

fn ssp(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), v.get(Field::GUEST_SSP) & 3 == 0 && v.is_linear(Field::GUEST_SSP, is_ia32e(v)))
}
