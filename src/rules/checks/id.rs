//! The names and texts of the rules, the fields they are about, and the SDM's sections that state them.

use crate::vmx::Field;
use core::fmt;

macro_rules! checks {
    ($( $section:literal { $( $name:ident = $text:literal [$($field:ident)*]; )* } )*) => {
        /// A rule of VM entry.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        #[allow(missing_docs)]
        pub enum CheckId { $( $( #[doc = $text] $name, )* )* }

        impl CheckId {
            /// All rules, in the order in which they are checked.
            pub const ALL: &'static [CheckId] = &[ $( $( CheckId::$name, )* )* ];

            /// Name of the rule, for records and tests.
            pub const fn name(self) -> &'static str {
                match self { $( $( CheckId::$name => stringify!($name), )* )* }
            }

            /// What must hold.
            pub const fn text(self) -> &'static str {
                match self { $( $( CheckId::$name => $text, )* )* }
            }

            /// The section of the chapter "VM Entries" that states it.
            pub const fn section(self) -> &'static str {
                match self { $( $( CheckId::$name => $section, )* )* }
            }

            /// The fields that it is about, the first to look at first.
            pub const fn fields(self) -> &'static [Field] {
                match self { $( $( CheckId::$name => &[ $( Field::$field, )* ], )* )* }
            }
        }
    };
}

