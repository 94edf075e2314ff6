//! Each rule of VM entry: one vmcs12 that passes them all, and for every rule at least one change that breaks it and
//! nothing that is checked before it.

mod core_support;

use core_support::{CONTEXT, CURRENT, Memory, Vmcs, rich, valid_vmcs12};
use nvmx::error::VmxError;
use nvmx::nested::caps::{REVISION, offered};
use nvmx::nested::checks::{
    CheckId, Failure, GuestFailure, check_cached_controls, check_controls, check_guest, check_guest_beyond_hardware,
    check_host, check_live_controls,
};
use nvmx::vmx::caps::Basic;
use nvmx::vmx::field::{Area, Home};
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};
use std::collections::BTreeSet;

const EXTERNAL_INTERRUPT: u64 = 1 << 31 | 0x20;
const NMI: u64 = 1 << 31 | 2 << 8 | 2;
const GP: u64 = 1 << 31 | 3 << 8 | 1 << 11 | 13;
const INT3: u64 = 1 << 31 | 6 << 8 | 3;

/// What a group of rules came to: the first that failed, with what L2 gets to see.
#[derive(Debug, PartialEq)]
enum Verdict {
    Passed,
    VmFail(CheckId, VmxError),
    EntryExit(CheckId, u64),
}

fn run(v: &Vmcs, memory: &Memory, caps: &Capabilities) -> Verdict {
    if let Err(Failure { check, error }) = check_controls(v, caps) {
        return Verdict::VmFail(check, error);
    }
    if let Err(Failure { check, error }) = check_host(v, caps, true) {
        return Verdict::VmFail(check, error);
    }
    match check_guest(v, caps, &CONTEXT, memory) {
        Err(GuestFailure { check, qualification }) => Verdict::EntryExit(check, qualification),
        Ok(_) => Verdict::Passed,
    }
}

fn caps() -> Capabilities {
    offered(&rich())
}

type Change = fn(&mut Vmcs);

/// A 32-bit paging-off-capable guest without IA-32e mode: the base of many cases.
fn legacy(v: &mut Vmcs) {
    v.clear(VM_ENTRY_CONTROLS, 1 << 9).set(GUEST_IA32_EFER, 0).set(GUEST_CS_AR_BYTES, 0xC09B);
}

/// A real-mode guest, possible with unrestricted guest only.
fn real_mode(v: &mut Vmcs) {
    legacy(v);
    v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7).set(GUEST_CR0, 0x30);
}

/// A virtual-8086 guest.
fn v86(v: &mut Vmcs) {
    legacy(v);
    v.set(GUEST_RFLAGS, 0x2_0002);
    for (selector, base, limit, rights) in [
        (GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR_BYTES),
        (GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_AR_BYTES),
        (GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR_BYTES),
        (GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR_BYTES),
        (GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR_BYTES),
        (GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR_BYTES),
    ] {
        v.set(selector, 0x1234).set(base, 0x1_2340).set(limit, 0xFFFF).set(rights, 0xF3);
    }
}

fn usable_ldtr(v: &mut Vmcs) {
    v.set(GUEST_LDTR_SELECTOR, 0x30).set(GUEST_LDTR_AR_BYTES, 0x82).set(GUEST_LDTR_LIMIT, 0x7);
}

fn pae(v: &mut Vmcs) {
    legacy(v);
    v.or(GUEST_CR4, 1 << 5);
}

fn inject(v: &mut Vmcs, event: u64) -> &mut Vmcs {
    v.set(VM_ENTRY_INTR_INFO_FIELD, event)
}

