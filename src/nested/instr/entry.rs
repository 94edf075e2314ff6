//! VMLAUNCH and VMRESUME of L2.

use super::require_root;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop};
use crate::nested::entry;
use crate::nested::result::done;
use crate::vmcs::slot::VmcsKind;
use crate::vmx::state::interruptibility;
use crate::vmx::{Field, VmxError, VmxResult};

/// The launch state that an instruction wants of its VMCS.
#[derive(Clone, Copy)]
enum LaunchState {
    Clear,
    Launched,
}

/// VMLAUNCH
pub fn vmlaunch(cpu: &mut Cpu) -> Result<Next, Stop> {
    vmentry(cpu, LaunchState::Clear)
}

/// VMRESUME
#[inline(always)]
pub fn vmresume(cpu: &mut Cpu) -> Result<Next, Stop> {
    vmentry(cpu, LaunchState::Launched)
}

#[inline(always)]
fn vmentry(cpu: &mut Cpu, wanted: LaunchState) -> Result<Next, Stop> {
    require_root(cpu)?;
    let Some(id) = cpu.nested.current() else { return done(cpu, VmxResult::FailInvalid) };
    // A shadow VMCS is as good as none (SDM vol. 3C, "Basic VM-Entry Checks").
    if cpu.nested.slots[id].kind == VmcsKind::Shadow {
        return done(cpu, VmxResult::FailInvalid);
    }
    cpu.nested.blocking01 = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    if cpu.nested.blocking01 & interruptibility::MOV_SS != 0 {
        return done(cpu, VmxResult::FailValid(VmxError::EntryEventsBlockedByMovSs));
    }
    match (wanted, cpu.nested.slots[id].vmcs12.is_launched()) {
        (LaunchState::Clear, true) => done(cpu, VmxResult::FailValid(VmxError::VmlaunchNonClearVmcs)),
        (LaunchState::Launched, false) => done(cpu, VmxResult::FailValid(VmxError::VmresumeNonLaunchedVmcs)),
        _ => entry::enter(cpu, id),
    }
}
