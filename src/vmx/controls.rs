//! The control fields that exist on every processor with VMX or are enabled by one that does, bit by bit.
//!
//! Source: Intel SDM vol. 3C (December 2024), chapter "Virtual Machine Control Structures", tables "Definitions of
//! Pin-Based VM-Execution Controls", "Definitions of Primary Processor-Based VM-Execution Controls", "Definitions of
//! Secondary Processor-Based VM-Execution Controls", "Definitions of Primary VM-Exit Controls", "Definitions of VM-Entry
//! Controls"; the default1 classes are in vol. 3D, appendix "VMX Capability Reporting Facility".

use bitflags::bitflags;

bitflags! {
    /// Pin-based VM-execution controls.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct PinControls: u32 {
        /// An external interrupt causes a VM exit.
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        /// An NMI causes a VM exit.
        const NMI_EXITING = 1 << 3;
        /// NMI blocking is virtual: it is about the guest's NMIs, not the processor's.
        const VIRTUAL_NMIS = 1 << 5;
        /// The VMX-preemption timer counts down in VMX non-root operation.
        const PREEMPTION_TIMER = 1 << 6;
        /// Posted interrupts are delivered without a VM exit.
        const POSTED_INTERRUPTS = 1 << 7;
    }
}

bitflags! {
    /// Primary processor-based VM-execution controls.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct PrimaryControls: u32 {
        /// Exit as soon as RFLAGS.IF = 1 and nothing else blocks interrupts.
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        /// Reads of the TSC see it plus the TSC offset field.
        const USE_TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        const HLT_EXITING = 1 << 7;
        /// INVLPG exits.
        const INVLPG_EXITING = 1 << 9;
        /// MWAIT exits.
        const MWAIT_EXITING = 1 << 10;
        /// RDPMC exits.
        const RDPMC_EXITING = 1 << 11;
        /// RDTSC and RDTSCP exit.
        const RDTSC_EXITING = 1 << 12;
        /// MOV to CR3 exits, unless the value is a CR3-target value.
        const CR3_LOAD_EXITING = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = 1 << 16;
        /// The tertiary processor-based controls are used.
        const ACTIVATE_TERTIARY_CONTROLS = 1 << 17;
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = 1 << 20;
        /// TPR virtualization by a virtual-APIC page.
        const USE_TPR_SHADOW = 1 << 21;
        /// Exit as soon as there is no virtual-NMI blocking.
        const NMI_WINDOW_EXITING = 1 << 22;
        /// MOV DR exits.
        const MOV_DR_EXITING = 1 << 23;
        /// IN, INS, OUT, OUTS exit, unless the I/O bitmaps are used.
        const UNCONDITIONAL_IO_EXITING = 1 << 24;
        /// The I/O bitmaps decide which ports exit.
        const USE_IO_BITMAPS = 1 << 25;
        /// Monitor trap flag: an exit after one instruction.
        const MONITOR_TRAP_FLAG = 1 << 27;
        /// The MSR bitmap decides which RDMSR and WRMSR exit; without it all do.
        const USE_MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR_EXITING = 1 << 29;
        /// PAUSE exits.
        const PAUSE_EXITING = 1 << 30;
        /// The secondary processor-based controls are used.
        const ACTIVATE_SECONDARY_CONTROLS = 1 << 31;
    }
}

