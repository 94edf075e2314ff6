//! Rules on the guest's non-register state: activity, interruptibility, pending debug exceptions, link pointer, PDPTEs.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Checks on Guest Non-Register State" and "Checks on Guest Page-Directory-
//! Pointer-Table Entries".

use crate::addr::Gpa;
use crate::rules::checks::guest::{GuestContext, RFLAGS_IF, RFLAGS_TF, ReadsGuest, conclude, is_ia32e};
use crate::rules::checks::view::{CR0_PG, CR4_PAE, View, implies};
use crate::rules::checks::{CheckId, GuestFailure};
use crate::vmx::controls::{PinControls, SecondaryControls};
use crate::vmx::event::{EventKind, vector};
use crate::vmx::field::PDPTES;
use crate::vmx::region::REVISION;
use crate::vmx::segment::AccessRights;
use crate::vmx::state::activity::{ACTIVE, HLT, SHUTDOWN};
use crate::vmx::{Field, Fields};
use crate::x86::debug::{DEBUGCTL_BTF, PENDING_BS};

/// The first rule that does not hold, link pointer and PDPTEs apart.
pub(super) fn first_failure(v: &View<impl Fields>) -> Option<CheckId> {
    super::first_failure! { v;
        GuestActivity => activity;
        GuestActivityHltDpl => activity_hlt_dpl;
        GuestActivityBlocking => activity_blocking;
        GuestActivityEvent => activity_event;
        GuestInterruptibilityReserved => interruptibility_reserved;
        GuestBlockingStiAndMovSs => blocking_sti_and_mov_ss;
        GuestBlockingStiNeedsIf => blocking_sti_needs_if;
        GuestBlockingExternalInterrupt => blocking_external_interrupt;
        GuestBlockingNmiMovSs => blocking_nmi_mov_ss;
        GuestBlockingSmi => blocking_smi;
        GuestBlockingNmi => blocking_nmi;
        GuestBlockingEnclave => blocking_enclave;
        GuestPendingDebugReserved => pending_debug_reserved;
        GuestPendingDebugStep => pending_debug_step;
        GuestPendingDebugRtm => pending_debug_rtm;
    }
}

/// The rule on activity states that the hardware may have and nvmx does not offer.
pub(super) fn activity_failure(v: &View<impl Fields>) -> Option<CheckId> {
    super::first_failure! { v;
        GuestActivity => activity;
    }
}

/// The rule that some processors do not have.
pub(super) fn model_dependent_failure(v: &View<impl Fields>) -> Option<CheckId> {
    super::first_failure! { v;
        GuestBlockingNmiSti => blocking_nmi_sti;
    }
}

// Activity state

fn activity(v: &View<impl Fields>) -> bool {
    v.caps.misc.supports_activity(v.get(Field::GUEST_ACTIVITY_STATE))
}

fn activity_hlt_dpl(v: &View<impl Fields>) -> bool {
    let ss = AccessRights(v.get32(Field::GUEST_SS_AR_BYTES));
    implies(v.get(Field::GUEST_ACTIVITY_STATE) == HLT, ss.dpl() == 0)
}

fn activity_blocking(v: &View<impl Fields>) -> bool {
    implies(blocks(v, BLOCKING_STI | BLOCKING_MOV_SS), v.get(Field::GUEST_ACTIVITY_STATE) == ACTIVE)
}

fn activity_event(v: &View<impl Fields>) -> bool {
    let event = v.event();
    if !event.is_valid() {
        return true;
    }
    match v.get(Field::GUEST_ACTIVITY_STATE) {
        ACTIVE => true,
        HLT => match event.kind() {
            EventKind::ExternalInterrupt | EventKind::Nmi => true,
            EventKind::HardwareException => matches!(event.vector(), vector::DB | vector::MC),
            EventKind::Other => event.vector() == 0,
            _ => false,
        },
        SHUTDOWN => event.kind() == EventKind::Nmi || event.is_exception(vector::MC),
        _ => false,
    }
}

// Interruptibility

const BLOCKING_STI: u64 = 1 << 0;
const BLOCKING_MOV_SS: u64 = 1 << 1;
const BLOCKING_SMI: u64 = 1 << 2;
const BLOCKING_NMI: u64 = 1 << 3;
const ENCLAVE_INTERRUPTION: u64 = 1 << 4;

fn blocks(v: &View<impl Fields>, bits: u64) -> bool {
    v.get(Field::GUEST_INTERRUPTIBILITY_INFO) & bits != 0
}

fn interruptibility_reserved(v: &View<impl Fields>) -> bool {
    v.get(Field::GUEST_INTERRUPTIBILITY_INFO) >> 5 == 0
}

fn blocking_sti_and_mov_ss(v: &View<impl Fields>) -> bool {
    !(blocks(v, BLOCKING_STI) && blocks(v, BLOCKING_MOV_SS))
}

fn blocking_sti_needs_if(v: &View<impl Fields>) -> bool {
    implies(blocks(v, BLOCKING_STI), v.get(Field::GUEST_RFLAGS) & RFLAGS_IF != 0)
}

fn blocking_external_interrupt(v: &View<impl Fields>) -> bool {
    implies(v.event().is(EventKind::ExternalInterrupt), !blocks(v, BLOCKING_STI | BLOCKING_MOV_SS))
}