const CASES: &[(CheckId, Change)] = &[
    // Controls
    (CheckId::PinControls, |v| _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 7)),
    (CheckId::PinControls, |v| _ = v.clear(PIN_BASED_VM_EXEC_CONTROL, 1 << 1)),
    (CheckId::PrimaryControls, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21)),
    (CheckId::PrimaryControls, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 17)),
    (CheckId::PrimaryControls, |v| _ = v.clear(CPU_BASED_VM_EXEC_CONTROL, 1 << 26)),
    (CheckId::SecondaryControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 14)),
    (CheckId::SecondaryControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 29)),
    (CheckId::IoBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25).set(IO_BITMAP_A, 0x1001)),
    (CheckId::IoBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25).set(IO_BITMAP_B, 1 << 39)),
    (CheckId::MsrBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 28).set(MSR_BITMAP, 0x800)),
    (CheckId::MsrBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 28).set(MSR_BITMAP, 1 << 63)),
    (CheckId::VirtualNmisNeedNmiExiting, |v| _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 5)),
    (CheckId::NmiWindowNeedsVirtualNmis, |v| {
        _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 3).or(CPU_BASED_VM_EXEC_CONTROL, 1 << 22)
    }),
    (CheckId::VpidNotZero, |v| _ = v.set(VIRTUAL_PROCESSOR_ID, 0)),
    (CheckId::EptpMemoryType, |v| _ = v.or(EPT_POINTER, 1)),
    (CheckId::EptpMemoryType, |v| _ = v.clear(EPT_POINTER, 2)),
    (CheckId::EptpWalkLength, |v| _ = v.clear(EPT_POINTER, 0x38)),
    (CheckId::EptpWalkLength, |v| _ = v.clear(EPT_POINTER, 0x38).or(EPT_POINTER, 4 << 3)),
    (CheckId::EptpAccessedDirty, |v| _ = v.or(EPT_POINTER, 1 << 6)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 7)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 11)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 39)),
    (CheckId::UnrestrictedGuestNeedsEpt, |v| _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 7)),
    (CheckId::ExitControls, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 12)),
    (CheckId::ExitControls, |v| _ = v.clear(VM_EXIT_CONTROLS, 1)),
    (CheckId::SaveTimerNeedsTimer, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 22)),
    (CheckId::ExitMsrStoreList, |v| _ = v.set(VM_EXIT_MSR_STORE_COUNT, 1).set(VM_EXIT_MSR_STORE_ADDR, 8)),
    (CheckId::ExitMsrLoadList, |v| _ = v.set(VM_EXIT_MSR_LOAD_COUNT, 2).set(VM_EXIT_MSR_LOAD_ADDR, (1 << 39) - 16)),
    (CheckId::EntryControls, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 10)),
    (CheckId::EntryControls, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 13)),
    (CheckId::EntryMsrLoadList, |v| _ = v.set(VM_ENTRY_MSR_LOAD_COUNT, 1).set(VM_ENTRY_MSR_LOAD_ADDR, u64::MAX << 4)),
    (CheckId::EntryMsrLoadList, |v| {
        _ = v.set(VM_ENTRY_MSR_LOAD_COUNT, 0xFFFF_FFFF).set(VM_ENTRY_MSR_LOAD_ADDR, 0x7F_F000_0000)
    }),
    (CheckId::Cr3TargetCount, |v| _ = v.set(CR3_TARGET_COUNT, 5)),
    (CheckId::EventType, |v| _ = inject(v, 1 << 31 | 1 << 8)),
    (CheckId::EventVector, |v| _ = inject(v, NMI + 1)),
    (CheckId::EventVector, |v| _ = inject(v, 1 << 31 | 3 << 8 | 32)),
    (CheckId::EventVector, |v| _ = inject(v, 1 << 31 | 7 << 8 | 1)),
    (CheckId::EventErrorCodeBit, |v| _ = inject(v, GP & !(1 << 11))),
    (CheckId::EventErrorCodeBit, |v| _ = inject(v, 1 << 31 | 3 << 8 | 1 << 11 | 6)),
    (CheckId::EventErrorCodeBit, |v| _ = inject(v, EXTERNAL_INTERRUPT | 1 << 11)),
    (CheckId::EventErrorCodeBit, |v| {
        real_mode(v);
        inject(v, GP);
    }),
    (CheckId::EventReserved, |v| _ = inject(v, GP | 1 << 12)),
    (CheckId::EventReserved, |v| _ = inject(v, GP | 1 << 30)),
    (CheckId::EventErrorCode, |v| _ = inject(v, GP).set(VM_ENTRY_EXCEPTION_ERROR_CODE, 0x1_0000)),
    (CheckId::EventInstructionLength, |v| _ = inject(v, INT3).set(VM_ENTRY_INSTRUCTION_LEN, 16)),
    // Host state
    (CheckId::HostAddressSpaceFitsMode, |v| _ = v.clear(VM_EXIT_CONTROLS, 1 << 9)),
    (CheckId::HostCr0, |v| _ = v.clear(HOST_CR0, 1 << 5)),
    (CheckId::HostCr0, |v| _ = v.clear(HOST_CR0, 1)),
    (CheckId::HostCr0, |v| _ = v.or(HOST_CR0, 1 << 32)),
    (CheckId::HostCr4, |v| _ = v.clear(HOST_CR4, 1 << 13)),
    (CheckId::HostCr4, |v| _ = v.or(HOST_CR4, 1 << 15)),
    (CheckId::HostCetNeedsWp, |v| _ = v.or(HOST_CR4, 1 << 23).clear(HOST_CR0, 1 << 16)),
    (CheckId::HostCr3, |v| _ = v.or(HOST_CR3, 1 << 39)),
    (CheckId::HostSysenter, |v| _ = v.set(HOST_IA32_SYSENTER_ESP, 1 << 47)),
    (CheckId::HostSysenter, |v| _ = v.set(HOST_IA32_SYSENTER_EIP, 1 << 63)),
    (CheckId::HostPat, |v| _ = v.set(HOST_IA32_PAT, 2 << 16)),
    (CheckId::HostEferReserved, |v| _ = v.or(HOST_IA32_EFER, 1 << 9)),
    (CheckId::HostEferMode, |v| _ = v.clear(HOST_IA32_EFER, 1 << 8)),
    (CheckId::HostEferMode, |v| _ = v.clear(HOST_IA32_EFER, 1 << 10)),
    (CheckId::HostSelectorRplTi, |v| _ = v.or(HOST_GS_SELECTOR, 3)),
    (CheckId::HostSelectorRplTi, |v| _ = v.or(HOST_TR_SELECTOR, 4)),
    (CheckId::HostCsNotNull, |v| _ = v.set(HOST_CS_SELECTOR, 0)),
    (CheckId::HostTrNotNull, |v| _ = v.set(HOST_TR_SELECTOR, 0)),
    (CheckId::HostBaseCanonical, |v| _ = v.set(HOST_FS_BASE, 1 << 47)),
    (CheckId::HostBaseCanonical, |v| _ = v.set(HOST_IDTR_BASE, 1 << 47)),
    (CheckId::Host64BitPae, |v| _ = v.clear(HOST_CR4, 1 << 5)),
    (CheckId::HostRip, |v| _ = v.set(HOST_RIP, 1 << 47)),
    // Guest registers
    (CheckId::GuestCr0, |v| _ = v.clear(GUEST_CR0, 1 << 5)),
    (CheckId::GuestCr0, |v| _ = v.clear(GUEST_CR0, 1 << 31)),
    (CheckId::GuestPgNeedsPe, |v| {
        legacy(v);
        v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7).clear(GUEST_CR0, 1);
    }),
    (CheckId::GuestCr4, |v| _ = v.clear(GUEST_CR4, 1 << 13)),
    (CheckId::GuestCetNeedsWp, |v| _ = v.or(GUEST_CR4, 1 << 23).clear(GUEST_CR0, 1 << 16)),
    (CheckId::GuestDebugctl, |v| _ = v.set(GUEST_IA32_DEBUGCTL, 1 << 3)),
    (CheckId::GuestDebugctl, |v| _ = v.set(GUEST_IA32_DEBUGCTL, 1 << 63)),
    (CheckId::GuestIa32eNeedsPaging, |v| _ = v.clear(GUEST_CR4, 1 << 5)),
    (CheckId::GuestIa32eNeedsPaging, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7).clear(GUEST_CR0, 1 << 31)),
    (CheckId::GuestPcideNeedsIa32e, |v| {
        legacy(v);
        v.or(GUEST_CR4, 1 << 17);
    }),
    (CheckId::GuestCr3, |v| _ = v.or(GUEST_CR3, 1 << 39)),
    (CheckId::GuestDr7, |v| _ = v.or(GUEST_DR7, 1 << 32)),
    (CheckId::GuestSysenter, |v| _ = v.set(GUEST_SYSENTER_EIP, 1 << 47)),
    (CheckId::GuestPat, |v| _ = v.set(GUEST_IA32_PAT, 3 << 56)),
    (CheckId::GuestEferReserved, |v| _ = v.or(GUEST_IA32_EFER, 1 << 12)),
    (CheckId::GuestEferLma, |v| _ = v.clear(GUEST_IA32_EFER, 1 << 10)),
    (CheckId::GuestEferLme, |v| _ = v.clear(GUEST_IA32_EFER, 1 << 8)),
    // Guest segments
    (CheckId::GuestTrSelector, |v| _ = v.or(GUEST_TR_SELECTOR, 4)),
    (CheckId::GuestLdtrSelector, |v| {
        usable_ldtr(v);
        v.or(GUEST_LDTR_SELECTOR, 4);
    }),
    (CheckId::GuestSsRpl, |v| _ = v.or(GUEST_SS_SELECTOR, 1)),
    (CheckId::GuestBaseCanonical, |v| _ = v.set(GUEST_GS_BASE, 1 << 47)),
    (CheckId::GuestBaseCanonical, |v| {
        usable_ldtr(v);
        v.set(GUEST_LDTR_BASE, 1 << 47);
    }),
    (CheckId::GuestBase32Bit, |v| _ = v.set(GUEST_CS_BASE, 1 << 32)),
    (CheckId::GuestBase32Bit, |v| _ = v.set(GUEST_ES_BASE, 1 << 32)),
    (CheckId::GuestV86Base, |v| {
        v86(v);
        v.or(GUEST_DS_BASE, 1);
    }),
    (CheckId::GuestV86Limit, |v| {
        v86(v);
        v.set(GUEST_FS_LIMIT, 0xFFFE);
    }),
    (CheckId::GuestV86Rights, |v| {
        v86(v);
        v.set(GUEST_SS_AR_BYTES, 0x93);
    }),
    (CheckId::GuestCsType, |v| _ = v.set(GUEST_CS_AR_BYTES, 0xA093)),
    (CheckId::GuestCsType, |v| _ = v.set(GUEST_CS_AR_BYTES, 0xA09A)),
    (CheckId::GuestSsType, |v| _ = v.set(GUEST_SS_AR_BYTES, 0xC091)),
    (CheckId::GuestDataType, |v| _ = v.set(GUEST_DS_AR_BYTES, 0xC092)),
    (CheckId::GuestDataType, |v| _ = v.set(GUEST_GS_AR_BYTES, 0xC099)),
    (CheckId::GuestSegmentS, |v| _ = v.clear(GUEST_CS_AR_BYTES, 1 << 4)),
    (CheckId::GuestSegmentS, |v| _ = v.clear(GUEST_FS_AR_BYTES, 1 << 4)),
    (CheckId::GuestCsDpl, |v| _ = v.or(GUEST_CS_AR_BYTES, 3 << 5)),
    (CheckId::GuestCsDpl, |v| {
        // Conforming code may be more privileged than SS, never less.
        v.set(GUEST_CS_AR_BYTES, 0xA09F | 1 << 5);
    }),
    (CheckId::GuestCsDpl, |v| {
        real_mode(v);
        v.set(GUEST_CS_AR_BYTES, 0xC093 | 3 << 5);
    }),
    (CheckId::GuestSsDpl, |v| _ = v.or(GUEST_SS_AR_BYTES, 3 << 5).or(GUEST_CS_AR_BYTES, 3 << 5)),
    (CheckId::GuestSsDpl, |v| {
        real_mode(v);
        v.or(GUEST_SS_AR_BYTES, 3 << 5).or(GUEST_CS_AR_BYTES, 3 << 5);
    }),
    (CheckId::GuestDataDpl, |v| _ = v.or(GUEST_ES_SELECTOR, 3)),
    (CheckId::GuestSegmentPresent, |v| _ = v.clear(GUEST_SS_AR_BYTES, 1 << 7)),
    (CheckId::GuestSegmentReserved, |v| _ = v.or(GUEST_CS_AR_BYTES, 1 << 8)),
    (CheckId::GuestSegmentReserved, |v| _ = v.or(GUEST_DS_AR_BYTES, 1 << 17)),
    (CheckId::GuestCsDb, |v| _ = v.or(GUEST_CS_AR_BYTES, 1 << 14)),
    (CheckId::GuestSegmentGranularity, |v| _ = v.set(GUEST_DS_LIMIT, 0xFFFF_FFFE)),
    (CheckId::GuestSegmentGranularity, |v| _ = v.clear(GUEST_SS_AR_BYTES, 1 << 15)),
    (CheckId::GuestTrType, |v| _ = v.set(GUEST_TR_AR_BYTES, 0x83)),
    (CheckId::GuestTrType, |v| _ = v.set(GUEST_TR_AR_BYTES, 0x89)),
    (CheckId::GuestTrRights, |v| _ = v.or(GUEST_TR_AR_BYTES, 1 << 16)),
    (CheckId::GuestTrRights, |v| _ = v.or(GUEST_TR_AR_BYTES, 1 << 4)),
    (CheckId::GuestTrRights, |v| _ = v.or(GUEST_TR_AR_BYTES, 1 << 15)),
    (CheckId::GuestLdtrRights, |v| {
        usable_ldtr(v);
        v.set(GUEST_LDTR_AR_BYTES, 0x83);
    }),
    (CheckId::GuestLdtrRights, |v| {
        usable_ldtr(v);
        v.set(GUEST_LDTR_LIMIT, 1 << 20);
    }),
    (CheckId::GuestTableBase, |v| _ = v.set(GUEST_GDTR_BASE, 1 << 47)),
    (CheckId::GuestTableLimit, |v| _ = v.set(GUEST_IDTR_LIMIT, 0x1_0000)),
    // Guest RIP and RFLAGS
    (CheckId::GuestRip, |v| _ = v.set(GUEST_RIP, 1 << 48)),
    (CheckId::GuestRip, |v| {
        legacy(v);
        v.set(GUEST_RIP, 1 << 32);
    }),
    (CheckId::GuestRflagsReserved, |v| _ = v.clear(GUEST_RFLAGS, 2)),
    (CheckId::GuestRflagsReserved, |v| _ = v.or(GUEST_RFLAGS, 1 << 15)),
    (CheckId::GuestRflagsReserved, |v| _ = v.or(GUEST_RFLAGS, 1 << 22)),
    (CheckId::GuestRflagsVm, |v| {
        v86(v);
        v.or(VM_ENTRY_CONTROLS, 1 << 9).set(GUEST_IA32_EFER, 0xD01);
    }),
    (CheckId::GuestRflagsIf, |v| _ = inject(v, EXTERNAL_INTERRUPT)),
    // Guest non-register state
    (CheckId::GuestActivity, |v| _ = v.set(GUEST_ACTIVITY_STATE, 2)),
    (CheckId::GuestActivity, |v| _ = v.set(GUEST_ACTIVITY_STATE, 3)),
    (CheckId::GuestActivity, |v| _ = v.set(GUEST_ACTIVITY_STATE, 4)),
    (CheckId::GuestActivityHltDpl, |v| {
        v.set(GUEST_ACTIVITY_STATE, 1).or(GUEST_SS_AR_BYTES, 3 << 5).or(GUEST_CS_AR_BYTES, 3 << 5);
        v.or(GUEST_SS_SELECTOR, 3).or(GUEST_CS_SELECTOR, 3);
    }),
    (CheckId::GuestActivityBlocking, |v| {
        _ = v.set(GUEST_ACTIVITY_STATE, 1).set(GUEST_INTERRUPTIBILITY_INFO, 1).or(GUEST_RFLAGS, 1 << 9)
    }),
    (CheckId::GuestActivityEvent, |v| _ = inject(v, GP).set(GUEST_ACTIVITY_STATE, 1)),
    (CheckId::GuestActivityEvent, |v| {
        _ = inject(v, INT3).set(VM_ENTRY_INSTRUCTION_LEN, 1).set(GUEST_ACTIVITY_STATE, 1)
    }),
    (CheckId::GuestInterruptibilityReserved, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 1 << 5)),
    (CheckId::GuestBlockingStiAndMovSs, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 3).or(GUEST_RFLAGS, 1 << 9)),
    (CheckId::GuestBlockingStiNeedsIf, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 1)),
    (CheckId::GuestBlockingExternalInterrupt, |v| {
        _ = inject(v, EXTERNAL_INTERRUPT).set(GUEST_INTERRUPTIBILITY_INFO, 2).or(GUEST_RFLAGS, 1 << 9)
    }),
    (CheckId::GuestBlockingNmiMovSs, |v| _ = inject(v, NMI).set(GUEST_INTERRUPTIBILITY_INFO, 2)),
    (CheckId::GuestBlockingNmiSti, |v| _ = inject(v, NMI).set(GUEST_INTERRUPTIBILITY_INFO, 1).or(GUEST_RFLAGS, 1 << 9)),
    (CheckId::GuestBlockingSmi, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 4)),
    (CheckId::GuestBlockingNmi, |v| {
        _ = inject(v, NMI).or(PIN_BASED_VM_EXEC_CONTROL, 1 << 3 | 1 << 5).set(GUEST_INTERRUPTIBILITY_INFO, 8)
    }),
    (CheckId::GuestBlockingEnclave, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 0x12)),
    (CheckId::GuestPendingDebugReserved, |v| _ = v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 4)),
    (CheckId::GuestPendingDebugReserved, |v| _ = v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 13)),
    (CheckId::GuestPendingDebugReserved, |v| _ = v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 15)),
    (CheckId::GuestPendingDebugReserved, |v| _ = v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 63)),
    (CheckId::GuestPendingDebugStep, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 2).or(GUEST_RFLAGS, 1 << 8)),
    (CheckId::GuestPendingDebugStep, |v| _ = v.set(GUEST_ACTIVITY_STATE, 1).set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14)),
    (CheckId::GuestPendingDebugStep, |v| {
        v.set(GUEST_ACTIVITY_STATE, 1).set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14).or(GUEST_RFLAGS, 1 << 8);
        v.set(GUEST_IA32_DEBUGCTL, 2);
    }),
    (CheckId::GuestPendingDebugRtm, |v| _ = v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16)),
    (CheckId::GuestLinkPointerAddress, |v| _ = v.set(VMCS_LINK_POINTER, 0x5008)),
    (CheckId::GuestLinkPointerAddress, |v| _ = v.set(VMCS_LINK_POINTER, u64::MAX - 0xFFF)),
    (CheckId::GuestLinkPointerRegion, |v| _ = v.set(VMCS_LINK_POINTER, 0x5000)),
    (CheckId::GuestLinkPointerRegion, |v| _ = v.set(VMCS_LINK_POINTER, 32 << 20)),
    (CheckId::GuestLinkPointerCurrent, |v| _ = v.set(VMCS_LINK_POINTER, CURRENT.get())),
    (CheckId::GuestPdptes, |v| {
        pae(v);
        v.set(GUEST_PDPTE3, 0x3);
    }),
    (CheckId::GuestPdptes, |v| {
        pae(v);
        v.set(GUEST_PDPTE0, 1 << 39 | 1);
    }),
    (CheckId::GuestPdptes, |v| {
        // Without EPT they are read from the table at CR3, here outside of memory.
        pae(v);
        v.clear(SECONDARY_VM_EXEC_CONTROL, 1 << 1).set(GUEST_CR3, 64 << 20);
    }),
];

