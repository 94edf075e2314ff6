//! Into VMX operation, and a VMCS that can be launched: controls adjusted to what the CPU allows, the host area as this
//! image runs, a 64-bit guest.

use super::{
    cpu::{self, rdmsr},
    descriptors as d, pages, trap,
    vmx::{self, Outcome},
};
use crate::fields as f;
use core::fmt;

/// IA32_VMX_BASIC
pub const VMX_BASIC: u32 = 0x480;
/// IA32_VMX_MISC
pub const VMX_MISC: u32 = 0x485;
/// IA32_VMX_EPT_VPID_CAP
pub const VMX_EPT_VPID_CAP: u32 = 0x48C;

/// Pin-based controls (SDM "Definitions of Pin-Based VM-Execution Controls").
pub mod pin {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMI: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
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
    pub const CR8_LOAD: u32 = 1 << 19;
    pub const CR8_STORE: u32 = 1 << 20;
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
    pub const EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLES: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const RDRAND: u32 = 1 << 11;
    pub const INVPCID: u32 = 1 << 12;
    pub const RDSEED: u32 = 1 << 16;
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
}

/// VM-entry controls.
pub mod entry_controls {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const IA32E: u32 = 1 << 9;
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// Why there is no VMX operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// CPUID.1:ECX.VMX is 0
    Vmx,
    /// IA32_FEATURE_CONTROL is locked without VMX
    FeatureControl(u64),
    /// The capability MSR does not allow these control bits to be 1
    Controls(Kind, u32),
    /// An instruction of the set-up failed
    Instruction(&'static str, Outcome),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Vmx => write!(f, "this CPU lacks VMX (CPUID.1:ECX.VMX = 0)"),
            Missing::FeatureControl(value) => write!(f, "IA32_FEATURE_CONTROL is locked with {value:#x}: VMX is off"),
            Missing::Controls(kind, bits) => write!(f, "the CPU does not allow the {kind:?} controls {bits:#x}"),
            Missing::Instruction(name, outcome) => write!(f, "{name}: {outcome}"),
        }
    }
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
    /// The MSR that says which bits may be 0 (low half) and 1 (high half).
    pub fn allowed(self) -> u64 {
        let old = match self {
            Kind::Secondary => return if allowed_one(Kind::Primary, primary::SECONDARY) { rdmsr(0x48B) } else { 0 },
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

/// The VMCS revision that this CPU wants.
pub fn revision() -> u32 {
    rdmsr(VMX_BASIC) as u32 & 0x7FFF_FFFF
}

/// Sets feature control, CR0 and CR4 as VMXON asks for.
///
/// # Errors
/// If the CPU has no VMX or the firmware has locked it away.
pub fn prepare_vmx() -> Result<(), Missing> {
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        return Err(Missing::Vmx);
    }
    let control = rdmsr(cpu::FEATURE_CONTROL);
    if control & 1 == 0 {
        cpu::wrmsr(cpu::FEATURE_CONTROL, control | 0b101);
    } else if control & 0b100 == 0 {
        return Err(Missing::FeatureControl(control));
    }
    cpu::set_cr0((cpu::cr0() | rdmsr(0x486)) & rdmsr(0x487));
    cpu::set_cr4((cpu::cr4() | rdmsr(0x488) | cpu::CR4_VMXE) & rdmsr(0x489));
    Ok(())
}

/// A page with the VMCS revision in it.
pub fn region() -> u64 {
    let page = pages::page();
    page[0] = u64::from(revision());
    pages::address(page)
}

/// Enters VMX operation; returns the address of the VMXON region.
///
/// # Errors
/// What is missing.
pub fn enter_vmx() -> Result<u64, Missing> {
    prepare_vmx()?;
    let region = region();
    match vmx::vmxon(region) {
        Outcome::Succeed => Ok(region),
        other => Err(Missing::Instruction("VMXON", other)),
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

/// Writes the host area of the current VMCS as this image runs now; RSP and RIP are `vcpu`'s.
pub fn write_host_state() {
    for (field, value) in [
        (f::HOST_CR0, cpu::cr0()),
        (f::HOST_CR3, cpu::cr3()),
        (f::HOST_CR4, cpu::cr4()),
        (f::HOST_CS, d::KERNEL_CODE.into()),
        (f::HOST_SS, d::KERNEL_DATA.into()),
        (f::HOST_DS, d::KERNEL_DATA.into()),
        (f::HOST_ES, d::KERNEL_DATA.into()),
        (f::HOST_FS, 0),
        (f::HOST_GS, 0),
        (f::HOST_TR, d::TSS.into()),
        (f::HOST_FS_BASE, rdmsr(cpu::FS_BASE)),
        (f::HOST_GS_BASE, rdmsr(cpu::GS_BASE)),
        (f::HOST_TR_BASE, d::tss_base()),
        (f::HOST_GDTR_BASE, d::gdt_base()),
        (f::HOST_IDTR_BASE, trap::idt_base()),
        (f::HOST_SYSENTER_CS, 0),
        (f::HOST_SYSENTER_ESP, 0),
        (f::HOST_SYSENTER_EIP, 0),
    ] {
        vmx::write(field, value);
    }
    if vmx::read(f::EXIT_CONTROLS) as u32 & exit_controls::LOAD_EFER != 0 {
        vmx::write(f::HOST_EFER, rdmsr(cpu::EFER));
    }
}

/// Segments of the 64-bit guest: selector, limit, access rights. Fields of ES, CS, SS, DS, FS, GS, LDTR, TR follow one
/// another in steps of 2.
const SEGMENTS: [(u16, u32, u32); 8] = [
    (d::KERNEL_DATA, 0xFFFF_FFFF, 0xC093),
    (d::KERNEL_CODE, 0xFFFF_FFFF, 0xA09B),
    (d::KERNEL_DATA, 0xFFFF_FFFF, 0xC093),
    (d::KERNEL_DATA, 0xFFFF_FFFF, 0xC093),
    (0, 0xFFFF_FFFF, 1 << 16),
    (0, 0xFFFF_FFFF, 1 << 16),
    (0, 0xFFFF_FFFF, 1 << 16),
    (d::TSS, d::TSS_LIMIT, 0x8B),
];

/// Writes the guest area of the current VMCS: ring 0, 64-bit, interrupts off, this image's GDT and TSS, the given page
/// tables, the image's IDT or none.
pub fn write_guest_state(cr3: u64, idt: bool) {
    for (step, (selector, limit, rights)) in (0u32..).step_by(2).zip(SEGMENTS) {
        vmx::write(f::GUEST_ES + step, selector.into());
        vmx::write(f::GUEST_ES_LIMIT + step, limit.into());
        vmx::write(f::GUEST_ES_AR + step, rights.into());
        vmx::write(f::GUEST_ES_BASE + step, if selector == d::TSS { d::tss_base() } else { 0 });
    }
    for (field, value) in [
        (f::GUEST_CR0, cpu::cr0()),
        (f::GUEST_CR3, cr3),
        (f::GUEST_CR4, cpu::cr4()),
        (f::GUEST_GDTR_BASE, d::gdt_base()),
        (f::GUEST_GDTR_LIMIT, d::GDT_LIMIT.into()),
        (f::GUEST_IDTR_BASE, trap::idt_base()),
        (f::GUEST_IDTR_LIMIT, if idt { trap::IDT_LIMIT.into() } else { 0 }),
        (f::GUEST_DR7, 0x400),
        (f::GUEST_RFLAGS, 2),
        (f::GUEST_INTERRUPTIBILITY, 0),
        (f::GUEST_ACTIVITY, 0),
        (f::GUEST_PENDING_DEBUG, 0),
        (f::GUEST_DEBUGCTL, 0),
        (f::GUEST_SYSENTER_CS, 0),
        (f::GUEST_SYSENTER_ESP, 0),
        (f::GUEST_SYSENTER_EIP, 0),
        (f::LINK_POINTER, u64::MAX),
    ] {
        vmx::write(field, value);
    }
    let entry = vmx::read(f::ENTRY_CONTROLS) as u32;
    if entry & entry_controls::LOAD_EFER != 0 {
        vmx::write(f::GUEST_EFER, rdmsr(cpu::EFER));
    }
}