fn blocking_nmi_mov_ss(v: &View<impl Fields>) -> bool {
    implies(v.event().is(EventKind::Nmi), !blocks(v, BLOCKING_MOV_SS))
}

fn blocking_nmi_sti(v: &View<impl Fields>) -> bool {
    implies(v.event().is(EventKind::Nmi), !blocks(v, BLOCKING_STI))
}

fn blocking_smi(v: &View<impl Fields>) -> bool {
    !blocks(v, BLOCKING_SMI)
}

fn blocking_nmi(v: &View<impl Fields>) -> bool {
    let virtual_nmi = v.pin().contains(PinControls::VIRTUAL_NMIS) && v.event().is(EventKind::Nmi);
    implies(virtual_nmi, !blocks(v, BLOCKING_NMI))
}

fn blocking_enclave(v: &View<impl Fields>) -> bool {
    !blocks(v, ENCLAVE_INTERRUPTION)
}

// Pending debug exceptions

const PENDING_ENABLED_BREAKPOINT: u64 = 1 << 12;
const PENDING_RTM: u64 = 1 << 16;
/// Bits 10:4, 13, 15, 63:17; bit 11 (bus lock) is left to the processor.
const PENDING_RESERVED: u64 = 0x7F0 | 1 << 13 | 1 << 15 | !0x1_FFFF;

fn pending_debug_reserved(v: &View<impl Fields>) -> bool {
    v.get(Field::GUEST_PENDING_DBG_EXCEPTIONS) & PENDING_RESERVED == 0
}

fn pending_debug_step(v: &View<impl Fields>) -> bool {
    let halted = v.get(Field::GUEST_ACTIVITY_STATE) == HLT;
    if !halted && !blocks(v, BLOCKING_STI | BLOCKING_MOV_SS) {
        return true;
    }
    let trap_flag = v.get(Field::GUEST_RFLAGS) & RFLAGS_TF != 0;
    let on_branches = v.get(Field::GUEST_IA32_DEBUGCTL) & DEBUGCTL_BTF != 0;
    let pending = v.get(Field::GUEST_PENDING_DBG_EXCEPTIONS) & PENDING_BS != 0;
    pending == (trap_flag && !on_branches)
}

fn pending_debug_rtm(v: &View<impl Fields>) -> bool {
    let pending = v.get(Field::GUEST_PENDING_DBG_EXCEPTIONS);
    let alone = pending == PENDING_RTM | PENDING_ENABLED_BREAKPOINT;
    implies(pending & PENDING_RTM != 0, alone && !blocks(v, BLOCKING_MOV_SS))
}

// VMCS link pointer

const NO_LINK: u64 = u64::MAX;
const SHADOW_VMCS: u32 = 1 << 31;

pub(super) fn link_pointer(
    v: &View<impl Fields>,
    context: &GuestContext,
    memory: &impl ReadsGuest,
) -> Result<(), GuestFailure> {
    let pointer = v.get(Field::VMCS_LINK_POINTER);
    if pointer == NO_LINK {
        return Ok(());
    }
    let shadowing = v.secondary().contains(SecondaryControls::VMCS_SHADOWING);
    let expected = if shadowing { REVISION | SHADOW_VMCS } else { REVISION };
    let failed = if !v.is_page_pointer(Field::VMCS_LINK_POINTER) {
        Some(CheckId::GuestLinkPointerAddress)
    } else if pointer == context.current_vmptr.get() {
        Some(CheckId::GuestLinkPointerCurrent)
    } else if memory.read_u32(Gpa::new(pointer)) != Some(expected) {
        Some(CheckId::GuestLinkPointerRegion)
    } else {
        None
    };
    conclude(failed)
}

// PDPTEs

const PDPTE_PRESENT: u64 = 1;
/// Bits 2:1 and 8:5.
const PDPTE_RESERVED: u64 = 0x1E6;

/// True if the guest uses PAE paging, so that the entry loads PDPTEs.
pub(super) fn uses_pae_paging(v: &View<impl Fields>) -> bool {
    let paging = v.get(Field::GUEST_CR0) & CR0_PG != 0 && v.get(Field::GUEST_CR4) & CR4_PAE != 0;
    paging && !is_ia32e(v)
}

pub(super) fn pdptes(v: &View<impl Fields>, memory: &impl ReadsGuest) -> Result<(), GuestFailure> {
    if !uses_pae_paging(v) {
        return Ok(());
    }
    let holds = |entry: u64| {
        let beyond = v.caps.physical_width < 64 && entry >> v.caps.physical_width != 0;
        entry & PDPTE_PRESENT == 0 || entry & PDPTE_RESERVED == 0 && !beyond
    };
    let all_hold = if v.secondary().contains(SecondaryControls::ENABLE_EPT) {
        PDPTES.iter().all(|&field| holds(v.get(field)))
    } else {
        let table = Gpa::new(v.get(Field::GUEST_CR3) & 0xFFFF_FFE0);
        let entry = |i: u64| table.checked_add(i * 8).and_then(|address| memory.read_u64(address));
        (0..4).all(|i| entry(i).is_some_and(holds))
    };
    conclude(if all_hold { None } else { Some(CheckId::GuestPdptes) })
}