/// Rules that need a host outside of IA-32e mode.
const CASES_32_BIT_HOST: &[(CheckId, Change)] = &[
    (CheckId::HostAddressSpaceFitsMode, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 9)),
    (CheckId::HostAddressSpaceFitsMode, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 9)),
    (CheckId::HostSsNotNull, |v| _ = v.set(HOST_SS_SELECTOR, 0)),
    (CheckId::Host32BitPcide, |v| _ = v.or(HOST_CR4, 1 << 17)),
    (CheckId::HostRip, |v| _ = v.set(HOST_RIP, 1 << 32)),
    (CheckId::HostEferMode, |v| _ = v.or(HOST_IA32_EFER, 1 << 10)),
];

fn valid_32_bit() -> Vmcs {
    let mut v = valid_vmcs12(&caps());
    v.clear(VM_EXIT_CONTROLS, 1 << 9).set(HOST_IA32_EFER, 0);
    legacy(&mut v);
    v
}

fn expected(check: CheckId) -> Verdict {
    use CheckId::*;
    let name = check.name();
    if name.starts_with("Host") {
        return Verdict::VmFail(check, VmxError::EntryInvalidHostStateField);
    }
    if !name.starts_with("Guest") {
        return Verdict::VmFail(check, VmxError::EntryInvalidControlField);
    }
    let qualification = match check {
        GuestPdptes => 2,
        GuestBlockingNmiSti => 3,
        GuestLinkPointerAddress | GuestLinkPointerRegion | GuestLinkPointerCurrent => 4,
        _ => 0,
    };
    Verdict::EntryExit(check, qualification)
}

