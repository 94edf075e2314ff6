//! Exits of L2 for control registers: it touched a bit that nvmx owns. vmcs01 is current.

use super::cr::{Effects, Mode, lmsw, write_cr0, write_cr4};
use crate::cpu::{Cpu, Operation};
use crate::guest::{Next, Stop, operand};
use crate::hw::cr;
use crate::hw::vmx::Invalidate;
use crate::mm::linear::{fetch_pdptes, pdptes_are_valid};
use crate::trace::KillReason;
use crate::vmcs::vmcs01;
use crate::vmcs::vpid::VPID01;
use crate::vmx::Field;
use crate::vmx::controls::EntryControls;
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::field::PDPTES;
use crate::vmx::qualification::CrAccess;
use crate::vmx::segment::AccessRights;
use crate::x86::{Cr0, Fault, efer};

/// Of the type of a TSS: 32 or 64 bits.
const TSS_WIDE: u64 = 1 << 3;
const CR0_FIXED_BY_VMX: u64 = Cr0::NE.bits();

/// Emulates the access.
pub fn handle(cpu: &mut Cpu) -> Result<Next, Stop> {
    let access = CrAccess::decode(cpu.vmx.read(Field::EXIT_QUALIFICATION));
    let mode = Mode {
        cr0: vmcs01::guest_cr0(&mut cpu.vmx),
        cr4: vmcs01::guest_cr4(&mut cpu.vmx),
        cr3: cpu.vmx.read(Field::GUEST_CR3),
        efer: cpu.vmx.read(Field::GUEST_IA32_EFER),
        cs_long: AccessRights(cpu.vmx.read(Field::GUEST_CS_AR_BYTES) as u32).is_64_bit_code(),
        tss_16: cpu.vmx.read(Field::GUEST_TR_AR_BYTES) & TSS_WIDE == 0,
        vmx_operation: cpu.nested.operation != Operation::Off,
    };
    match access {
        CrAccess::Write { cr: 0, gpr } => {
            let value = register(cpu, gpr);
            set_cr0(cpu, mode, value)?;
        }
        CrAccess::Write { cr: 4, gpr } => {
            let value = register(cpu, gpr);
            let effects = write_cr4(mode, value, cpu.config.offered.cr4_fixed1)?;
            apply(cpu, effects)?;
            // CR4.VMXE stays set in the processor; L2 sees its own value in the shadow.
            cpu.vmx.write(Field::GUEST_CR4, value | cpu.config.hardware.cr4_fixed0);
            cpu.vmx.write(Field::CR4_READ_SHADOW, value);
        }
        CrAccess::Clts => set_cr0(cpu, mode, mode.cr0 & !Cr0::TS.bits())?,
        CrAccess::Lmsw { source, .. } => set_cr0(cpu, mode, lmsw(mode.cr0, source))?,
        _ => {
            let reason = ExitReason::exit(BasicReason::CR_ACCESS);
            return Err(KillReason::UnexpectedExit(reason.0).into());
        }
    }
    Ok(Next::Advance)
}

fn register(cpu: &mut Cpu, number: u8) -> u64 {
    let value = operand::gpr(cpu, number);
    if operand::is_64_bit_code(cpu) { value } else { value & 0xFFFF_FFFF }
}

fn set_cr0(cpu: &mut Cpu, mode: Mode, value: u64) -> Result<(), Fault> {
    /// ET is hardwired to 1.
    const ET: u64 = 1 << 4;
    let effects = write_cr0(mode, value)?;
    apply(cpu, effects)?;
    // VM entry leaves CD and NW as they are in the processor (SDM, "Loading Guest Control Registers, ...").
    cr::set_caching(value);
    cpu.vmx.write(Field::GUEST_CR0, value | ET | CR0_FIXED_BY_VMX);
    cpu.vmx.write(Field::CR0_READ_SHADOW, value | ET);
    Ok(())
}

/// What comes with the new value; a fault, which must leave the register as it was, comes first.
fn apply(cpu: &mut Cpu, effects: Effects) -> Result<(), Fault> {
    if effects.load_pdptes {
        let entries = fetch_pdptes(&cpu.guest, cpu.vmx.read(Field::GUEST_CR3));
        if !pdptes_are_valid(&entries, cpu.guest.limit()) {
            return Err(Fault::GeneralProtection(0));
        }
        PDPTES.into_iter().zip(entries).for_each(|(field, entry)| cpu.vmx.write(field, entry));
    }
    if let Some(long) = effects.long_mode {
        let bit = EntryControls::IA32E_MODE_GUEST.bits() as u64;
        let (efer, controls) = (cpu.vmx.read(Field::GUEST_IA32_EFER), cpu.vmx.read(Field::VM_ENTRY_CONTROLS));
        cpu.vmx.write(Field::GUEST_IA32_EFER, if long { efer | efer::LMA } else { efer & !efer::LMA });
        cpu.vmx.write(Field::VM_ENTRY_CONTROLS, if long { controls | bit } else { controls & !bit });
    }
    if effects.flush {
        cpu.vmx.invvpid(Invalidate::Single, VPID01, 0);
    }
    Ok(())
}