checks! {
    "VM-Execution Control Fields" {
        PinControls = "pin-based controls are set and clear as the capability MSR allows" [PIN_BASED_VM_EXEC_CONTROL];
        PrimaryControls = "primary processor-based controls are set and clear as the capability MSR allows" [
            CPU_BASED_VM_EXEC_CONTROL
        ];
        SecondaryControls = "secondary processor-based controls are set and clear as the capability MSR allows" [
            SECONDARY_VM_EXEC_CONTROL CPU_BASED_VM_EXEC_CONTROL
        ];
        TertiaryControls = "tertiary processor-based controls are set only as the capability MSR allows" [
            TERTIARY_VM_EXEC_CONTROL CPU_BASED_VM_EXEC_CONTROL
        ];
        IoBitmapAddress = "I/O-bitmap addresses are page-aligned and within the physical-address width" [
            IO_BITMAP_A IO_BITMAP_B
        ];
        MsrBitmapAddress = "MSR-bitmap address is page-aligned and within the physical-address width" [MSR_BITMAP];
        VirtualNmisNeedNmiExiting = "virtual NMIs need NMI exiting" [PIN_BASED_VM_EXEC_CONTROL];
        NmiWindowNeedsVirtualNmis = "NMI-window exiting needs virtual NMIs" [
            CPU_BASED_VM_EXEC_CONTROL PIN_BASED_VM_EXEC_CONTROL
        ];
        ShadowBitmapAddresses = "VMREAD- and VMWRITE-bitmap addresses are page-aligned and within the physical-address width" [
            VMREAD_BITMAP VMWRITE_BITMAP
        ];
        VpidNotZero = "the VPID is not 0" [VIRTUAL_PROCESSOR_ID];
        EptpMemoryType = "the EPTP's memory type is supported" [EPT_POINTER];
        EptpWalkLength = "the EPTP's page-walk length is supported" [EPT_POINTER];
        EptpAccessedDirty = "the EPTP enables accessed and dirty flags only if supported" [EPT_POINTER];
        EptpReserved = "the EPTP's reserved bits are 0" [EPT_POINTER];
        UnrestrictedGuestNeedsEpt = "unrestricted guest needs EPT" [SECONDARY_VM_EXEC_CONTROL];
        ModeBasedExecuteNeedsEpt = "mode-based execute control needs EPT" [SECONDARY_VM_EXEC_CONTROL];
        SubPagesNeedEpt = "sub-page write permissions need EPT" [SECONDARY_VM_EXEC_CONTROL];
        SubPageTablePointer = "the sub-page-permission-table pointer is page-aligned and within the physical-address width" [
            SUB_PAGE_PERMISSION_TABLE_POINTER
        ];
        VeInformationAddress = "the #VE information address is page-aligned and within the physical-address width" [
            VIRTUALIZATION_EXCEPTION_INFO
        ];
        VmFunctionControls = "VM-function controls are set as the capability MSR allows" [VM_FUNCTION_CONTROLS];
        EptpSwitchingNeedsEpt = "EPTP switching needs EPT" [SECONDARY_VM_EXEC_CONTROL VM_FUNCTION_CONTROLS];
        EptpListAddress = "the EPTP-list address is page-aligned and within the physical-address width" [
            EPTP_LIST_ADDRESS
        ];
        PmlNeedsEpt = "page-modification logging needs EPT" [SECONDARY_VM_EXEC_CONTROL];
        PmlAddress = "the PML address is page-aligned and within the physical-address width" [PML_ADDRESS];
    }
    "VM-Exit Control Fields" {
        ExitControls = "VM-exit controls are set and clear as the capability MSR allows" [VM_EXIT_CONTROLS];
        SaveTimerNeedsTimer = "saving the VMX-preemption timer needs the timer" [
            VM_EXIT_CONTROLS PIN_BASED_VM_EXEC_CONTROL
        ];
        ExitMsrStoreList = "VM-exit MSR-store list is 16-byte aligned and within the physical-address width" [
            VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_STORE_COUNT
        ];
        ExitMsrLoadList = "VM-exit MSR-load list is 16-byte aligned and within the physical-address width" [
            VM_EXIT_MSR_LOAD_ADDR VM_EXIT_MSR_LOAD_COUNT
        ];
    }
    "VM-Entry Control Fields" {
        EntryControls = "VM-entry controls are set and clear as the capability MSR allows" [VM_ENTRY_CONTROLS];
        EntryMsrLoadList = "VM-entry MSR-load list is 16-byte aligned and within the physical-address width" [
            VM_ENTRY_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_COUNT
        ];
    }
    "VM-Execution Control Fields" {
        VirtualApicAddress = "virtual-APIC address is page-aligned and within the physical-address width" [
            VIRTUAL_APIC_ADDRESS CPU_BASED_VM_EXEC_CONTROL
        ];
        VirtualApicNeedsTprShadow = "x2APIC mode, APIC-register virtualization and virtual interrupts need the TPR shadow" [
            CPU_BASED_VM_EXEC_CONTROL SECONDARY_VM_EXEC_CONTROL
        ];
        VirtualInterruptsNeedExiting = "virtual-interrupt delivery needs external-interrupt exiting" [
            PIN_BASED_VM_EXEC_CONTROL SECONDARY_VM_EXEC_CONTROL
        ];
        ApicAccessAddress = "APIC-access address is page-aligned and within the physical-address width" [
            APIC_ACCESS_ADDRESS SECONDARY_VM_EXEC_CONTROL
        ];
        ApicAccessesExcludeX2apicMode = "virtualizing APIC accesses and virtualizing x2APIC mode exclude each other" [
            SECONDARY_VM_EXEC_CONTROL
        ];
        PostedInterruptsNeedDelivery = "posted interrupts need virtual-interrupt delivery" [
            PIN_BASED_VM_EXEC_CONTROL SECONDARY_VM_EXEC_CONTROL
        ];
        PostedInterruptsNeedAcknowledge = "posted interrupts need acknowledging interrupts on exit" [
            PIN_BASED_VM_EXEC_CONTROL VM_EXIT_CONTROLS
        ];
        PostedDescriptorAddress = "posted-interrupt descriptor is 64-byte aligned and within the physical-address width" [
            POSTED_INTR_DESC_ADDR PIN_BASED_VM_EXEC_CONTROL
        ];
        TscMultiplierNotZero = "the TSC multiplier is not 0" [TSC_MULTIPLIER SECONDARY_VM_EXEC_CONTROL];
        Cr3TargetCount = "the CR3-target count is not above what the processor supports" [CR3_TARGET_COUNT];
    }
    "VM-Entry Control Fields" {
        EventType = "the injected event's type is not reserved" [VM_ENTRY_INTR_INFO_FIELD];
        EventVector = "the injected event's vector fits its type" [VM_ENTRY_INTR_INFO_FIELD];
        EventErrorCodeBit = "the injected event has an error code exactly if its delivery pushes one" [
            VM_ENTRY_INTR_INFO_FIELD GUEST_CR0
        ];
        EventReserved = "the injected event's reserved bits are 0" [VM_ENTRY_INTR_INFO_FIELD];
        EventErrorCode = "bits 31:16 of the injected error code are 0" [
            VM_ENTRY_EXCEPTION_ERROR_CODE VM_ENTRY_INTR_INFO_FIELD
        ];
        EventInstructionLength = "the instruction length of an injected software event is in range" [
            VM_ENTRY_INSTRUCTION_LEN VM_ENTRY_INTR_INFO_FIELD
        ];
    }
    "VM-Execution Control Fields" {
        PostedInterruptVector = "bits 15:8 of the posted-interrupt notification vector are 0" [
            POSTED_INTR_NOTIFICATION_VECTOR PIN_BASED_VM_EXEC_CONTROL
        ];
        TprThresholdReserved = "bits 31:4 of the TPR threshold are 0" [TPR_THRESHOLD CPU_BASED_VM_EXEC_CONTROL];
        TprThresholdFitsVtpr = "the TPR threshold is not above the task priority in the virtual-APIC page" [
            TPR_THRESHOLD VIRTUAL_APIC_ADDRESS
        ];
    }
    "Checks Related to Address-Space Size" {
        HostAddressSpaceFitsMode = "host address-space size is 1 exactly if the entry is made in IA-32e mode" [
            VM_EXIT_CONTROLS VM_ENTRY_CONTROLS
        ];
    }
    "Checks on Host Control Registers, MSRs, and SSP" {
        HostCr0 = "host CR0 has the bits that VMX operation fixes" [HOST_CR0];
        HostCr4 = "host CR4 has the bits that VMX operation fixes" [HOST_CR4];
        HostCetNeedsWp = "host CR4.CET needs CR0.WP" [HOST_CR4 HOST_CR0];
        HostCr3 = "host CR3 is within the physical-address width, but for the flags of linear-address masking" [HOST_CR3];
        HostSysenter = "host IA32_SYSENTER_ESP and IA32_SYSENTER_EIP are canonical" [
            HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP
        ];
        HostPat = "each byte of host IA32_PAT is a memory type" [HOST_IA32_PAT];
        HostEferReserved = "reserved bits of host IA32_EFER are 0" [HOST_IA32_EFER];
        HostEferMode = "LMA and LME of host IA32_EFER equal host address-space size" [HOST_IA32_EFER VM_EXIT_CONTROLS];
        HostSCet = "host IA32_S_CET has no reserved bit, not both SUPPRESS and TRACKER, and fits the host's mode" [
            HOST_S_CET VM_EXIT_CONTROLS
        ];
        HostSsp = "bits 1:0 of host SSP are 0, and it fits the host's mode" [HOST_SSP VM_EXIT_CONTROLS];
        HostSspTable = "host IA32_INTERRUPT_SSP_TABLE_ADDR is canonical" [HOST_INTR_SSP_TABLE VM_EXIT_CONTROLS];
        HostPkrs = "bits 63:32 of host IA32_PKRS are 0" [HOST_IA32_PKRS VM_EXIT_CONTROLS];
        HostPerfGlobalCtrl = "host IA32_PERF_GLOBAL_CTRL has no bit without a counter" [
            HOST_IA32_PERF_GLOBAL_CTRL VM_EXIT_CONTROLS
        ];
    }
    "Checks on Host Segment and Descriptor-Table Registers" {
        HostSelectorRplTi = "RPL and TI of each host selector are 0" [
            HOST_CS_SELECTOR HOST_SS_SELECTOR HOST_DS_SELECTOR HOST_ES_SELECTOR HOST_FS_SELECTOR HOST_GS_SELECTOR
            HOST_TR_SELECTOR
        ];
        HostCsNotNull = "host CS selector is not 0" [HOST_CS_SELECTOR];
        HostTrNotNull = "host TR selector is not 0" [HOST_TR_SELECTOR];
        HostSsNotNull = "host SS selector is not 0 if the host is not 64-bit" [HOST_SS_SELECTOR VM_EXIT_CONTROLS];
        HostBaseCanonical = "host bases of FS, GS, GDTR, IDTR and TR are canonical" [
            HOST_FS_BASE HOST_GS_BASE HOST_GDTR_BASE HOST_IDTR_BASE HOST_TR_BASE
        ];
    }
    "Checks Related to Address-Space Size" {
        Host32BitGuest = "a host that is not 64-bit has no IA-32e mode guest" [VM_EXIT_CONTROLS VM_ENTRY_CONTROLS];
        Host32BitPcide = "a host that is not 64-bit has CR4.PCIDE = 0" [HOST_CR4 VM_EXIT_CONTROLS];
        Host64BitPae = "a 64-bit host has CR4.PAE = 1" [HOST_CR4 VM_EXIT_CONTROLS];
        HostRip = "host RIP is canonical, or 32 bits wide if the host is not 64-bit" [HOST_RIP VM_EXIT_CONTROLS];
    }
    "Checks on Guest Control Registers, Debug Registers, and MSRs" {
        GuestCr0 = "guest CR0 has the bits that VMX operation fixes, PE and PG apart for an unrestricted guest" [
            GUEST_CR0
        ];
        GuestPgNeedsPe = "guest CR0.PG needs CR0.PE" [GUEST_CR0];
        GuestCr4 = "guest CR4 has the bits that VMX operation fixes" [GUEST_CR4];
        GuestCetNeedsWp = "guest CR4.CET needs CR0.WP" [GUEST_CR4 GUEST_CR0];
        GuestDebugctl = "reserved bits of guest IA32_DEBUGCTL are 0" [GUEST_IA32_DEBUGCTL];
        GuestIa32eNeedsPaging = "an IA-32e mode guest has CR0.PG = 1 and CR4.PAE = 1" [
            GUEST_CR0 GUEST_CR4 VM_ENTRY_CONTROLS
        ];
        GuestPcideNeedsIa32e = "guest CR4.PCIDE needs IA-32e mode" [GUEST_CR4 VM_ENTRY_CONTROLS];
        GuestCr3 = "guest CR3 is within the physical-address width, but for the flags of linear-address masking" [GUEST_CR3];
        GuestDr7 = "bits 63:32 of guest DR7 are 0" [GUEST_DR7];
        GuestSysenter = "guest IA32_SYSENTER_ESP and IA32_SYSENTER_EIP are canonical" [
            GUEST_SYSENTER_ESP GUEST_SYSENTER_EIP
        ];
        GuestPat = "each byte of guest IA32_PAT is a memory type" [GUEST_IA32_PAT];
        GuestEferReserved = "reserved bits of guest IA32_EFER are 0" [GUEST_IA32_EFER];
        GuestEferLma = "LMA of guest IA32_EFER equals IA-32e mode guest" [GUEST_IA32_EFER VM_ENTRY_CONTROLS];
        GuestEferLme = "LME of guest IA32_EFER equals LMA if CR0.PG = 1" [GUEST_IA32_EFER GUEST_CR0];
        GuestSCet = "guest IA32_S_CET has no reserved bit, not both SUPPRESS and TRACKER, and fits the guest's mode" [
            GUEST_S_CET VM_ENTRY_CONTROLS
        ];
        GuestSspTable = "guest IA32_INTERRUPT_SSP_TABLE_ADDR is canonical" [GUEST_INTR_SSP_TABLE VM_ENTRY_CONTROLS];
        GuestPkrs = "bits 63:32 of guest IA32_PKRS are 0" [GUEST_IA32_PKRS VM_ENTRY_CONTROLS];
        GuestPerfGlobalCtrl = "guest IA32_PERF_GLOBAL_CTRL has no bit without a counter" [
            GUEST_IA32_PERF_GLOBAL_CTRL VM_ENTRY_CONTROLS
        ];
        GuestUinv = "bits 15:8 of guest UINV are 0" [GUEST_UINV VM_ENTRY_CONTROLS];
    }
    "Checks on Guest Segment Registers" {
        GuestTrSelector = "TI of guest TR is 0" [GUEST_TR_SELECTOR];
        GuestLdtrSelector = "TI of a usable guest LDTR is 0" [GUEST_LDTR_SELECTOR GUEST_LDTR_AR_BYTES];
        GuestSsRpl = "RPL of guest SS equals RPL of CS" [GUEST_SS_SELECTOR GUEST_CS_SELECTOR];
        GuestBaseCanonical = "guest bases of TR, FS, GS and a usable LDTR are canonical" [
            GUEST_TR_BASE GUEST_FS_BASE GUEST_GS_BASE GUEST_LDTR_BASE
        ];
        GuestBase32Bit = "bits 63:32 of the bases of CS and of usable SS, DS, ES are 0" [
            GUEST_CS_BASE GUEST_SS_BASE GUEST_DS_BASE GUEST_ES_BASE
        ];
        GuestV86Base = "in virtual-8086 mode each base is its selector times 16" [
            GUEST_ES_BASE GUEST_CS_BASE GUEST_SS_BASE GUEST_DS_BASE GUEST_FS_BASE GUEST_GS_BASE GUEST_ES_SELECTOR
            GUEST_CS_SELECTOR GUEST_SS_SELECTOR GUEST_DS_SELECTOR GUEST_FS_SELECTOR GUEST_GS_SELECTOR
        ];
        GuestV86Limit = "in virtual-8086 mode each limit is FFFFH" [
            GUEST_ES_LIMIT GUEST_CS_LIMIT GUEST_SS_LIMIT GUEST_DS_LIMIT GUEST_FS_LIMIT GUEST_GS_LIMIT
        ];
        GuestV86Rights = "in virtual-8086 mode the access rights are F3H" [
            GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES
            GUEST_GS_AR_BYTES
        ];
        GuestCsType = "guest CS is accessed code, or accessed data for an unrestricted guest" [GUEST_CS_AR_BYTES];
        GuestSsType = "a usable guest SS is accessed read/write data" [GUEST_SS_AR_BYTES];
        GuestDataType = "usable guest DS, ES, FS, GS are accessed, and readable if code" [
            GUEST_DS_AR_BYTES GUEST_ES_AR_BYTES GUEST_FS_AR_BYTES GUEST_GS_AR_BYTES
        ];
        GuestSegmentS = "S is 1 for CS and usable SS, DS, ES, FS, GS" [
            GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES
            GUEST_GS_AR_BYTES
        ];
        GuestCsDpl = "DPL of guest CS fits its type and DPL of SS" [GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES];
        GuestSsDpl = "DPL of guest SS equals its RPL, and is 0 in real mode or with data in CS" [
            GUEST_SS_AR_BYTES GUEST_SS_SELECTOR GUEST_CS_AR_BYTES GUEST_CR0
        ];
        GuestDataDpl = "DPL of guest DS, ES, FS, GS is not below RPL" [
            GUEST_DS_AR_BYTES GUEST_ES_AR_BYTES GUEST_FS_AR_BYTES GUEST_GS_AR_BYTES GUEST_DS_SELECTOR
            GUEST_ES_SELECTOR GUEST_FS_SELECTOR GUEST_GS_SELECTOR
        ];
        GuestSegmentPresent = "P is 1 for CS and usable SS, DS, ES, FS, GS" [
            GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES
            GUEST_GS_AR_BYTES
        ];
        GuestSegmentReserved = "reserved bits of the access rights are 0 for CS and usable SS, DS, ES, FS, GS" [
            GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES
            GUEST_GS_AR_BYTES
        ];
        GuestCsDb = "D/B of a 64-bit guest CS is 0" [GUEST_CS_AR_BYTES VM_ENTRY_CONTROLS];
        GuestSegmentGranularity = "G fits the limit for CS and usable SS, DS, ES, FS, GS" [
            GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES
            GUEST_GS_AR_BYTES GUEST_ES_LIMIT GUEST_CS_LIMIT GUEST_SS_LIMIT GUEST_DS_LIMIT GUEST_FS_LIMIT
            GUEST_GS_LIMIT
        ];
        GuestTrType = "guest TR is a busy TSS that fits IA-32e mode" [GUEST_TR_AR_BYTES VM_ENTRY_CONTROLS];
        GuestTrRights = "guest TR is a present, usable system segment without reserved bits, and G fits the limit" [
            GUEST_TR_AR_BYTES GUEST_TR_LIMIT
        ];
        GuestLdtrRights = "a usable guest LDTR is a present LDT without reserved bits, and G fits the limit" [
            GUEST_LDTR_AR_BYTES GUEST_LDTR_LIMIT
        ];
    }
    "Checks on Guest Descriptor-Table Registers" {
        GuestTableBase = "guest bases of GDTR and IDTR are canonical" [GUEST_GDTR_BASE GUEST_IDTR_BASE];
        GuestTableLimit = "bits 31:16 of guest limits of GDTR and IDTR are 0" [GUEST_GDTR_LIMIT GUEST_IDTR_LIMIT];
    }
    "Checks on Guest RIP, RFLAGS, and SSP" {
        GuestRip = "guest RIP fits the mode of CS" [GUEST_RIP GUEST_CS_AR_BYTES VM_ENTRY_CONTROLS];
        GuestRflagsReserved = "reserved bits of guest RFLAGS are 0, and bit 1 is 1" [GUEST_RFLAGS];
        GuestRflagsVm = "guest RFLAGS.VM is 0 in IA-32e mode and in real mode" [
            GUEST_RFLAGS GUEST_CR0 VM_ENTRY_CONTROLS
        ];
        GuestRflagsIf = "guest RFLAGS.IF is 1 if an external interrupt is injected" [
            GUEST_RFLAGS VM_ENTRY_INTR_INFO_FIELD
        ];
        GuestSsp = "bits 1:0 of guest SSP are 0, and it fits the guest's mode" [GUEST_SSP VM_ENTRY_CONTROLS];
    }
    "Checks on Guest Non-Register State" {
        GuestActivity = "the guest activity state is supported" [GUEST_ACTIVITY_STATE];
        GuestActivityHltDpl = "guest activity state HLT needs DPL of SS = 0" [GUEST_ACTIVITY_STATE GUEST_SS_AR_BYTES];
        GuestActivityBlocking = "blocking by STI or MOV SS needs the active state" [
            GUEST_ACTIVITY_STATE GUEST_INTERRUPTIBILITY_INFO
        ];
        GuestActivityEvent = "the injected event is allowed in the guest activity state" [
            GUEST_ACTIVITY_STATE VM_ENTRY_INTR_INFO_FIELD
        ];
        GuestInterruptibilityReserved = "reserved bits of guest interruptibility are 0" [GUEST_INTERRUPTIBILITY_INFO];
        GuestBlockingStiAndMovSs = "blocking by STI and by MOV SS exclude each other" [GUEST_INTERRUPTIBILITY_INFO];
        GuestBlockingStiNeedsIf = "blocking by STI needs RFLAGS.IF = 1" [GUEST_INTERRUPTIBILITY_INFO GUEST_RFLAGS];
        GuestBlockingExternalInterrupt = "an external interrupt is not injected under blocking by STI or MOV SS" [
            GUEST_INTERRUPTIBILITY_INFO VM_ENTRY_INTR_INFO_FIELD
        ];
        GuestBlockingNmiMovSs = "an NMI is not injected under blocking by MOV SS" [
            GUEST_INTERRUPTIBILITY_INFO VM_ENTRY_INTR_INFO_FIELD
        ];
        GuestBlockingSmi = "there is no blocking by SMI outside SMM" [GUEST_INTERRUPTIBILITY_INFO];
        GuestBlockingNmi = "an NMI is not injected under virtual-NMI blocking" [
            GUEST_INTERRUPTIBILITY_INFO VM_ENTRY_INTR_INFO_FIELD
        ];
        GuestBlockingEnclave = "there is no enclave interruption, as there is no SGX" [GUEST_INTERRUPTIBILITY_INFO];
        GuestPendingDebugReserved = "reserved bits of pending debug exceptions are 0" [GUEST_PENDING_DBG_EXCEPTIONS];
        GuestPendingDebugStep = "BS of pending debug exceptions fits RFLAGS.TF and IA32_DEBUGCTL.BTF" [
            GUEST_PENDING_DBG_EXCEPTIONS GUEST_RFLAGS GUEST_IA32_DEBUGCTL
        ];
        GuestPendingDebugRtm = "RTM of pending debug exceptions stands only with the enabled-breakpoint bit" [
            GUEST_PENDING_DBG_EXCEPTIONS GUEST_INTERRUPTIBILITY_INFO
        ];
        GuestLinkPointerAddress = "the VMCS link pointer is page-aligned and within the physical-address width" [
            VMCS_LINK_POINTER
        ];
        GuestLinkPointerCurrent = "the VMCS link pointer is not the current VMCS" [VMCS_LINK_POINTER];
        GuestLinkPointerRegion = "the VMCS link pointer points to an ordinary VMCS of this processor" [
            VMCS_LINK_POINTER
        ];
    }
    "Checks on Guest Page-Directory-Pointer-Table Entries" {
        GuestPdptes = "reserved bits of present guest PDPTEs are 0" [
            GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 GUEST_CR3
        ];
    }
    "Checks on Guest Non-Register State" {
        GuestBlockingNmiSti = "an NMI is not injected under blocking by STI" [
            GUEST_INTERRUPTIBILITY_INFO VM_ENTRY_INTR_INFO_FIELD
        ];
    }
    "Loading MSRs" {
        MsrLoadReserved = "bits 63:32 of the entry's index are 0" [VM_ENTRY_MSR_LOAD_ADDR];
        MsrLoadBase = "the entry is not for IA32_FS_BASE or IA32_GS_BASE" [VM_ENTRY_MSR_LOAD_ADDR];
        MsrLoadX2apic = "the entry is not for a register of the x2APIC" [VM_ENTRY_MSR_LOAD_ADDR];
        MsrLoadWithheld = "the entry is in L2's memory and not for an MSR that nvmx answers for" [VM_ENTRY_MSR_LOAD_ADDR];
        MsrLoadValue = "WRMSR of the entry's value does not fault" [VM_ENTRY_MSR_LOAD_ADDR];
    }
}

impl fmt::Display for CheckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name(), self.text())
    }
}
