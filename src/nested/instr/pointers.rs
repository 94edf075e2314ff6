//! VMPTRLD, VMPTRST and VMCLEAR of L2, and the slots behind them.

use super::{is_region_address, pointer_operand, require_root};
use crate::addr::Gpa;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop, operand};
use crate::nested::active;
use crate::nested::result::done;
use crate::vmcs::slot::VmcsKind;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::instr::Direction;
use crate::vmx::region::{NO_LINK, REVISION, SHADOW_INDICATOR};
use crate::vmx::{VmxError, VmxResult};

/// VMPTRLD
pub fn vmptrld(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let at = pointer_operand(cpu)?;
    if !is_region_address(&cpu.config.offered, at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldInvalidAddress));
    }
    if cpu.nested.vmxon_ptr() == Some(at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldVmxonPointer));
    }
    // No memory there reads as all ones.
    let revision = Vmcs12::revision(&cpu.guest, at).unwrap_or(u32::MAX);
    let kind = if revision & SHADOW_INDICATOR != 0 { VmcsKind::Shadow } else { VmcsKind::Ordinary };
    let may_be_shadow = cpu.config.offered.secondary.allows(SecondaryControls::VMCS_SHADOWING);
    if revision & !SHADOW_INDICATOR != REVISION || kind == VmcsKind::Shadow && !may_be_shadow {
        return done(cpu, VmxResult::FailValid(VmxError::VmptrldIncorrectRevisionId));
    }
    let id = active::activate(cpu, at, kind);
    if cpu.nested.current() != Some(id) {
        active::make_current(cpu, Some(id));
    }
    done(cpu, VmxResult::Succeed)
}

/// VMPTRST
pub fn vmptrst(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let linear = operand::linear(cpu, 8, Direction::Store)?;
    let vmptr = cpu.nested.current().and_then(|id| cpu.nested.slots[id].vmptr);
    operand::write(cpu, linear, &vmptr.map_or(NO_LINK, Gpa::get).to_le_bytes())?;
    done(cpu, VmxResult::Succeed)
}

/// VMCLEAR
pub fn vmclear(cpu: &mut Cpu) -> Result<Next, Stop> {
    require_root(cpu)?;
    let at = pointer_operand(cpu)?;
    if !is_region_address(&cpu.config.offered, at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmclearInvalidAddress));
    }
    if cpu.nested.vmxon_ptr() == Some(at) {
        return done(cpu, VmxResult::FailValid(VmxError::VmclearVmxonPointer));
    }
    match cpu.nested.find(at).filter(|id| cpu.nested.slots[*id].active) {
        Some(id) => {
            cpu.nested.slots[id].clear_launch_state();
            if cpu.nested.current() == Some(id) {
                active::make_current(cpu, None);
            }
            active::write_back(cpu, id);
        }
        // Where L2 owns no memory the write is lost, as on the bus.
        None => {
            let _ = Vmcs12::clear_region(&cpu.guest, at);
        }
    }
    done(cpu, VmxResult::Succeed)
}
