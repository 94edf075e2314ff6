//! VMXON, VMXOFF and VMCALL of L2.

use super::{is_region_address, pointer_operand, require_root};
use crate::cpu::{Cpu, Operation};
use crate::guest::operand::{self, require_cpl0};
use crate::guest::{Next, Stop};
use crate::hw::vmx::Invalidate;
use crate::nested::active::{make_current, write_back};
use crate::nested::result::done;
use crate::vmcs::access::VmxOperation;
use crate::vmcs::vmcs01;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::region::REVISION;
use crate::vmx::segment::AccessRights;
use crate::vmx::{Field, VmxError, VmxResult};
use crate::x86::RFlags;
use crate::x86::msr::{FEATURE_LOCK, FEATURE_VMX};
use crate::x86::{Cr4, Fault};

/// VMXON
pub fn vmxon(cpu: &mut Cpu) -> Result<Next, Stop> {
    // The real CR4.VMXE is always set, so this #UD is nvmx's to raise.
    if vmcs01::guest_cr4(&mut cpu.vmx) & Cr4::VMXE.bits() == 0 {
        return Err(Fault::InvalidOpcode.into());
    }
    require_cpl0(cpu)?;
    if cpu.nested.operation != Operation::Off {
        return done(cpu, VmxResult::FailValid(VmxError::VmxonInVmxRootOperation));
    }
    let (cr0, cr4) = (vmcs01::guest_cr0(&mut cpu.vmx), vmcs01::guest_cr4(&mut cpu.vmx));
    let allowed = FEATURE_LOCK | FEATURE_VMX;
    if !cpu.config.offered.cr0_ok(cr0)
        || !cpu.config.offered.cr4_ok(cr4)
        || cpu.msrs.feature_control & allowed != allowed
    {
        return Err(Fault::GeneralProtection(0).into());
    }
    let at = pointer_operand(cpu)?;
    if !is_region_address(&cpu.config.offered, at) || Vmcs12::revision(&cpu.guest, at) != Ok(REVISION) {
        return done(cpu, VmxResult::FailInvalid);
    }
    cpu.nested.operation = Operation::Root { current: None };
    cpu.nested.vmxon_operand = at;
    vmcs01::confine(&mut cpu.vmx, &cpu.config, VmxOperation::On);
    // IA32_EFER.LMA can change without a write; from here on CR0.PG cannot.
    cpu.tracked.refresh(&mut cpu.vmx);
    done(cpu, VmxResult::Succeed)
}

/// VMXOFF
pub fn vmxoff(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    make_current(cpu, None);
    for id in cpu.nested.slots.ids() {
        if cpu.nested.slots[id].active {
            write_back(cpu, id);
        }
    }
    let vmx = &mut cpu.vmx;
    cpu.nested.leave(&mut cpu.frames, |vmcs02| vmx.clear(vmcs02));
    let mut tables = Cpu::tables(&mut cpu.frames, &cpu.phys);
    cpu.ept02.forget_all(&mut tables);
    // No slot watches a page of L2 any more.
    if cpu.ept01.join(&mut tables) {
        cpu.vmx.invept(Invalidate::Single, cpu.ept01.eptp().get());
    }
    vmcs01::confine(&mut cpu.vmx, &cpu.config, VmxOperation::Off);
    done(cpu, VmxResult::Succeed)
}

/// VMCALL in VMX root operation: there is no SMM monitor to call.
///
/// The one VMX instruction that exits before the processor looks at the mode.
pub fn vmcall(cpu: &mut Cpu) -> Result<Next, Stop> {
    const RFLAGS_VM: u64 = RFlags::VIRTUAL_8086_MODE.bits();
    let compatibility =
        operand::in_64_bit_mode(cpu) && !AccessRights(cpu.vmx.read(Field::GUEST_CS_AR_BYTES) as u32).is_64_bit_code();
    if compatibility || cpu.vmx.read(Field::GUEST_RFLAGS) & RFLAGS_VM != 0 {
        return Err(Fault::InvalidOpcode.into());
    }
    require_root(cpu)?;
    done(cpu, VmxResult::FailValid(VmxError::VmcallInVmxRootOperation))
}
