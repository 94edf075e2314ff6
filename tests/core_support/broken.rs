//! For every rule of VM entry at least one change that breaks it and nothing that is checked before it, and the kinds of
//! guest that the changes start from.

use super::{CURRENT, Vmcs};
use nvmx::rules::checks::CheckId;
use nvmx::vmx::Field::*;

pub const EXTERNAL_INTERRUPT: u64 = 1 << 31 | 0x20;
pub const NMI: u64 = 1 << 31 | 2 << 8 | 2;
pub const GP: u64 = 1 << 31 | 3 << 8 | 1 << 11 | 13;
pub const INT3: u64 = 1 << 31 | 6 << 8 | 3;

pub type Change = fn(&mut Vmcs);

/// A 32-bit guest outside of IA-32e mode: the base of many cases.
pub fn legacy(v: &mut Vmcs) {
    v.clear(VM_ENTRY_CONTROLS, 1 << 9).set(GUEST_IA32_EFER, 0).set(GUEST_CS_AR_BYTES, 0xC09B);
}

/// A real-mode guest, possible with unrestricted guest only.
pub fn real_mode(v: &mut Vmcs) {
    legacy(v);
    v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7).set(GUEST_CR0, 0x30);
}

/// A virtual-8086 guest.
pub fn v86(v: &mut Vmcs) {
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

pub fn usable_ldtr(v: &mut Vmcs) {
    v.set(GUEST_LDTR_SELECTOR, 0x30).set(GUEST_LDTR_AR_BYTES, 0x82).set(GUEST_LDTR_LIMIT, 0x7);
}

pub fn pae(v: &mut Vmcs) {
    legacy(v);
    v.or(GUEST_CR4, 1 << 5);
}

pub fn inject(v: &mut Vmcs, event: u64) -> &mut Vmcs {
    v.set(VM_ENTRY_INTR_INFO_FIELD, event)
}

/// With a virtual-APIC page.
pub fn tpr_shadow(v: &mut Vmcs) -> &mut Vmcs {
    v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21).set(VIRTUAL_APIC_ADDRESS, 0x5000)
}

/// With virtual interrupts, delivered and posted.
pub fn posted(v: &mut Vmcs) -> &mut Vmcs {
    tpr_shadow(v).or(SECONDARY_VM_EXEC_CONTROL, 1 << 9).or(PIN_BASED_VM_EXEC_CONTROL, 1 << 7 | 1);
    v.or(VM_EXIT_CONTROLS, 1 << 15).set(POSTED_INTR_DESC_ADDR, 0x6040).set(POSTED_INTR_NOTIFICATION_VECTOR, 0xF2)
}

