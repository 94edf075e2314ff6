//! The words of controls of a VMCS: their bits, what the CPU allows, and writing them.
//!
//! Source: SDM "VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields", and the appendix "VMX
//! Capability Reporting Facility".

use super::{
    caps,
    setup::{Missing, VMX_BASIC},
    vmx,
};
use crate::fields as f;

/// Pin-based controls (SDM "Definitions of Pin-Based VM-Execution Controls").
pub mod pin {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMI: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based controls.
pub mod primary {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    pub const TSC_OFFSET: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const INVLPG: u32 = 1 << 9;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const RDTSC: u32 = 1 << 12;
    pub const CR3_LOAD: u32 = 1 << 15;
    pub const CR3_STORE: u32 = 1 << 16;
    pub const TERTIARY: u32 = 1 << 17;
    pub const CR8_LOAD: u32 = 1 << 19;
    pub const CR8_STORE: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW: u32 = 1 << 22;
    pub const MOV_DR: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO: u32 = 1 << 24;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const TRAP_FLAG: u32 = 1 << 27;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const PAUSE: u32 = 1 << 30;
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls.
pub mod secondary {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const APIC_ACCESSES: u32 = 1 << 0;
    pub const EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLES: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const X2APIC_MODE: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const APIC_REGISTERS: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPTS: u32 = 1 << 9;
    pub const RDRAND: u32 = 1 << 11;
    pub const INVPCID: u32 = 1 << 12;
    pub const VM_FUNCTIONS: u32 = 1 << 13;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const RDSEED: u32 = 1 << 16;
    pub const EPT_VIOLATION_VE: u32 = 1 << 18;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const SUB_PAGES: u32 = 1 << 23;
    pub const PML: u32 = 1 << 17;
    pub const TSC_SCALING: u32 = 1 << 25;
    pub const USER_WAIT: u32 = 1 << 26;
}

/// VM-exit controls.
pub mod exit_controls {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const HOST_64: u32 = 1 << 9;
    pub const ACKNOWLEDGE: u32 = 1 << 15;
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_TIMER: u32 = 1 << 22;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const CLEAR_UINV: u32 = 1 << 27;
    pub const LOAD_CET: u32 = 1 << 28;
    pub const LOAD_PKRS: u32 = 1 << 29;
}

/// VM-entry controls.
pub mod entry_controls {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const IA32E: u32 = 1 << 9;
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
    pub const LOAD_UINV: u32 = 1 << 19;
    pub const LOAD_CET: u32 = 1 << 20;
    pub const LOAD_PKRS: u32 = 1 << 22;
}

/// A word of controls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Pin-based
    Pin,
    /// Primary processor-based
    Primary,
    /// Secondary processor-based
    Secondary,
    /// VM exit
    Exit,
    /// VM entry
    Entry,
}

impl Kind {
    /// The MSR that says which bits may be 0 (low half) and 1 (high half), as this image goes by it.
    pub fn allowed(self) -> u64 {
        self.allowed_by(caps::get)
    }

    /// [`Kind::allowed`] by the MSRs that `rdmsr` reads.
    pub fn allowed_by(self, rdmsr: fn(u32) -> u64) -> u64 {
        let old = match self {
            Kind::Secondary => {
                let active = u64::from(primary::SECONDARY) << 32 & Kind::Primary.allowed_by(rdmsr) != 0;
                return if active { rdmsr(0x48B) } else { 0 };
            }
            Kind::Pin => 0x481,
            Kind::Primary => 0x482,
            Kind::Exit => 0x483,
            Kind::Entry => 0x484,
        };
        let has_true_controls = rdmsr(VMX_BASIC) & 1 << 55 != 0;
        rdmsr(if has_true_controls { old + 0xC } else { old })
    }

    /// The VMCS field.
    pub fn field(self) -> u32 {
        match self {
            Kind::Pin => f::PIN_CONTROLS,
            Kind::Primary => f::PRIMARY_CONTROLS,
            Kind::Secondary => f::SECONDARY_CONTROLS,
            Kind::Exit => f::EXIT_CONTROLS,
            Kind::Entry => f::ENTRY_CONTROLS,
        }
    }
}

/// Whether all these bits may be 1.
pub fn allowed_one(kind: Kind, bits: u32) -> bool {
    (kind.allowed() >> 32) as u32 & bits == bits
}

/// `wanted` plus the bits that must be 1.
///
/// # Errors
/// The wanted bits that may not be 1.
pub fn adjusted(kind: Kind, wanted: u32) -> Result<u32, Missing> {
    let allowed = kind.allowed();
    match wanted & !((allowed >> 32) as u32) {
        0 => Ok(wanted | allowed as u32),
        missing => Err(Missing::Controls(kind, missing)),
    }
}

/// The controls that a VMCS wants to be 1.
#[derive(Clone, Copy, Default, Debug)]
#[allow(missing_docs, reason = "named after the words of controls")]
pub struct Controls {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub exit: u32,
    pub entry: u32,
}

/// Writes the controls to the current VMCS, and 0 to the control fields that a plain guest does not use.
///
/// # Errors
/// The bits that the CPU does not allow.
pub fn write_controls(wanted: &Controls) -> Result<(), Missing> {
    let primary = wanted.primary | if wanted.secondary != 0 { primary::SECONDARY } else { 0 };
    vmx::write(f::PIN_CONTROLS, adjusted(Kind::Pin, wanted.pin)?.into());
    vmx::write(f::PRIMARY_CONTROLS, adjusted(Kind::Primary, primary)?.into());
    if primary & primary::SECONDARY != 0 {
        vmx::write(f::SECONDARY_CONTROLS, adjusted(Kind::Secondary, wanted.secondary)?.into());
    }
    vmx::write(f::EXIT_CONTROLS, adjusted(Kind::Exit, wanted.exit | exit_controls::HOST_64)?.into());
    vmx::write(f::ENTRY_CONTROLS, adjusted(Kind::Entry, wanted.entry)?.into());
    for field in [
        f::EXCEPTION_BITMAP,
        f::PF_ERROR_MASK,
        f::PF_ERROR_MATCH,
        f::CR3_TARGET_COUNT,
        f::EXIT_MSR_STORE_COUNT,
        f::EXIT_MSR_LOAD_COUNT,
        f::ENTRY_MSR_LOAD_COUNT,
        f::ENTRY_INTERRUPTION_INFO,
        f::CR0_MASK,
        f::CR4_MASK,
        f::CR0_SHADOW,
        f::CR4_SHADOW,
    ] {
        vmx::write(field, 0);
    }
    Ok(())
}
