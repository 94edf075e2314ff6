//! Guest state that the CPU finds bad while it enters.

use super::{
    BAD_GUEST,
    Change::{self, Off, On, Set},
    NOT_CANONICAL, attempt, attempt_if,
};
use crate::{
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use l2_kit::{
    cpu, fields as f, pages,
    setup::{self, Kind, entry_controls as entry},
};

/// Segment registers and descriptor tables.
pub fn segments(guest: &mut Guest) {
    for (name, field, change) in [
        ("guest TR in the LDT", f::GUEST_TR, On(4)),
        ("guest TR unusable", f::GUEST_TR_AR, On(1 << 16)),
        ("guest TR not busy", f::GUEST_TR_AR, Set(0x89)),
        ("guest TR not present", f::GUEST_TR_AR, Off(0x80)),
        ("guest TR with bit 8", f::GUEST_TR_AR, On(0x100)),
        ("guest TR a code segment", f::GUEST_TR_AR, On(0x10)),
        ("guest TR base not canonical", f::GUEST_TR_BASE, Set(NOT_CANONICAL)),
        ("guest TR with pages and a byte limit", f::GUEST_TR_AR, On(0x8000)),
        ("guest LDTR with a wrong type", f::GUEST_LDTR_AR, Set(0x83)),
        ("guest CS a data segment", f::GUEST_CS_AR, Set(0xA093)),
        ("guest CS not present", f::GUEST_CS_AR, Off(0x80)),
        ("guest CS a system segment", f::GUEST_CS_AR, Off(0x10)),
        ("guest CS with L and D", f::GUEST_CS_AR, On(0x4000)),
        ("guest CS of another ring than SS", f::GUEST_CS_AR, On(0x60)),
        ("guest CS with bit 11", f::GUEST_CS_AR, On(0x800)),
        ("guest CS with bit 17", f::GUEST_CS_AR, On(1 << 17)),
        ("guest CS with a limit of bytes and pages", f::GUEST_CS_LIMIT, Set(0xFFFF_F000)),
        ("guest CS base above 32 bits", f::GUEST_CS_BASE, Set(1 << 32)),
        ("guest SS read-only", f::GUEST_SS_AR, Set(0xC091)),
        ("guest SS of another ring than its selector", f::GUEST_SS, On(3)),
        ("guest SS base above 32 bits", f::GUEST_SS_BASE, Set(1 << 32)),
        ("guest DS not accessed", f::GUEST_DS_AR, Set(0xC092)),
        ("guest DS execute-only", f::GUEST_DS_AR, Set(0xC099)),
        ("guest DS not present", f::GUEST_DS_AR, Off(0x80)),
        ("guest ES base above 32 bits", f::GUEST_ES_BASE, Set(1 << 32)),
        ("guest FS base not canonical", f::GUEST_FS_BASE, Set(NOT_CANONICAL)),
        ("guest GS base not canonical", f::GUEST_GS_BASE, Set(NOT_CANONICAL)),
        ("guest GDTR base not canonical", f::GUEST_GDTR_BASE, Set(NOT_CANONICAL)),
        ("guest IDTR base not canonical", f::GUEST_IDTR_BASE, Set(NOT_CANONICAL)),
        ("guest GDTR limit above 16 bits", f::GUEST_GDTR_LIMIT, Set(0x10000)),
        ("guest IDTR limit above 16 bits", f::GUEST_IDTR_LIMIT, Set(0x10000)),
    ] {
        attempt(guest, name, &[(field, change)], BAD_GUEST);
    }
}

/// Control registers, RIP, flags, activity, pending debug exceptions, the link pointer, debug registers and MSRs.
pub fn registers(guest: &mut Guest) {
    let width = too_wide();
    for (name, field, change) in [
        ("guest CR0 without NE", f::GUEST_CR0, Off(cpu::CR0_NE)),
        ("guest CR0 without PE", f::GUEST_CR0, Off(cpu::CR0_PE)),
        ("guest CR0 without PG", f::GUEST_CR0, Off(cpu::CR0_PG)),
        ("guest CR0 with bit 32", f::GUEST_CR0, On(1 << 32)),
        ("guest CR4 without VMXE", f::GUEST_CR4, Off(cpu::CR4_VMXE)),
        ("guest CR4 without PAE", f::GUEST_CR4, Off(cpu::CR4_PAE)),
        ("guest CR4 with bit 63", f::GUEST_CR4, On(1 << 63)),
        ("guest CR3 beyond the address width", f::GUEST_CR3, On(width)),
        ("guest SYSENTER ESP not canonical", f::GUEST_SYSENTER_ESP, Set(NOT_CANONICAL)),
        ("guest SYSENTER EIP not canonical", f::GUEST_SYSENTER_EIP, Set(NOT_CANONICAL)),
        ("guest RFLAGS 0", f::GUEST_RFLAGS, Set(0)),
        ("guest RFLAGS with bit 3", f::GUEST_RFLAGS, On(1 << 3)),
        ("guest RFLAGS with bit 22", f::GUEST_RFLAGS, On(1 << 22)),
        ("guest RFLAGS with VM", f::GUEST_RFLAGS, On(1 << 17)),
        ("guest activity 4", f::GUEST_ACTIVITY, Set(4)),
        ("guest interruptibility with bit 5", f::GUEST_INTERRUPTIBILITY, Set(1 << 5)),
        ("guest blocked by STI without IF", f::GUEST_INTERRUPTIBILITY, Set(1)),
        ("guest blocked by SMI", f::GUEST_INTERRUPTIBILITY, Set(4)),
        ("guest RIP not canonical", f::GUEST_RIP, Set(NOT_CANONICAL)),
        ("guest pending debug with bit 4", f::GUEST_PENDING_DEBUG, Set(1 << 4)),
        ("guest pending debug with bit 32", f::GUEST_PENDING_DEBUG, Set(1 << 32)),
    ] {
        attempt(guest, name, &[(field, change)], BAD_GUEST);
    }
    let interrupts = (f::GUEST_RFLAGS, On(0x200));
    attempt(guest, "guest blocked by STI and MOV SS", &[interrupts, (f::GUEST_INTERRUPTIBILITY, Set(3))], BAD_GUEST);
    attempt(
        guest,
        "guest halted and blocked by MOV SS",
        &[(f::GUEST_ACTIVITY, Set(1)), (f::GUEST_INTERRUPTIBILITY, Set(2))],
        BAD_GUEST,
    );
    pending_steps(guest);
    let link = Exit::Failed(33, 4);
    let wrong = pages::page();
    wrong[0] = u64::from(setup::revision() ^ 1);
    for (name, value) in [
        ("link pointer misaligned", 0x1008),
        ("link pointer beyond the address width", width),
        ("link pointer to a wrong revision", pages::address(wrong)),
    ] {
        attempt(guest, name, &[(f::LINK_POINTER, Set(value))], link);
    }
    let debug = (f::ENTRY_CONTROLS, On(entry::LOAD_DEBUG.into()));
    attempt(guest, "guest DR7 above 32 bits", &[debug, (f::GUEST_DR7, On(1 << 32))], BAD_GUEST);
    for (name, value) in [("guest DEBUGCTL with bit 4", 1 << 4), ("guest DEBUGCTL with bit 32", 1 << 32)] {
        attempt(guest, name, &[debug, (f::GUEST_DEBUGCTL, Set(value))], BAD_GUEST);
    }
    let efer = (f::ENTRY_CONTROLS, On(entry::LOAD_EFER.into()));
    for (name, value) in [
        ("guest EFER 0", 0),
        ("guest EFER without LMA", 0x100),
        ("guest EFER without LME", 0x400),
        ("guest EFER with bit 1", 0x502),
    ] {
        attempt_if(guest, Kind::Entry, entry::LOAD_EFER, name, &[efer, (f::GUEST_EFER, Set(value))], BAD_GUEST);
    }
    let pat = (f::ENTRY_CONTROLS, On(entry::LOAD_PAT.into()));
    for (name, value) in
        [("guest PAT with type 2", 2), ("guest PAT with type 3", 3 << 8), ("guest PAT with type 8", 8 << 56)]
    {
        attempt_if(guest, Kind::Entry, entry::LOAD_PAT, name, &[pat, (f::GUEST_PAT, Set(value))], BAD_GUEST);
    }
}

/// Of a guest that is blocked by STI or MOV SS or halted a single step is pending if and only if it is stepped; a halted guest
/// gets few events.
fn pending_steps(guest: &mut Guest) {
    const TF: u64 = 1 << 8;
    const STEP: (u32, Change) = (f::GUEST_PENDING_DEBUG, Set(1 << 14));
    const VALID: u64 = 1 << 31;
    let sti = (f::GUEST_INTERRUPTIBILITY, Set(1));
    let stepped = (f::GUEST_RFLAGS, On(TF | 0x200));
    let halted = (f::GUEST_ACTIVITY, Set(1));
    let event = |info: u64| (f::ENTRY_INTERRUPTION_INFO, Set(VALID | info));
    attempt(guest, "guest blocked by STI, a step pending", &[sti, STEP, (f::GUEST_RFLAGS, On(0x200))], BAD_GUEST);
    attempt(guest, "guest blocked by STI, stepped", &[sti, stepped], BAD_GUEST);
    let mov_ss = (f::GUEST_INTERRUPTIBILITY, Set(2));
    attempt(guest, "guest blocked by MOV SS, a step pending", &[mov_ss, STEP], BAD_GUEST);
    attempt(guest, "guest halted, a step pending", &[halted, STEP], BAD_GUEST);
    attempt(guest, "guest halted, stepped", &[halted, (f::GUEST_RFLAGS, On(TF))], BAD_GUEST);
    for (name, info) in [
        ("#UD for a halted guest", 3 << 8 | 6),
        ("#GP for a halted guest", 3 << 8 | 1 << 11 | 13),
        ("INT 20H for a halted guest", 4 << 8 | 0x20),
        ("INT1 for a halted guest", 5 << 8 | 1),
        ("INT3 for a halted guest", 6 << 8 | 3),
    ] {
        attempt(guest, name, &[halted, event(info), (f::ENTRY_INSTRUCTION_LENGTH, Set(1))], BAD_GUEST);
    }
}