pub const CASES: &[(CheckId, Change)] = &[
    // Controls
    (CheckId::PinControls, |v| _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 8)),
    (CheckId::PinControls, |v| _ = v.clear(PIN_BASED_VM_EXEC_CONTROL, 1 << 1)),
    (CheckId::PrimaryControls, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 18)),
    (CheckId::PrimaryControls, |v| _ = v.clear(CPU_BASED_VM_EXEC_CONTROL, 1 << 26)),
    (CheckId::SecondaryControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 15)),
    (CheckId::SecondaryControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 29)),
    (CheckId::TertiaryControls, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 17).set(TERTIARY_VM_EXEC_CONTROL, 1 << 4)),
    (CheckId::TertiaryControls, |v| {
        _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 17).set(TERTIARY_VM_EXEC_CONTROL, 1 << 63 | 1 << 7)
    }),
    (CheckId::IoBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25).set(IO_BITMAP_A, 0x1001)),
    (CheckId::IoBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25).set(IO_BITMAP_B, 1 << 39)),
    (CheckId::MsrBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 28).set(MSR_BITMAP, 0x800)),
    (CheckId::MsrBitmapAddress, |v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 28).set(MSR_BITMAP, 1 << 63)),
    (CheckId::VirtualApicAddress, |v| _ = tpr_shadow(v).set(VIRTUAL_APIC_ADDRESS, 0x5800)),
    (CheckId::VirtualApicAddress, |v| _ = tpr_shadow(v).set(VIRTUAL_APIC_ADDRESS, 1 << 39)),
    (CheckId::VirtualApicNeedsTprShadow, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 4)),
    (CheckId::VirtualApicNeedsTprShadow, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 8)),
    (CheckId::VirtualApicNeedsTprShadow, |v| {
        _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 9).or(PIN_BASED_VM_EXEC_CONTROL, 1)
    }),
    (CheckId::VirtualInterruptsNeedExiting, |v| _ = posted(v).clear(PIN_BASED_VM_EXEC_CONTROL, 1)),
    (CheckId::ApicAccessAddress, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1).set(APIC_ACCESS_ADDRESS, 0xFEE0_0010)),
    (CheckId::ApicAccessAddress, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1).set(APIC_ACCESS_ADDRESS, 1 << 40)),
    (CheckId::ApicAccessesExcludeX2apicMode, |v| _ = tpr_shadow(v).or(SECONDARY_VM_EXEC_CONTROL, 1 | 1 << 4)),
    (CheckId::PostedInterruptsNeedDelivery, |v| _ = posted(v).clear(SECONDARY_VM_EXEC_CONTROL, 1 << 9)),
    (CheckId::PostedInterruptsNeedAcknowledge, |v| _ = posted(v).clear(VM_EXIT_CONTROLS, 1 << 15)),
    (CheckId::PostedDescriptorAddress, |v| _ = posted(v).set(POSTED_INTR_DESC_ADDR, 0x6020)),
    (CheckId::PostedDescriptorAddress, |v| _ = posted(v).set(POSTED_INTR_DESC_ADDR, 1 << 63)),
    (CheckId::PostedInterruptVector, |v| _ = posted(v).set(POSTED_INTR_NOTIFICATION_VECTOR, 0x100)),
    (CheckId::TprThresholdReserved, |v| _ = tpr_shadow(v).set(TPR_THRESHOLD, 0x10)),
    (CheckId::TprThresholdReserved, |v| {
        // Whether or not accesses are virtualized.
        _ = tpr_shadow(v).or(SECONDARY_VM_EXEC_CONTROL, 1).set(TPR_THRESHOLD, 1 << 31)
    }),
    (CheckId::VirtualNmisNeedNmiExiting, |v| _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 5)),
    (CheckId::NmiWindowNeedsVirtualNmis, |v| {
        _ = v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 3).or(CPU_BASED_VM_EXEC_CONTROL, 1 << 22)
    }),
    (CheckId::ShadowBitmapAddresses, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 14).set(VMREAD_BITMAP, 0x800)),
    (CheckId::ShadowBitmapAddresses, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 14).set(VMWRITE_BITMAP, 1 << 63)),
    (CheckId::VpidNotZero, |v| _ = v.set(VIRTUAL_PROCESSOR_ID, 0)),
    (CheckId::EptpMemoryType, |v| _ = v.or(EPT_POINTER, 1)),
    (CheckId::EptpMemoryType, |v| _ = v.clear(EPT_POINTER, 2)),
    (CheckId::EptpWalkLength, |v| _ = v.clear(EPT_POINTER, 0x38)),
    (CheckId::EptpWalkLength, |v| _ = v.clear(EPT_POINTER, 0x38).or(EPT_POINTER, 5 << 3)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 7)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 11)),
    (CheckId::EptpReserved, |v| _ = v.or(EPT_POINTER, 1 << 39)),
    (CheckId::UnrestrictedGuestNeedsEpt, |v| _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 7)),
    (CheckId::ModeBasedExecuteNeedsEpt, |v| _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 22)),
    (CheckId::SubPagesNeedEpt, |v| _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 23)),
    (CheckId::SubPageTablePointer, |v| {
        _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 23).set(SUB_PAGE_PERMISSION_TABLE_POINTER, 0x4010)
    }),
    (CheckId::SubPageTablePointer, |v| {
        _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 23).set(SUB_PAGE_PERMISSION_TABLE_POINTER, 1 << 39)
    }),
    (CheckId::VeInformationAddress, |v| {
        _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 18).set(VIRTUALIZATION_EXCEPTION_INFO, 0x1800)
    }),
    (CheckId::VeInformationAddress, |v| {
        _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 18).set(VIRTUALIZATION_EXCEPTION_INFO, 1 << 39)
    }),
    (CheckId::VmFunctionControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 13).set(VM_FUNCTION_CONTROLS, 2)),
    (CheckId::VmFunctionControls, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 13).set(VM_FUNCTION_CONTROLS, 1 << 63)),
    (CheckId::EptpSwitchingNeedsEpt, |v| {
        _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 13).set(VM_FUNCTION_CONTROLS, 1)
    }),
    (CheckId::EptpListAddress, |v| {
        v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 13).set(VM_FUNCTION_CONTROLS, 1).set(EPTP_LIST_ADDRESS, 0x1008);
    }),
    (CheckId::EptpListAddress, |v| {
        v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 13).set(VM_FUNCTION_CONTROLS, 1).set(EPTP_LIST_ADDRESS, 1 << 39);
    }),
    (CheckId::TscMultiplierNotZero, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 25)),
    (CheckId::PmlNeedsEpt, |v| _ = v.set(SECONDARY_VM_EXEC_CONTROL, 1 << 5 | 1 << 17)),
    (CheckId::PmlAddress, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 17).set(PML_ADDRESS, 0x1008)),
    (CheckId::PmlAddress, |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 17).set(PML_ADDRESS, 1 << 39)),
    (CheckId::ExitControls, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 23)),
    (CheckId::ExitControls, |v| _ = v.clear(VM_EXIT_CONTROLS, 1)),
    (CheckId::SaveTimerNeedsTimer, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 22)),
    (CheckId::ExitMsrStoreList, |v| _ = v.set(VM_EXIT_MSR_STORE_COUNT, 1).set(VM_EXIT_MSR_STORE_ADDR, 8)),
    (CheckId::ExitMsrLoadList, |v| _ = v.set(VM_EXIT_MSR_LOAD_COUNT, 2).set(VM_EXIT_MSR_LOAD_ADDR, (1 << 39) - 16)),
    (CheckId::EntryControls, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 10)),
    (CheckId::EntryControls, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 16)),
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
    (CheckId::TprThresholdFitsVtpr, |v| _ = tpr_shadow(v).set(TPR_THRESHOLD, 1)),
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
    (CheckId::HostSCet, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_S_CET, 1 << 6)),
    (CheckId::HostSCet, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_S_CET, 3 << 10)),
    (CheckId::HostSCet, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_S_CET, 1 << 47)),
    (CheckId::HostSsp, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_SSP, 2)),
    (CheckId::HostSsp, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_SSP, 1 << 63)),
    (CheckId::HostSspTable, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_INTR_SSP_TABLE, 1 << 47)),
    (CheckId::HostPkrs, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 29).set(HOST_IA32_PKRS, 1 << 32)),
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
    (CheckId::GuestSCet, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_S_CET, 1 << 9)),
    (CheckId::GuestSCet, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_S_CET, 3 << 10)),
    (CheckId::GuestSCet, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_S_CET, 1 << 62)),
    (CheckId::GuestSCet, |v| {
        legacy(v);
        v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_S_CET, 1 << 32);
    }),
    (CheckId::GuestSspTable, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_INTR_SSP_TABLE, 1 << 47)),
    (CheckId::HostPerfGlobalCtrl, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 12).set(HOST_IA32_PERF_GLOBAL_CTRL, 1 << 4)),
    (CheckId::HostPerfGlobalCtrl, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 12).set(HOST_IA32_PERF_GLOBAL_CTRL, 1 << 35)),
    (CheckId::GuestPerfGlobalCtrl, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 13).set(GUEST_IA32_PERF_GLOBAL_CTRL, 1 << 31)),
    (CheckId::GuestPkrs, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 22).set(GUEST_IA32_PKRS, 1 << 63)),
    (CheckId::GuestUinv, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 19).set(GUEST_UINV, 0x100)),
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
    (CheckId::GuestSsp, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_SSP, 1)),
    (CheckId::GuestSsp, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_SSP, 1 << 47)),
    (CheckId::GuestSsp, |v| {
        legacy(v);
        v.or(VM_ENTRY_CONTROLS, 1 << 20).set(GUEST_SSP, 1 << 32);
    }),
    // Guest non-register state
    (CheckId::GuestActivity, |v| _ = v.set(GUEST_ACTIVITY_STATE, 5)),
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
    (CheckId::GuestActivityEvent, |v| _ = inject(v, GP).set(GUEST_ACTIVITY_STATE, 2)),
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
    (CheckId::GuestBlockingEnclave, |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 0x10)),
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
pub const CASES_32_BIT_HOST: &[(CheckId, Change)] = &[
    (CheckId::HostAddressSpaceFitsMode, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 9)),
    (CheckId::HostAddressSpaceFitsMode, |v| _ = v.or(VM_ENTRY_CONTROLS, 1 << 9)),
    (CheckId::HostSsNotNull, |v| _ = v.set(HOST_SS_SELECTOR, 0)),
    (CheckId::Host32BitPcide, |v| _ = v.or(HOST_CR4, 1 << 17)),
    (CheckId::HostRip, |v| _ = v.set(HOST_RIP, 1 << 32)),
    (CheckId::HostEferMode, |v| _ = v.or(HOST_IA32_EFER, 1 << 10)),
    (CheckId::HostSCet, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_S_CET, 1 << 32)),
    (CheckId::HostSsp, |v| _ = v.or(VM_EXIT_CONTROLS, 1 << 28).set(HOST_SSP, 1 << 32)),
];