#[test]
fn the_valid_vmcs12_passes_and_so_do_its_variants() {
    let variants: &[(&str, Change)] = &[
        ("64-bit", |_| ()),
        ("legacy", legacy),
        ("real mode", real_mode),
        ("virtual-8086", v86),
        ("LDT", usable_ldtr),
        ("PAE", pae),
        ("halted", |v| _ = v.set(GUEST_ACTIVITY_STATE, 1)),
        ("inject #GP", |v| _ = inject(v, GP).set(VM_ENTRY_EXCEPTION_ERROR_CODE, 0xFFFF)),
        ("inject NMI", |v| _ = inject(v, NMI)),
        ("inject NMI into HLT", |v| _ = inject(v, NMI).set(GUEST_ACTIVITY_STATE, 1)),
        ("inject interrupt", |v| _ = inject(v, EXTERNAL_INTERRUPT).or(GUEST_RFLAGS, 1 << 9)),
        ("inject INT3 of no length", |v| _ = inject(v, INT3)),
        ("inject MTF", |v| _ = inject(v, 1 << 31 | 7 << 8)),
        ("real mode exception", |v| {
            real_mode(v);
            inject(v, GP & !(1 << 11));
        }),
        ("no event: the rest of the field is not looked at", |v| _ = inject(v, 0x7FFF_FFFF)),
        ("uncacheable EPT structures", |v| _ = v.clear(EPT_POINTER, 7)),
        ("empty MSR list anywhere", |v| _ = v.set(VM_EXIT_MSR_LOAD_ADDR, u64::MAX)),
        ("list up to the end of memory", |v| {
            _ = v.set(VM_EXIT_MSR_LOAD_ADDR, (1 << 39) - 16).set(VM_EXIT_MSR_LOAD_COUNT, 1)
        }),
        ("conforming code", |v| _ = v.set(GUEST_CS_AR_BYTES, 0xA09F)),
        ("conforming code of ring 0 run in ring 3", |v| {
            v.set(GUEST_CS_AR_BYTES, 0xA09F).or(GUEST_CS_SELECTOR, 3);
            v.or(GUEST_SS_AR_BYTES, 3 << 5).or(GUEST_SS_SELECTOR, 3);
        }),
        ("conforming code in a data register", |v| _ = v.set(GUEST_DS_AR_BYTES, 0xC09F).or(GUEST_DS_SELECTOR, 3)),
        ("unusable data segments", |v| {
            for field in [GUEST_SS_AR_BYTES, GUEST_DS_AR_BYTES, GUEST_ES_AR_BYTES, GUEST_FS_AR_BYTES, GUEST_GS_AR_BYTES]
            {
                v.set(field, 0x1_0000);
            }
            v.set(GUEST_SS_SELECTOR, 0);
        }),
        ("RIP in the upper half", |v| _ = v.set(GUEST_RIP, 0xFFFF_8000_0000_0000)),
        ("RIP just above the lower half", |v| _ = v.set(GUEST_RIP, 1 << 47)),
        ("stepping past MOV SS", |v| {
            v.set(GUEST_INTERRUPTIBILITY_INFO, 2).or(GUEST_RFLAGS, 1 << 8);
            v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14);
        }),
        ("secondary controls that are not active", |v| {
            v.clear(CPU_BASED_VM_EXEC_CONTROL, 1 << 31).set(SECONDARY_VM_EXEC_CONTROL, 0xFFFF_FFFF);
            v.set(VIRTUAL_PROCESSOR_ID, 0).set(EPT_POINTER, 0);
        }),
        ("values that are not loaded", |v| {
            v.clear(VM_ENTRY_CONTROLS, 1 << 2 | 1 << 14 | 1 << 15).clear(VM_EXIT_CONTROLS, 1 << 19 | 1 << 21);
            v.set(GUEST_IA32_DEBUGCTL, !2).set(GUEST_DR7, u64::MAX);
            for field in [GUEST_IA32_PAT, GUEST_IA32_EFER, HOST_IA32_PAT, HOST_IA32_EFER] {
                v.set(field, u64::MAX);
            }
        }),
    ];
    for (name, change) in variants {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        assert_eq!(run(&v, &Memory::default(), &caps()), Verdict::Passed, "{name}");
    }
    let v = valid_32_bit();
    assert!(check_controls(&v, &caps()).is_ok() && check_host(&v, &caps(), false).is_ok());
}

