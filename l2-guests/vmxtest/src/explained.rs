//! Explained failures: a VMCS with one thing wrong, and the rule that nvmx names for it (`l2_protocol::abi`). Alone on the
//! machine nobody explains, so there is nothing to compare with: the records are `explained`, the same under every nvmx.
//!
//! Rules that only a 32-bit host can break are not here, nor one that Bochs does not have (an NMI under virtual-NMI blocking):
//! nvmx leaves guest state to the processor, and explains what that refuses.

use crate::{
    entries::{
        Change::{self, Off, On, Set},
        try_with,
    },
    expect::{Got, got},
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use l2_kit::{
    caps, cpu, fields as f,
    identity::{self, Slot},
    pages,
    protocol::{Hex, Kind as Record},
    report,
    setup::{
        self, Controls, Kind, Missing, VMX_BASIC, VMX_EPT_VPID_CAP, entry_controls as entry, exit_controls as exit,
        pin, primary, secondary,
    },
    vmx::{self, Outcome},
};

const NOT_CANONICAL: u64 = 1 << 62;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_CET: u64 = 1 << 23;
const CR0_WP: u64 = 1 << 16;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_VM: u64 = 1 << 17;
/// DPL or RPL 3
const DPL3: u64 = 3 << 5;
const RPL3: u64 = 3;
const VALID: u64 = 1 << 31;
const NMI: u64 = VALID | 2 << 8 | 2;
const GP: u64 = VALID | 1 << 11 | 3 << 8 | 13;
const INT3: u64 = VALID | 6 << 8 | 3;
const EXTERNAL: u64 = VALID | 0x60;
const STI: u64 = 1;
const MOV_SS: u64 = 2;

/// `l2_protocol::abi::Refused` by the way in which an entry ends.
fn group(result: Exit) -> u32 {
    match result {
        Exit::Refused(Outcome::FailValid(7)) => 2,
        Exit::Refused(Outcome::FailValid(8)) => 3,
        Exit::Failed(33, _) => 4,
        Exit::Failed(34, _) => 5,
        _ => 0,
    }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    if Slot::find() != Slot::Nvmx {
        return Ok(());
    }
    let mut guest = Guest::new(Controls {
        pin: pin::PREEMPTION_TIMER,
        secondary: secondary::EPT | secondary::VPID,
        exit: exit::LOAD_EFER | exit::LOAD_PAT,
        entry: entry::LOAD_EFER | entry::LOAD_PAT | entry::LOAD_DEBUG,
        ..Controls::default()
    })?;
    let (pat, efer) = (cpu::rdmsr(cpu::PAT), cpu::rdmsr(cpu::EFER));
    for (field, value) in [
        (f::VPID, 7),
        (f::GUEST_PAT, pat),
        (f::HOST_PAT, pat),
        (f::GUEST_EFER, efer),
        (f::HOST_EFER, efer),
        // A state that is valid after all ends at once.
        (f::PREEMPTION_TIMER, 0),
    ] {
        vmx::write(field, value);
    }
    controls(&mut guest);
    host(&mut guest);
    guest_registers(&mut guest);
    guest_segments(&mut guest);
    guest_events(&mut guest);
    guest_memory(&mut guest);
    msr_loading(&mut guest);
    instructions();
    Ok(())
}

/// Enters with these changes, and tells what nvmx says about it.
fn case(guest: &mut Guest, rule: &str, changes: &[(u32, Change)]) {
    let count = identity::refusal().count;
    let (result, _) = try_with(guest, changes);
    let told = identity::refusal();
    let wanted = group(result);
    report::record(
        Record::Explained,
        &[
            ("rule", &told.name.as_str()),
            ("what", &told.what),
            ("result", &result),
            ("fields", &told.fields.len()),
            ("first", &Hex(told.fields.first().copied().unwrap_or(0).into())),
        ],
    );
    let about = told.fields.iter().any(|field| changes.iter().any(|(changed, _)| changed == field));
    if told.name != *rule || told.what != wanted || told.count != count.wrapping_add(1) || !about {
        report::fail(format_args!("{rule}: {result}, and nvmx says {told:?}"));
    }
}

/// [`case`] where the capabilities allow it.
fn case_if(guest: &mut Guest, possible: bool, rule: &str, changes: &[(u32, Change)]) {
    if possible {
        case(guest, rule, changes);
    }
}

fn controls(guest: &mut Guest) {
    let one = setup::allowed_one;
    let ept_caps = caps::get(VMX_EPT_VPID_CAP);
    let bits = |bits: u32| u64::from(bits);
    case(guest, "PinControls", &[(f::PIN_CONTROLS, Off(1 << 1))]);
    case(guest, "PrimaryControls", &[(f::PRIMARY_CONTROLS, Off(1 << 26))]);
    case(guest, "SecondaryControls", &[(f::SECONDARY_CONTROLS, On(1 << 29))]);
    case_if(
        guest,
        one(Kind::Primary, primary::IO_BITMAPS),
        "IoBitmapAddress",
        &[(f::PRIMARY_CONTROLS, On(bits(primary::IO_BITMAPS))), (f::IO_BITMAP_A, Set(1))],
    );
    case_if(guest, one(Kind::Primary, primary::MSR_BITMAPS), "MsrBitmapAddress", &[(f::MSR_BITMAP, On(0x800))]);
    let virtual_nmi = (f::PIN_CONTROLS, On(bits(pin::VIRTUAL_NMI)));
    case_if(guest, one(Kind::Pin, pin::VIRTUAL_NMI), "VirtualNmisNeedNmiExiting", &[virtual_nmi]);
    let window = (f::PRIMARY_CONTROLS, On(bits(primary::NMI_WINDOW)));
    case_if(guest, one(Kind::Primary, primary::NMI_WINDOW), "NmiWindowNeedsVirtualNmis", &[window]);
    case(guest, "VpidNotZero", &[(f::VPID, Set(0))]);
    case(guest, "EptpMemoryType", &[(f::EPTP, On(1))]);
    case(guest, "EptpWalkLength", &[(f::EPTP, Off(1 << 3))]);
    case_if(guest, ept_caps & 1 << 21 == 0, "EptpAccessedDirty", &[(f::EPTP, On(1 << 6))]);
    case(guest, "EptpReserved", &[(f::EPTP, On(1 << 11))]);
    case_if(
        guest,
        one(Kind::Secondary, secondary::UNRESTRICTED),
        "UnrestrictedGuestNeedsEpt",
        &[
            (f::SECONDARY_CONTROLS, On(bits(secondary::UNRESTRICTED))),
            (f::SECONDARY_CONTROLS, Off(bits(secondary::EPT))),
        ],
    );
    case(guest, "ExitControls", &[(f::EXIT_CONTROLS, Off(1))]);
    case_if(
        guest,
        one(Kind::Exit, exit::SAVE_TIMER),
        "SaveTimerNeedsTimer",
        &[(f::PIN_CONTROLS, Off(bits(pin::PREEMPTION_TIMER))), (f::EXIT_CONTROLS, On(bits(exit::SAVE_TIMER)))],
    );
    for (rule, address, count) in [
        ("ExitMsrStoreList", f::EXIT_MSR_STORE_ADDR, f::EXIT_MSR_STORE_COUNT),
        ("ExitMsrLoadList", f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_LOAD_COUNT),
        ("EntryMsrLoadList", f::ENTRY_MSR_LOAD_ADDR, f::ENTRY_MSR_LOAD_COUNT),
    ] {
        case(guest, rule, &[(address, Set(8)), (count, Set(1))]);
    }
    case(guest, "EntryControls", &[(f::ENTRY_CONTROLS, Off(1))]);
    case(guest, "Cr3TargetCount", &[(f::CR3_TARGET_COUNT, Set(600))]);
    let event = |value| (f::ENTRY_INTERRUPTION_INFO, Set(value));
    case(guest, "EventType", &[event(VALID | 1 << 8)]);
    case(guest, "EventVector", &[event(NMI + 1)]);
    case(guest, "EventErrorCodeBit", &[event(EXTERNAL | 1 << 11)]);
    case(guest, "EventReserved", &[event(GP | 1 << 12)]);
    case(guest, "EventErrorCode", &[event(GP), (f::ENTRY_EXCEPTION_ERROR, Set(1 << 16))]);
    case(guest, "EventInstructionLength", &[event(INT3), (f::ENTRY_INSTRUCTION_LENGTH, Set(16))]);
}

fn host(guest: &mut Guest) {
    let has_cet = caps::get(0x489) & CR4_CET != 0;
    for (rule, field, change) in [
        ("HostAddressSpaceFitsMode", f::EXIT_CONTROLS, Off(exit::HOST_64.into())),
        ("HostCr0", f::HOST_CR0, Off(cpu::CR0_NE)),
        ("HostCr4", f::HOST_CR4, Off(cpu::CR4_VMXE)),
        ("HostCr3", f::HOST_CR3, On(too_wide())),
        ("HostSysenter", f::HOST_SYSENTER_EIP, Set(NOT_CANONICAL)),
        ("HostPat", f::HOST_PAT, Set(2)),
        ("HostEferReserved", f::HOST_EFER, On(2)),
        ("HostEferMode", f::HOST_EFER, Off(EFER_LMA)),
        ("HostSelectorRplTi", f::HOST_GS, On(4)),
        ("HostCsNotNull", f::HOST_CS, Set(0)),
        ("HostTrNotNull", f::HOST_TR, Set(0)),
        ("HostBaseCanonical", f::HOST_IDTR_BASE, Set(NOT_CANONICAL)),
        ("Host64BitPae", f::HOST_CR4, Off(cpu::CR4_PAE)),
        ("HostRip", f::HOST_RIP, Set(NOT_CANONICAL)),
    ] {
        case(guest, rule, &[(field, change)]);
    }
    case_if(guest, has_cet, "HostCetNeedsWp", &[(f::HOST_CR4, On(CR4_CET)), (f::HOST_CR0, Off(CR0_WP))]);
    for (control, rule, field, value) in [
        (exit::LOAD_CET, "HostSCet", f::HOST_S_CET, 1 << 6),
        (exit::LOAD_CET, "HostSsp", f::HOST_SSP, 1),
        (exit::LOAD_CET, "HostSspTable", f::HOST_SSP_TABLE, NOT_CANONICAL),
        (exit::LOAD_PKRS, "HostPkrs", f::HOST_PKRS, 1 << 32),
    ] {
        let changes = [(f::EXIT_CONTROLS, On(control.into())), (field, Set(value))];
        case_if(guest, setup::allowed_one(Kind::Exit, control), rule, &changes);
    }
}

fn guest_registers(guest: &mut Guest) {
    let fixed1 = caps::get(0x489);
    let unrestricted = setup::allowed_one(Kind::Secondary, secondary::UNRESTRICTED);
    for (rule, field, change) in [
        ("GuestCr0", f::GUEST_CR0, Off(cpu::CR0_NE)),
        ("GuestCr4", f::GUEST_CR4, Off(cpu::CR4_VMXE)),
        ("GuestIa32eNeedsPaging", f::GUEST_CR4, Off(cpu::CR4_PAE)),
        ("GuestCr3", f::GUEST_CR3, On(too_wide())),
        ("GuestDr7", f::GUEST_DR7, On(1 << 32)),
        ("GuestSysenter", f::GUEST_SYSENTER_ESP, Set(NOT_CANONICAL)),
        ("GuestPat", f::GUEST_PAT, Set(3)),
        ("GuestEferReserved", f::GUEST_EFER, On(2)),
        ("GuestEferLma", f::GUEST_EFER, Off(EFER_LMA)),
        ("GuestEferLme", f::GUEST_EFER, Off(EFER_LME)),
        ("GuestRflagsReserved", f::GUEST_RFLAGS, Off(2)),
        ("GuestRip", f::GUEST_RIP, Set(NOT_CANONICAL)),
        ("GuestDebugctl", f::GUEST_DEBUGCTL, Set(1 << 3)),
        ("GuestPendingDebugReserved", f::GUEST_PENDING_DEBUG, Set(1 << 4)),
    ] {
        case(guest, rule, &[(field, change)]);
    }
    case_if(
        guest,
        unrestricted,
        "GuestPgNeedsPe",
        &[(f::SECONDARY_CONTROLS, On(secondary::UNRESTRICTED.into())), (f::GUEST_CR0, Off(cpu::CR0_PE))],
    );
    case_if(
        guest,
        fixed1 & CR4_CET != 0,
        "GuestCetNeedsWp",
        &[(f::GUEST_CR4, On(CR4_CET)), (f::GUEST_CR0, Off(CR0_WP))],
    );
    for (control, rule, field, value) in [
        (entry::LOAD_CET, "GuestSCet", f::GUEST_S_CET, 1 << 6),
        (entry::LOAD_CET, "GuestSspTable", f::GUEST_SSP_TABLE, NOT_CANONICAL),
        (entry::LOAD_CET, "GuestSsp", f::GUEST_SSP, 1),
        (entry::LOAD_UINV, "GuestUinv", f::GUEST_UINV, 0x100),
    ] {
        let changes = [(f::ENTRY_CONTROLS, On(control.into())), (field, Set(value))];
        case_if(guest, setup::allowed_one(Kind::Entry, control), rule, &changes);
    }
    case_if(
        guest,
        fixed1 & CR4_PCIDE != 0,
        "GuestPcideNeedsIa32e",
        &[(f::ENTRY_CONTROLS, Off(entry::IA32E.into())), (f::GUEST_CR4, On(CR4_PCIDE))],
    );
}

fn guest_segments(guest: &mut Guest) {
    let usable_ldtr = (f::GUEST_LDTR_AR, Set(0x82));
    for (rule, changes) in [
        ("GuestTrSelector", &[(f::GUEST_TR, On(4))][..]),
        ("GuestLdtrSelector", &[usable_ldtr, (f::GUEST_LDTR_LIMIT, Set(7)), (f::GUEST_LDTR, On(4))]),
        ("GuestSsRpl", &[(f::GUEST_SS, On(RPL3))]),
        ("GuestBaseCanonical", &[(f::GUEST_FS_BASE, Set(NOT_CANONICAL))]),
        ("GuestBase32Bit", &[(f::GUEST_ES_BASE, Set(1 << 32))]),
        ("GuestV86Base", &[(f::GUEST_RFLAGS, On(RFLAGS_VM)), (f::GUEST_CS_BASE, Set(1))]),
        ("GuestCsType", &[(f::GUEST_CS_AR, Set(0xA099 & !8))]),
        ("GuestSsType", &[(f::GUEST_SS_AR, Set(0xC091))]),
        ("GuestDataType", &[(f::GUEST_DS_AR, Set(0xC092))]),
        ("GuestSegmentS", &[(f::GUEST_CS_AR, Off(1 << 4))]),
        ("GuestCsDpl", &[(f::GUEST_CS_AR, On(DPL3))]),
        ("GuestSsDpl", &[(f::GUEST_SS_AR, On(DPL3)), (f::GUEST_CS_AR, On(DPL3))]),
        ("GuestDataDpl", &[(f::GUEST_ES, On(RPL3))]),
        ("GuestSegmentPresent", &[(f::GUEST_SS_AR, Off(1 << 7))]),
        ("GuestSegmentReserved", &[(f::GUEST_DS_AR, On(1 << 8))]),
        ("GuestCsDb", &[(f::GUEST_CS_AR, On(1 << 14))]),
        ("GuestSegmentGranularity", &[(f::GUEST_SS_AR, Off(1 << 15))]),
        ("GuestTrType", &[(f::GUEST_TR_AR, Set(0x83))]),
        ("GuestTrRights", &[(f::GUEST_TR_AR, On(1 << 16))]),
        ("GuestLdtrRights", &[(f::GUEST_LDTR_AR, Set(0x83)), (f::GUEST_LDTR_LIMIT, Set(7))]),
        ("GuestTableBase", &[(f::GUEST_GDTR_BASE, Set(NOT_CANONICAL))]),
        ("GuestTableLimit", &[(f::GUEST_IDTR_LIMIT, On(1 << 16))]),
    ] {
        case(guest, rule, changes);
    }
}

fn guest_events(guest: &mut Guest) {
    let event = |value| (f::ENTRY_INTERRUPTION_INFO, Set(value));
    let blocked = |by| (f::GUEST_INTERRUPTIBILITY, Set(by));
    let interrupts = (f::GUEST_RFLAGS, On(RFLAGS_IF));
    let halted = (f::GUEST_ACTIVITY, Set(1));
    let length = (f::ENTRY_INSTRUCTION_LENGTH, Set(1));
    let can_halt = caps::get(setup::VMX_MISC) & 1 << 6 != 0;
    let in_ring_3 = [
        halted,
        (f::GUEST_SS_AR, On(DPL3)),
        (f::GUEST_CS_AR, On(DPL3)),
        (f::GUEST_SS, On(RPL3)),
        (f::GUEST_CS, On(RPL3)),
    ];
    for (possible, rule, changes) in [
        (true, "GuestRflagsIf", &[event(EXTERNAL)][..]),
        (true, "GuestActivity", &[(f::GUEST_ACTIVITY, Set(4))]),
        (can_halt, "GuestActivityHltDpl", &in_ring_3),
        (can_halt, "GuestActivityBlocking", &[halted, blocked(STI), interrupts]),
        (can_halt, "GuestActivityEvent", &[halted, event(INT3), length]),
        (true, "GuestInterruptibilityReserved", &[blocked(1 << 5)]),
        (true, "GuestPendingDebugStep", &[blocked(MOV_SS), (f::GUEST_PENDING_DEBUG, Set(1 << 14))]),
        (true, "GuestBlockingStiAndMovSs", &[blocked(STI | MOV_SS), interrupts]),
        (true, "GuestBlockingStiNeedsIf", &[blocked(STI)]),
        (true, "GuestBlockingExternalInterrupt", &[blocked(MOV_SS), event(EXTERNAL), interrupts]),
        (true, "GuestBlockingNmiMovSs", &[blocked(MOV_SS), event(NMI)]),
        (true, "GuestBlockingSmi", &[blocked(4)]),
    ] {
        case_if(guest, possible, rule, changes);
    }
}

/// Rules that look into memory.
fn guest_memory(guest: &mut Guest) {
    let link = |value| (f::LINK_POINTER, Set(value));
    let current = guest.vcpu.vmcs;
    case(guest, "GuestLinkPointerAddress", &[link(8)]);
    case(guest, "GuestLinkPointerRegion", &[link(pages::address(pages::page()))]);
    case(guest, "GuestLinkPointerCurrent", &[link(current)]);
    case(
        guest,
        "GuestPdptes",
        &[
            (f::ENTRY_CONTROLS, Off(entry::IA32E.into())),
            (f::GUEST_EFER, Set(0)),
            (f::GUEST_CS_AR, Set(0xC09B)),
            (f::GUEST_PDPTE0, Set(0)),
            (f::GUEST_PDPTE1, Set(0)),
            (f::GUEST_PDPTE2, Set(0)),
            (f::GUEST_PDPTE3, Set(3)),
        ],
    );
}

fn msr_loading(guest: &mut Guest) {
    let list = pages::page();
    let at = pages::address(list);
    let good = [u64::from(cpu::CSTAR), 0];
    for (rule, bad) in [
        ("MsrLoadReserved", [1 << 32 | u64::from(cpu::LSTAR), 0]),
        ("MsrLoadBase", [cpu::GS_BASE.into(), 0]),
        ("MsrLoadX2apic", [0x808, 0]),
        ("MsrLoadWithheld", [VMX_BASIC.into(), 0]),
        ("MsrLoadValue", [cpu::LSTAR.into(), NOT_CANONICAL]),
    ] {
        list[..2].copy_from_slice(&good);
        list[2..4].copy_from_slice(&bad);
        case(guest, rule, &[(f::ENTRY_MSR_LOAD_ADDR, Set(at)), (f::ENTRY_MSR_LOAD_COUNT, Set(2))]);
        if identity::refusal().qualification != 2 {
            report::fail(format_args!("{rule}: the second entry is the bad one"));
        }
    }
    cpu::wrmsr(cpu::CSTAR, 0);
}

/// Instructions: the error number has a name too.
fn instructions() {
    let vmclear: fn() -> Outcome = || vmx::vmclear(1);
    let vmread: fn() -> Outcome = || vmx::try_read(1 << 32).0;
    let invept: fn() -> Outcome = || vmx::invept(7, [0, 0]);
    let vmlaunch: fn() -> Outcome = vmx::vmlaunch;
    for (rule, error, instruction) in [
        ("VmclearInvalidAddress", 2, vmclear),
        ("UnsupportedVmcsComponent", 12, vmread),
        ("InvalidOperandToInveptInvvpid", 28, invept),
    ] {
        instruction_case(rule, error, instruction, Outcome::FailValid(error));
    }
    let (_, current) = vmx::vmptrst();
    let cleared = vmx::vmclear(current).succeeded();
    instruction_case("FailInvalid", 0, vmlaunch, Outcome::FailInvalid);
    // Nobody has a number for this but nvmx.
    instruction_case("VmclearInvalidAddress", 2, vmclear, Outcome::FailInvalid);
    if !cleared || !vmx::vmptrld(current).succeeded() {
        report::fail(format_args!("the VMCS could not be made current again"));
    }
}

fn instruction_case(rule: &str, number: u32, instruction: fn() -> Outcome, wanted: Outcome) {
    let result = got(instruction);
    let told = identity::refusal();
    report::record(Record::Explained, &[("rule", &told.name.as_str()), ("number", &told.number), ("result", &result)]);
    if result != Got::Outcome(wanted) || told.name != *rule || (told.what, told.number) != (1, number) {
        report::fail(format_args!("{rule}: {result}, and nvmx says {told:?}"));
    }
}