bitflags! {
    /// Secondary processor-based VM-execution controls.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SecondaryControls: u32 {
        /// Accesses to the APIC-access page are virtualized or exit.
        const VIRTUALIZE_APIC_ACCESSES = 1 << 0;
        /// Extended page tables.
        const ENABLE_EPT = 1 << 1;
        /// LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT, STR exit.
        const DESCRIPTOR_TABLE_EXITING = 1 << 2;
        /// RDTSCP is allowed.
        const ENABLE_RDTSCP = 1 << 3;
        /// MSR accesses of the x2APIC are virtualized.
        const VIRTUALIZE_X2APIC_MODE = 1 << 4;
        /// Cached linear translations are tagged by the VPID.
        const ENABLE_VPID = 1 << 5;
        /// WBINVD and WBNOINVD exit.
        const WBINVD_EXITING = 1 << 6;
        /// The guest may run without paging or in real mode.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// Most reads of the APIC are virtualized.
        const APIC_REGISTER_VIRTUALIZATION = 1 << 8;
        /// Pending virtual interrupts are evaluated and delivered.
        const VIRTUAL_INTERRUPT_DELIVERY = 1 << 9;
        /// A loop of PAUSEs at CPL 0 exits.
        const PAUSE_LOOP_EXITING = 1 << 10;
        /// RDRAND exits.
        const RDRAND_EXITING = 1 << 11;
        /// INVPCID is allowed.
        const ENABLE_INVPCID = 1 << 12;
        /// VMFUNC is allowed.
        const ENABLE_VM_FUNCTIONS = 1 << 13;
        /// VMREAD and VMWRITE in VMX non-root operation may use a shadow VMCS.
        const VMCS_SHADOWING = 1 << 14;
        /// The ENCLS-exiting bitmap decides which ENCLS exit.
        const ENABLE_ENCLS_EXITING = 1 << 15;
        /// RDSEED exits.
        const RDSEED_EXITING = 1 << 16;
        /// Page-modification logging.
        const ENABLE_PML = 1 << 17;
        /// EPT violations may become #VE.
        const EPT_VIOLATION_VE = 1 << 18;
        /// Intel PT hides VMX non-root operation.
        const CONCEAL_VMX_FROM_PT = 1 << 19;
        /// XSAVES and XRSTORS are allowed.
        const ENABLE_XSAVES = 1 << 20;
        /// PASID translation for ENQCMD and ENQCMDS.
        const PASID_TRANSLATION = 1 << 21;
        /// EPT execute rights depend on the mode of the linear address.
        const MODE_BASED_EXECUTE_CONTROL = 1 << 22;
        /// EPT write rights by 128-byte sub-page.
        const SUB_PAGE_WRITE_PERMISSIONS = 1 << 23;
        /// Intel PT outputs to guest-physical addresses.
        const PT_USES_GUEST_PHYSICAL = 1 << 24;
        /// Reads of the TSC see it multiplied.
        const USE_TSC_SCALING = 1 << 25;
        /// TPAUSE, UMONITOR, UMWAIT are allowed.
        const ENABLE_USER_WAIT_AND_PAUSE = 1 << 26;
        /// PCONFIG is allowed.
        const ENABLE_PCONFIG = 1 << 27;
        /// The ENCLV-exiting bitmap decides which ENCLV exit.
        const ENABLE_ENCLV_EXITING = 1 << 28;
        /// Exit after a bus lock.
        const BUS_LOCK_DETECTION = 1 << 30;
        /// Exit if no interrupt window appears for a time.
        const INSTRUCTION_TIMEOUT = 1 << 31;
    }
}

bitflags! {
    /// Tertiary processor-based controls, a word of 64 bits (SDM table "Definitions of Tertiary Processor-Based VM-Execution
    /// Controls").
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct TertiaryControls: u64 {
        /// LOADIWKEY exits.
        const LOADIWKEY_EXITING = 1 << 0;
        /// Hypervisor-managed linear-address translation.
        const ENABLE_HLAT = 1 << 1;
        /// EPT entries may allow writes to guest paging structures alone.
        const EPT_PAGING_WRITE = 1 << 2;
        /// EPT entries may ask that guest paging structures be verified.
        const GUEST_PAGING_VERIFICATION = 1 << 3;
        /// IPIs of the guest are posted without an exit.
        const IPI_VIRTUALIZATION = 1 << 4;
        /// RDMSRLIST and WRMSRLIST are allowed.
        const ENABLE_MSR_LIST = 1 << 6;
        /// The guest sees a shadow of IA32_SPEC_CTRL, and a mask keeps bits from it.
        const VIRTUALIZE_SPEC_CTRL = 1 << 7;
    }
}

/// VM-function controls: EPTP switching, VM function 0 (SDM table "Definitions of VM-Function Controls").
pub const EPTP_SWITCHING: u64 = 1 << 0;