#[test]
fn each_rule_fails_by_its_own_name() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        assert_eq!(run(&v, &Memory::default(), &caps()), expected(*check));
    }
    for (check, change) in CASES_32_BIT_HOST {
        let mut v = valid_32_bit();
        change(&mut v);
        let failure = check_host(&v, &caps(), false).unwrap_err();
        assert_eq!(failure, Failure { check: *check, error: VmxError::EntryInvalidHostStateField });
    }
}

#[test]
fn every_rule_has_a_case() {
    let covered: BTreeSet<_> = CASES.iter().chain(CASES_32_BIT_HOST).map(|(check, _)| *check as u16).collect();
    let missing: Vec<_> = CheckId::ALL.iter().filter(|check| !covered.contains(&(**check as u16))).collect();
    // Implied by HostAddressSpaceFitsMode for a processor outside of IA-32e mode, and kept because the SDM states it.
    assert_eq!(missing, [&CheckId::Host32BitGuest]);
}

#[test]
fn a_64_bit_guest_of_a_32_bit_host_fails_even_if_the_entry_is_made_in_long_mode() {
    let mut v = valid_vmcs12(&caps());
    v.clear(VM_EXIT_CONTROLS, 1 << 9);
    assert_eq!(check_host(&v, &caps(), true).unwrap_err().check, CheckId::HostAddressSpaceFitsMode);
}

