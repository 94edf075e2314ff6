//! CR0 and CR4.
//!
//! Source: Intel SDM vol. 3A, "Control Registers". The bits are those of the crate `x86_64`, LA57, LASS, LAM_SUP and FRED beside them. Its
//! types do not serve: they drop or refuse bits that they do not know, and a guest's value has those too.

use bitflags::bitflags;
use x86_64::registers::control::{Cr0Flags, Cr4Flags};

bitflags! {
    /// Bits of CR0 that nvmx names.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr0: u64 {
        /// Protection enable
        const PE = Cr0Flags::PROTECTED_MODE_ENABLE.bits();
        /// Task switched
        const TS = Cr0Flags::TASK_SWITCHED.bits();
        /// Extension type: always 1
        const ET = Cr0Flags::EXTENSION_TYPE.bits();
        /// Numeric error
        const NE = Cr0Flags::NUMERIC_ERROR.bits();
        /// Write protect
        const WP = Cr0Flags::WRITE_PROTECT.bits();
        /// Not write-through
        const NW = Cr0Flags::NOT_WRITE_THROUGH.bits();
        /// Cache disable
        const CD = Cr0Flags::CACHE_DISABLE.bits();
        /// Paging
        const PG = Cr0Flags::PAGING.bits();
        const _ = !0;
    }
}

bitflags! {
    /// Bits of CR4 that nvmx names.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr4: u64 {
        /// Page size extensions
        const PSE = Cr4Flags::PAGE_SIZE_EXTENSION.bits();
        /// Physical address extension
        const PAE = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
        /// Machine checks
        const MCE = Cr4Flags::MACHINE_CHECK_EXCEPTION.bits();
        /// Global pages
        const PGE = Cr4Flags::PAGE_GLOBAL.bits();
        /// 57-bit linear addresses
        const LA57 = 1 << 12;
        /// VMX enable
        const VMXE = Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits();
        /// PCIDs
        const PCIDE = Cr4Flags::PCID.bits();
        /// XSAVE and XGETBV enable
        const OSXSAVE = Cr4Flags::OSXSAVE.bits();
        /// Key Locker
        const KL = Cr4Flags::KEY_LOCKER.bits();
        /// Supervisor-mode execution prevention
        const SMEP = Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits();
        /// Supervisor-mode access prevention
        const SMAP = Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION.bits();
        /// Protection keys
        const PKE = Cr4Flags::PROTECTION_KEY_USER.bits();
        /// Control-flow enforcement
        const CET = Cr4Flags::CONTROL_FLOW_ENFORCEMENT.bits();
        /// Protection keys of supervisor-mode pages
        const PKS = Cr4Flags::PROTECTION_KEY_SUPERVISOR.bits();
        /// Linear-address-space separation
        const LASS = 1 << 27;
        /// Linear-address masking of the supervisor's pointers
        const LAM_SUP = 1 << 28;
        /// Flexible return and event delivery
        const FRED = 1 << 32;
        const _ = !0;
    }
}
