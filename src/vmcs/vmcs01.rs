//! vmcs01: it runs L2, as thinly as VMX allows.
//!
//! Intercepts beyond the unconditional ones: MSRs (rules::msr_policy), CR4.VMXE and FRED, CR0.NE, and CR0.PE and
//! CR0.PG while L2 is in VMX operation. Interrupts, ports, devices, timers and exceptions are L2's own.
//! Source: SDM vol. 3C, "VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields".

use super::Config;
use super::access::VmxOperation;
use crate::addr::Hpa;
use crate::hw::host_area;
use crate::hw::vmenter::GuestRegs;
use crate::hw::vmx::Vmx;
use crate::rules::switched;
use crate::vmcs::vpid::VPID01;
use crate::vmx::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::{Capabilities, Field};
use crate::x86::{Cr0, Cr4};

/// Pin-based controls of vmcs01.
pub fn pin(caps: &Capabilities) -> PinControls {
    caps.pin.with_required(PinControls::empty())
}

/// Primary processor-based controls of vmcs01.
pub fn primary(caps: &Capabilities) -> PrimaryControls {
    caps.primary.with_required(PrimaryControls::USE_MSR_BITMAPS | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
}

/// Secondary processor-based controls of vmcs01; instructions that need a control to work get it if the CPU has it.
pub fn secondary(caps: &Capabilities) -> SecondaryControls {
    let enables = SecondaryControls::ENABLE_RDTSCP
        | SecondaryControls::ENABLE_INVPCID
        | SecondaryControls::ENABLE_XSAVES
        | SecondaryControls::ENABLE_USER_WAIT_AND_PAUSE;
    caps.secondary.with_required(
        SecondaryControls::ENABLE_EPT
            | SecondaryControls::ENABLE_VPID
            | SecondaryControls::UNRESTRICTED_GUEST
            | enables & caps.secondary.settable(),
    )
}

/// VM-exit controls of vmcs01.
pub fn exit(caps: &Capabilities) -> ExitControls {
    caps.exit.with_required(ExitControls::HOST_ADDRESS_SPACE_SIZE | switched::exit_controls())
}

/// VM-entry controls of vmcs01, for L2 outside IA-32e mode.
pub fn entry(caps: &Capabilities) -> EntryControls {
    caps.entry.with_required(switched::entry_controls())
}

/// What vmcs01 points to.
pub struct Points {
    /// MSR bitmap.
    pub msr_bitmap: Hpa,
    /// EPTP of ept01.
    pub eptp: u64,
}

/// Writes vmcs01, which is current, but for what an INIT resets (`guest::initial`).
pub fn set_up(vmx: &mut Vmx, caps: &Capabilities, regs: &mut GuestRegs, to: &Points) {
    host_area::write(vmx, regs);
    for (field, value) in [
        (Field::PIN_BASED_VM_EXEC_CONTROL, pin(caps).bits() as u64),
        (Field::CPU_BASED_VM_EXEC_CONTROL, primary(caps).bits() as u64),
        (Field::SECONDARY_VM_EXEC_CONTROL, secondary(caps).bits() as u64),
        (Field::VM_EXIT_CONTROLS, exit(caps).bits() as u64),
        (Field::EXCEPTION_BITMAP, 0),
        (Field::PAGE_FAULT_ERROR_CODE_MASK, 0),
        (Field::PAGE_FAULT_ERROR_CODE_MATCH, 0),
        (Field::CR3_TARGET_COUNT, 0),
        (Field::VM_EXIT_MSR_STORE_COUNT, 0),
        (Field::VM_EXIT_MSR_LOAD_COUNT, 0),
        (Field::MSR_BITMAP, to.msr_bitmap.get()),
        (Field::EPT_POINTER, to.eptp),
        (Field::VIRTUAL_PROCESSOR_ID, VPID01 as u64),
        (Field::TSC_OFFSET, 0),
        (Field::GUEST_IA32_PAT, 0x0007_0406_0007_0406),
        (Field::GUEST_SYSENTER_CS, 0),
        (Field::GUEST_SYSENTER_ESP, 0),
        (Field::GUEST_SYSENTER_EIP, 0),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ] {
        vmx.write(field, value);
    }
    if caps.has_field(Field::XSS_EXITING_BITMAP) {
        vmx.write(Field::XSS_EXITING_BITMAP, 0);
    }
}

/// Sets which bits of CR0 and CR4 nvmx owns, and what L2 reaches by VMCS shadowing; vmcs01 is current.
pub fn confine(vmx: &mut Vmx, config: &Config, operation: VmxOperation) {
    let mode = match operation {
        VmxOperation::On => Cr0::PE | Cr0::PG,
        VmxOperation::Off => Cr0::empty(),
    };
    vmx.write(Field::CR0_GUEST_HOST_MASK, (Cr0::NE | mode).bits());
    if operation == VmxOperation::On {
        // VMXON was refused unless they are set.
        vmx.write(Field::CR0_READ_SHADOW, (Cr0::NE | Cr0::PE | Cr0::PG).bits());
    }
    vmx.write(Field::CR4_GUEST_HOST_MASK, (Cr4::VMXE | Cr4::FRED).bits());
    config.access.confine(vmx, operation, secondary(&config.hardware));
}

/// CR0 as L2 sees it; vmcs01 is current.
pub fn guest_cr0(vmx: &mut Vmx) -> u64 {
    seen(vmx, Field::GUEST_CR0, Field::CR0_READ_SHADOW, Field::CR0_GUEST_HOST_MASK)
}

/// CR4 as L2 sees it; vmcs01 is current.
pub fn guest_cr4(vmx: &mut Vmx) -> u64 {
    seen(vmx, Field::GUEST_CR4, Field::CR4_READ_SHADOW, Field::CR4_GUEST_HOST_MASK)
}

fn seen(vmx: &mut Vmx, value: Field, shadow: Field, mask: Field) -> u64 {
    let mask = vmx.read(mask);
    vmx.read(value) & !mask | vmx.read(shadow) & mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::caps::msr;
    use crate::vmx::controls::Controls;

    /// A processor that allows every control and demands only what every processor does.
    fn machine() -> Capabilities {
        let word = |demanded: u32| u64::from(demanded) | 0xFFFF_FFFF << 32;
        let value = |index| match index {
            msr::IA32_VMX_BASIC => 1 << 55,
            msr::IA32_VMX_PINBASED_CTLS | msr::IA32_VMX_TRUE_PINBASED_CTLS => word(PinControls::DEFAULT1),
            msr::IA32_VMX_PROCBASED_CTLS => word(PrimaryControls::DEFAULT1),
            // The TRUE MSRs lift the demand for CR3 exits and debug controls.
            msr::IA32_VMX_TRUE_PROCBASED_CTLS => word(PrimaryControls::DEFAULT1 & !(3 << 15)),
            msr::IA32_VMX_EXIT_CTLS => word(ExitControls::DEFAULT1),
            msr::IA32_VMX_TRUE_EXIT_CTLS => word(ExitControls::DEFAULT1 & !(1 << 2)),
            msr::IA32_VMX_ENTRY_CTLS => word(EntryControls::DEFAULT1),
            msr::IA32_VMX_TRUE_ENTRY_CTLS => word(EntryControls::DEFAULT1 & !(1 << 2)),
            _ => word(0),
        };
        Capabilities::read(value, 39, 48)
    }

    #[test]
    fn the_guest_keeps_its_interrupts_timers_ports_and_registers() {
        let (pin, primary) = (pin(&machine()), primary(&machine()));
        assert_eq!(pin.bits(), PinControls::DEFAULT1, "no interrupt, NMI or timer exits");
        let exiting = PrimaryControls::USE_MSR_BITMAPS | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        assert_eq!(primary.bits(), exiting.bits() | PrimaryControls::DEFAULT1 & !(3 << 15));
    }

    #[test]
    fn secondary_controls_confine_the_guest_and_enable_instructions_only() {
        let confining =
            SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID | SecondaryControls::UNRESTRICTED_GUEST;
        let enabling = secondary(&machine()) - confining;
        assert!(secondary(&machine()).contains(confining));
        let instructions = SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID
            | SecondaryControls::ENABLE_XSAVES
            | SecondaryControls::ENABLE_USER_WAIT_AND_PAUSE;
        assert_eq!(enabling, instructions);
    }

    #[test]
    fn what_nvmx_must_not_share_with_the_guest_is_switched_both_ways() {
        let (exit, entry) = (exit(&machine()), entry(&machine()));
        assert!(
            exit.contains(ExitControls::SAVE_EFER | ExitControls::LOAD_EFER)
                && entry.contains(EntryControls::LOAD_EFER)
        );
        assert!(
            exit.contains(ExitControls::SAVE_PAT | ExitControls::LOAD_PAT) && entry.contains(EntryControls::LOAD_PAT)
        );
        assert!(exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE));
        assert!(!entry.contains(EntryControls::IA32E_MODE_GUEST), "L2 starts in 32-bit mode");
    }
}