#[test]
fn names_and_texts_are_unique() {
    let names: BTreeSet<_> = CheckId::ALL.iter().map(|c| c.name()).collect();
    let texts: BTreeSet<_> = CheckId::ALL.iter().map(|c| c.text()).collect();
    assert_eq!((names.len(), texts.len()), (CheckId::ALL.len(), CheckId::ALL.len()));
    assert!(texts.iter().all(|text| !text.is_empty()));
}

#[test]
fn controls_come_before_host_state_and_host_state_before_guest_state() {
    let mut v = valid_vmcs12(&caps());
    v.set(GUEST_RFLAGS, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::GuestRflagsReserved));
    v.set(HOST_CS_SELECTOR, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::HostCsNotNull));
    v.set(CR3_TARGET_COUNT, 5);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::Cr3TargetCount));
    v.set(PIN_BASED_VM_EXEC_CONTROL, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::PinControls));
}

/// Refuses to be asked for a field whose value lives in vmcs02.
struct CacheOnly<'a>(&'a Vmcs);

impl Fields for CacheOnly<'_> {
    fn get(&self, field: Field) -> u64 {
        assert_eq!(field.home(), Home::Cache, "{field} would cost a VMREAD of vmcs02");
        self.0.get(field)
    }
}

#[test]
fn the_checks_of_every_entry_touch_only_nvmx_s_copy() {
    let mut v = valid_vmcs12(&caps());
    v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25 | 1 << 28).or(SECONDARY_VM_EXEC_CONTROL, 1 << 7);
    let all_lists = [VM_EXIT_MSR_STORE_COUNT, VM_EXIT_MSR_LOAD_COUNT, VM_ENTRY_MSR_LOAD_COUNT];
    all_lists.iter().for_each(|&count| _ = v.set(count, 3));
    assert!(check_cached_controls(&CacheOnly(&v), &caps()).is_ok());
    assert!(check_host(&CacheOnly(&v), &caps(), true).is_ok());
}

