//! Into VMX operation, and a VMCS that can be launched: the host area as this image runs, a 64-bit guest.

use super::{
    cpu::{self, rdmsr},
    descriptors as d, pages, trap,
    vmx::{self, Outcome},
};
use crate::fields as f;
use core::fmt;

pub use super::controls::{
    Controls, Kind, adjusted, allowed_one, entry_controls, exit_controls, pin, primary, secondary, write_controls,
};

/// IA32_VMX_BASIC
pub const VMX_BASIC: u32 = 0x480;
/// IA32_VMX_MISC
pub const VMX_MISC: u32 = 0x485;
/// IA32_VMX_EPT_VPID_CAP
pub const VMX_EPT_VPID_CAP: u32 = 0x48C;
/// IA32_VMX_VMFUNC
pub const VMX_VMFUNC: u32 = 0x491;

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