bitflags! {
    /// Primary VM-exit controls.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ExitControls: u32 {
        /// DR7 and IA32_DEBUGCTL are saved.
        const SAVE_DEBUG_CONTROLS = 1 << 2;
        /// The host runs in 64-bit mode.
        const HOST_ADDRESS_SPACE_SIZE = 1 << 9;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 12;
        /// An external interrupt that exits is acknowledged and its vector stored.
        const ACK_INTERRUPT_ON_EXIT = 1 << 15;
        /// IA32_PAT is saved.
        const SAVE_PAT = 1 << 18;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 19;
        /// IA32_EFER is saved.
        const SAVE_EFER = 1 << 20;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 21;
        /// The VMX-preemption timer's value is saved.
        const SAVE_PREEMPTION_TIMER = 1 << 22;
        /// IA32_BNDCFGS is cleared.
        const CLEAR_BNDCFGS = 1 << 23;
        /// Intel PT hides the VM exit.
        const CONCEAL_VMX_FROM_PT = 1 << 24;
        /// IA32_RTIT_CTL is cleared.
        const CLEAR_RTIT_CTL = 1 << 25;
        /// IA32_LBR_CTL is cleared.
        const CLEAR_LBR_CTL = 1 << 26;
        /// The user-interrupt notification vector is cleared.
        const CLEAR_UINV = 1 << 27;
        /// CET state is loaded.
        const LOAD_CET = 1 << 28;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 29;
        /// IA32_PERF_GLOBAL_CTRL is saved.
        const SAVE_PERF_GLOBAL_CTRL = 1 << 30;
        /// The secondary VM-exit controls are used.
        const ACTIVATE_SECONDARY_CONTROLS = 1 << 31;
    }
}

bitflags! {
    /// VM-entry controls.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct EntryControls: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded.
        const LOAD_DEBUG_CONTROLS = 1 << 2;
        /// The guest is in IA-32e mode after entry.
        const IA32E_MODE_GUEST = 1 << 9;
        /// The entry is to SMM.
        const ENTRY_TO_SMM = 1 << 10;
        /// The default treatment of SMIs returns after this entry.
        const DEACTIVATE_DUAL_MONITOR = 1 << 11;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 13;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 15;
        /// IA32_BNDCFGS is loaded.
        const LOAD_BNDCFGS = 1 << 16;
        /// Intel PT hides the VM entry.
        const CONCEAL_VMX_FROM_PT = 1 << 17;
        /// IA32_RTIT_CTL is loaded.
        const LOAD_RTIT_CTL = 1 << 18;
        /// The user-interrupt notification vector is loaded.
        const LOAD_UINV = 1 << 19;
        /// CET state is loaded.
        const LOAD_CET = 1 << 20;
        /// IA32_LBR_CTL is loaded.
        const LOAD_LBR_CTL = 1 << 21;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 22;
    }
}

/// One of the five control fields: what the code that treats them all alike needs to know.
pub trait Controls: bitflags::Flags<Bits = u32> + Copy {
    /// Reserved bits in the default1 class: 1 on processors without the TRUE capability MSRs.
    const DEFAULT1: u32;
    /// The SDM's name of the capability MSR, for messages.
    const MSR: &'static str;
}

impl Controls for PinControls {
    const DEFAULT1: u32 = 0x0000_0016;
    const MSR: &'static str = "IA32_VMX_PINBASED_CTLS";
}

impl Controls for PrimaryControls {
    const DEFAULT1: u32 = 0x0401_E172;
    const MSR: &'static str = "IA32_VMX_PROCBASED_CTLS";
}

impl Controls for SecondaryControls {
    const DEFAULT1: u32 = 0;
    const MSR: &'static str = "IA32_VMX_PROCBASED_CTLS2";
}

impl Controls for ExitControls {
    const DEFAULT1: u32 = 0x0003_6DFF;
    const MSR: &'static str = "IA32_VMX_EXIT_CTLS";
}

impl Controls for EntryControls {
    const DEFAULT1: u32 = 0x0000_11FF;
    const MSR: &'static str = "IA32_VMX_ENTRY_CTLS";
}