#[test]
fn cached_and_live_rules_together_are_all_rules_on_controls() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        let split = check_cached_controls(&v, &caps()).map(|_| ()).and_then(|()| check_live_controls(&v, &caps()));
        assert_eq!(split, check_controls(&v, &caps()).map(|_| ()), "{check:?}");
    }
}

#[test]
fn error_code_of_an_exception_is_free_where_the_processor_says_so() {
    let free = Capabilities { basic: Basic(caps().basic.0 | 1 << 56), ..caps() };
    let mut v = valid_vmcs12(&free);
    inject(&mut v, GP & !(1 << 11));
    assert!(check_controls(&v, &free).is_ok());
    inject(&mut v, 1 << 31 | 3 << 8 | 1 << 11 | 6);
    assert!(check_controls(&v, &free).is_ok());
    inject(&mut v, NMI | 1 << 11);
    assert_eq!(check_controls(&v, &free).unwrap_err().check, CheckId::EventErrorCodeBit);
}

#[test]
fn link_pointer_to_an_ordinary_vmcs_is_accepted_and_to_a_shadow_is_not() {
    let mut v = valid_vmcs12(&caps());
    v.set(VMCS_LINK_POINTER, 0x5000);
    let with = |word| Memory([(0x5000, word)].into());
    assert_eq!(run(&v, &with(u64::from(REVISION)), &caps()), Verdict::Passed);
    let shadow = u64::from(REVISION | 1 << 31);
    assert_eq!(run(&v, &with(shadow), &caps()), expected(CheckId::GuestLinkPointerRegion));
}

