//! The names and texts of the rules.

use core::fmt;

macro_rules! checks {
    ($( $name:ident = $text:literal; )*) => {
        /// A rule of VM entry.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        #[allow(missing_docs)]
        pub enum CheckId { $( #[doc = $text] $name, )* }

        impl CheckId {
            /// All rules, in the order in which they are checked.
            pub const ALL: &'static [CheckId] = &[ $( CheckId::$name, )* ];

            /// Name of the rule, for records and tests.
            pub const fn name(self) -> &'static str {
                match self { $( CheckId::$name => stringify!($name), )* }
            }

            /// What must hold.
            pub const fn text(self) -> &'static str {
                match self { $( CheckId::$name => $text, )* }
            }
        }
    };
}

checks! {
    // Controls
    PinControls = "pin-based controls are set and clear as the capability MSR allows";
    PrimaryControls = "primary processor-based controls are set and clear as the capability MSR allows";
    SecondaryControls = "secondary processor-based controls are set and clear as the capability MSR allows";
    IoBitmapAddress = "I/O-bitmap addresses are page-aligned and within the physical-address width";
    MsrBitmapAddress = "MSR-bitmap address is page-aligned and within the physical-address width";
    VirtualNmisNeedNmiExiting = "virtual NMIs need NMI exiting";
    NmiWindowNeedsVirtualNmis = "NMI-window exiting needs virtual NMIs";
    VpidNotZero = "the VPID is not 0";
    EptpMemoryType = "the EPTP's memory type is supported";
    EptpWalkLength = "the EPTP's page-walk length is supported";
    EptpAccessedDirty = "the EPTP enables accessed and dirty flags only if supported";
    EptpReserved = "the EPTP's reserved bits are 0";
    UnrestrictedGuestNeedsEpt = "unrestricted guest needs EPT";
    ExitControls = "VM-exit controls are set and clear as the capability MSR allows";
    SaveTimerNeedsTimer = "saving the VMX-preemption timer needs the timer";
    ExitMsrStoreList = "VM-exit MSR-store list is 16-byte aligned and within the physical-address width";
    ExitMsrLoadList = "VM-exit MSR-load list is 16-byte aligned and within the physical-address width";
    EntryControls = "VM-entry controls are set and clear as the capability MSR allows";
    EntryMsrLoadList = "VM-entry MSR-load list is 16-byte aligned and within the physical-address width";
    Cr3TargetCount = "the CR3-target count is not above what the processor supports";
    EventType = "the injected event's type is not reserved";
    EventVector = "the injected event's vector fits its type";
    EventErrorCodeBit = "the injected event has an error code exactly if its delivery pushes one";
    EventReserved = "the injected event's reserved bits are 0";
    EventErrorCode = "bits 31:16 of the injected error code are 0";
    EventInstructionLength = "the instruction length of an injected software event is in range";
    // Host state
    HostAddressSpaceFitsMode = "host address-space size is 1 exactly if the entry is made in IA-32e mode";
    HostCr0 = "host CR0 has the bits that VMX operation fixes";
    HostCr4 = "host CR4 has the bits that VMX operation fixes";
    HostCetNeedsWp = "host CR4.CET needs CR0.WP";
    HostCr3 = "host CR3 is within the physical-address width";
    HostSysenter = "host IA32_SYSENTER_ESP and IA32_SYSENTER_EIP are canonical";
    HostPat = "each byte of host IA32_PAT is a memory type";
    HostEferReserved = "reserved bits of host IA32_EFER are 0";
    HostEferMode = "LMA and LME of host IA32_EFER equal host address-space size";
    HostSelectorRplTi = "RPL and TI of each host selector are 0";
    HostCsNotNull = "host CS selector is not 0";
    HostTrNotNull = "host TR selector is not 0";
    HostSsNotNull = "host SS selector is not 0 if the host is not 64-bit";
    HostBaseCanonical = "host bases of FS, GS, GDTR, IDTR and TR are canonical";
    Host32BitGuest = "a host that is not 64-bit has no IA-32e mode guest";
    Host32BitPcide = "a host that is not 64-bit has CR4.PCIDE = 0";
    Host64BitPae = "a 64-bit host has CR4.PAE = 1";
    HostRip = "host RIP is canonical, or 32 bits wide if the host is not 64-bit";
    // Guest control registers, debug registers, MSRs
    GuestCr0 = "guest CR0 has the bits that VMX operation fixes, PE and PG apart for an unrestricted guest";
    GuestPgNeedsPe = "guest CR0.PG needs CR0.PE";
    GuestCr4 = "guest CR4 has the bits that VMX operation fixes";
    GuestCetNeedsWp = "guest CR4.CET needs CR0.WP";
    GuestDebugctl = "reserved bits of guest IA32_DEBUGCTL are 0";
    GuestIa32eNeedsPaging = "an IA-32e mode guest has CR0.PG = 1 and CR4.PAE = 1";
    GuestPcideNeedsIa32e = "guest CR4.PCIDE needs IA-32e mode";
    GuestCr3 = "guest CR3 is within the physical-address width";
    GuestDr7 = "bits 63:32 of guest DR7 are 0";
    GuestSysenter = "guest IA32_SYSENTER_ESP and IA32_SYSENTER_EIP are canonical";
    GuestPat = "each byte of guest IA32_PAT is a memory type";
    GuestEferReserved = "reserved bits of guest IA32_EFER are 0";
    GuestEferLma = "LMA of guest IA32_EFER equals IA-32e mode guest";
    GuestEferLme = "LME of guest IA32_EFER equals LMA if CR0.PG = 1";
    // Guest segments
    GuestTrSelector = "TI of guest TR is 0";
    GuestLdtrSelector = "TI of a usable guest LDTR is 0";
    GuestSsRpl = "RPL of guest SS equals RPL of CS";
    GuestV86Base = "in virtual-8086 mode each base is its selector times 16";
    GuestV86Limit = "in virtual-8086 mode each limit is FFFFH";
    GuestV86Rights = "in virtual-8086 mode the access rights are F3H";
    GuestBaseCanonical = "guest bases of TR, FS, GS and a usable LDTR are canonical";
    GuestBase32Bit = "bits 63:32 of the bases of CS and of usable SS, DS, ES are 0";
    GuestCsType = "guest CS is accessed code, or accessed data for an unrestricted guest";
    GuestSsType = "a usable guest SS is accessed read/write data";
    GuestDataType = "usable guest DS, ES, FS, GS are accessed, and readable if code";
    GuestSegmentS = "S is 1 for CS and usable SS, DS, ES, FS, GS";
    GuestCsDpl = "DPL of guest CS fits its type and DPL of SS";
    GuestSsDpl = "DPL of guest SS equals its RPL, and is 0 in real mode or with data in CS";
    GuestDataDpl = "DPL of guest DS, ES, FS, GS is not below RPL";
    GuestSegmentPresent = "P is 1 for CS and usable SS, DS, ES, FS, GS";
    GuestSegmentReserved = "reserved bits of the access rights are 0 for CS and usable SS, DS, ES, FS, GS";
    GuestCsDb = "D/B of a 64-bit guest CS is 0";
    GuestSegmentGranularity = "G fits the limit for CS and usable SS, DS, ES, FS, GS";
    GuestTrType = "guest TR is a busy TSS that fits IA-32e mode";
    GuestTrRights = "guest TR is a present, usable system segment without reserved bits, and G fits the limit";
    GuestLdtrRights = "a usable guest LDTR is a present LDT without reserved bits, and G fits the limit";
    GuestTableBase = "guest bases of GDTR and IDTR are canonical";
    GuestTableLimit = "bits 31:16 of guest limits of GDTR and IDTR are 0";
    // Guest RIP and RFLAGS
    GuestRip = "guest RIP fits the mode of CS";
    GuestRflagsReserved = "reserved bits of guest RFLAGS are 0, and bit 1 is 1";
    GuestRflagsVm = "guest RFLAGS.VM is 0 in IA-32e mode and in real mode";
    GuestRflagsIf = "guest RFLAGS.IF is 1 if an external interrupt is injected";
    // Guest non-register state
    GuestActivity = "the guest activity state is supported";
    GuestActivityHltDpl = "guest activity state HLT needs DPL of SS = 0";
    GuestActivityBlocking = "blocking by STI or MOV SS needs the active state";
    GuestActivityEvent = "the injected event is allowed in the guest activity state";
    GuestInterruptibilityReserved = "reserved bits of guest interruptibility are 0";
    GuestBlockingStiAndMovSs = "blocking by STI and by MOV SS exclude each other";
    GuestBlockingStiNeedsIf = "blocking by STI needs RFLAGS.IF = 1";
    GuestBlockingExternalInterrupt = "an external interrupt is not injected under blocking by STI or MOV SS";
    GuestBlockingNmiMovSs = "an NMI is not injected under blocking by MOV SS";
    GuestBlockingNmiSti = "an NMI is not injected under blocking by STI";
    GuestBlockingSmi = "there is no blocking by SMI outside SMM";
    GuestBlockingNmi = "an NMI is not injected under virtual-NMI blocking";
    GuestBlockingEnclave = "an enclave interruption excludes blocking by MOV SS";
    GuestPendingDebugReserved = "reserved bits of pending debug exceptions are 0";
    GuestPendingDebugStep = "BS of pending debug exceptions fits RFLAGS.TF and IA32_DEBUGCTL.BTF";
    GuestPendingDebugRtm = "RTM of pending debug exceptions stands only with the enabled-breakpoint bit";
    GuestLinkPointerAddress = "the VMCS link pointer is page-aligned and within the physical-address width";
    GuestLinkPointerRegion = "the VMCS link pointer points to an ordinary VMCS of this processor";
    GuestLinkPointerCurrent = "the VMCS link pointer is not the current VMCS";
    GuestPdptes = "reserved bits of present guest PDPTEs are 0";
}

impl fmt::Display for CheckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name(), self.text())
    }
}
