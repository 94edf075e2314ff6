//! CR0 and CR4.
//!
//! Source: Intel SDM vol. 3A, "Control Registers".

use bitflags::bitflags;

bitflags! {
    /// Bits of CR0 that nvmx names.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr0: u64 {
        /// Protection enable
        const PE = 1 << 0;
        /// Task switched
        const TS = 1 << 3;
        /// Extension type: always 1
        const ET = 1 << 4;
        /// Numeric error
        const NE = 1 << 5;
        /// Write protect
        const WP = 1 << 16;
        /// Not write-through
        const NW = 1 << 29;
        /// Cache disable
        const CD = 1 << 30;
        /// Paging
        const PG = 1 << 31;
        const _ = !0;
    }
}

bitflags! {
    /// Bits of CR4 that nvmx names.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr4: u64 {
        /// Page size extensions
        const PSE = 1 << 4;
        /// Physical address extension
        const PAE = 1 << 5;
        /// Machine checks
        const MCE = 1 << 6;
        /// Global pages
        const PGE = 1 << 7;
        /// 57-bit linear addresses
        const LA57 = 1 << 12;
        /// VMX enable
        const VMXE = 1 << 13;
        /// PCIDs
        const PCIDE = 1 << 17;
        /// XSAVE and XGETBV enable
        const OSXSAVE = 1 << 18;
        /// Supervisor-mode execution prevention
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention
        const SMAP = 1 << 21;
        /// Protection keys
        const PKE = 1 << 22;
        /// Control-flow enforcement
        const CET = 1 << 23;
        /// Protection keys of supervisor-mode pages
        const PKS = 1 << 24;
        /// Linear-address-space separation
        const LASS = 1 << 27;
        /// Flexible return and event delivery
        const FRED = 1 << 32;
        const _ = !0;
    }
}