#[test]
fn pdptes_of_a_guest_without_ept_come_from_its_memory() {
    let mut v = valid_vmcs12(&caps());
    pae(&mut v);
    v.clear(SECONDARY_VM_EXEC_CONTROL, 1 << 1).set(GUEST_CR3, 0x3020).set(GUEST_PDPTE0, u64::MAX);
    let with = |word| Memory([(0x3038, word)].into());
    assert_eq!(run(&v, &with(0x4001), &caps()), Verdict::Passed);
    assert_eq!(run(&v, &with(u64::MAX - 1), &caps()), Verdict::Passed, "not present");
    assert_eq!(run(&v, &with(0x4003), &caps()), expected(CheckId::GuestPdptes));
}

#[test]
fn what_hardware_cannot_see_is_checked_before_the_entry() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        let full = run(&v, &Memory::default(), &caps());
        let before = check_guest_beyond_hardware(&v, &caps(), &CONTEXT, &Memory::default());
        let must_see = matches!(
            check,
            CheckId::GuestActivity
                | CheckId::GuestLinkPointerAddress
                | CheckId::GuestLinkPointerRegion
                | CheckId::GuestLinkPointerCurrent
        );
        match before {
            Err(GuestFailure { check: found, qualification }) => {
                assert_eq!(full, Verdict::EntryExit(found, qualification));
                assert_eq!(found, *check);
            }
            Ok(()) => assert!(!must_see, "{check:?}"),
        }
    }
}

#[test]
fn rules_ask_for_no_exit_information() {
    struct NoExitInfo<'a>(&'a Vmcs);
    impl Fields for NoExitInfo<'_> {
        fn get(&self, field: Field) -> u64 {
            assert_ne!(field.area(), Area::ExitInfo, "{field}");
            self.0.get(field)
        }
    }
    let v = valid_vmcs12(&caps());
    let v = NoExitInfo(&v);
    assert!(check_controls(&v, &caps()).is_ok());
    assert!(check_host(&v, &caps(), true).is_ok());
    assert!(check_guest(&v, &caps(), &CONTEXT, &Memory::default()).is_ok());
}

#[test]
fn every_base_and_every_sysenter_address_must_be_canonical() {
    let fails = |field, edge| {
        let mut v = valid_vmcs12(&caps());
        usable_ldtr(&mut v);
        v.set(field, edge);
        run(&v, &Memory::default(), &caps())
    };
    let cases = [
        (CheckId::HostBaseCanonical, &[HOST_FS_BASE, HOST_GS_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_TR_BASE][..]),
        (CheckId::HostSysenter, &[HOST_IA32_SYSENTER_ESP, HOST_IA32_SYSENTER_EIP][..]),
        (CheckId::GuestBaseCanonical, &[GUEST_FS_BASE, GUEST_GS_BASE, GUEST_TR_BASE, GUEST_LDTR_BASE][..]),
        (CheckId::GuestSysenter, &[GUEST_SYSENTER_ESP, GUEST_SYSENTER_EIP][..]),
        (CheckId::GuestTableBase, &[GUEST_GDTR_BASE, GUEST_IDTR_BASE][..]),
    ];
    for (check, fields) in cases {
        for &field in fields {
            assert_eq!(fails(field, 1 << 47), expected(check), "{field}");
            assert_eq!(fails(field, (u64::MAX << 47) - 1), expected(check), "{field}");
            assert_eq!(fails(field, (1 << 47) - 1), Verdict::Passed, "{field}");
            assert_eq!(fails(field, u64::MAX << 47), Verdict::Passed, "{field}");
        }
    }
}

#[test]
fn events_that_each_activity_state_takes() {
    // The machine under nvmx has all four states; the rules are the same for it.
    let hw = rich();
    let mc = 1 << 31 | 3 << 8 | 18;
    let db = 1 << 31 | 3 << 8 | 1;
    let mtf = 1 << 31 | 7 << 8;
    let events = [NMI, mc, db, mtf, GP, INT3, EXTERNAL_INTERRUPT];
    let taken = [(0, 0b111_1111), (1, 0b100_1111), (2, 0b000_0011), (3, 0)];
    for (state, taken) in taken {
        for (i, event) in events.into_iter().enumerate() {
            let mut v = valid_vmcs12(&hw);
            inject(&mut v, event).set(VM_ENTRY_INSTRUCTION_LEN, 1).set(GUEST_ACTIVITY_STATE, state);
            v.or(GUEST_RFLAGS, 1 << 9);
            let verdict = run(&v, &Memory::default(), &hw);
            let expected = if taken >> i & 1 == 1 { Verdict::Passed } else { expected(CheckId::GuestActivityEvent) };
            assert_eq!(verdict, expected, "state {state}, event {event:#x}");
        }
    }
}
