//! VMLAUNCH and VMRESUME of L2.

use super::require_root;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop};
use crate::nested::entry;
use crate::nested::result::done;
use crate::vmx::{Field, VmxError, VmxResult};

const BLOCKING_BY_MOV_SS: u64 = 1 << 1;

/// VMLAUNCH
pub fn vmlaunch(cpu: &mut Cpu) -> Result<Next, Stop> {
    vmentry(cpu, true)
}

/// VMRESUME
#[inline(always)]
pub fn vmresume(cpu: &mut Cpu) -> Result<Next, Stop> {
    vmentry(cpu, false)
}

#[inline(always)]
fn vmentry(cpu: &mut Cpu, launch: bool) -> Result<Next, Stop> {
    require_root(cpu)?;
    let Some(id) = cpu.nested.current() else { return done(cpu, VmxResult::FailInvalid) };
    // A shadow VMCS is as good as none (SDM vol. 3C, "Basic VM-Entry Checks").
    if cpu.nested.slots[id].shadow12 {
        return done(cpu, VmxResult::FailInvalid);
    }
    cpu.nested.blocking01 = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    if cpu.nested.blocking01 & BLOCKING_BY_MOV_SS != 0 {
        return done(cpu, VmxResult::FailValid(VmxError::EntryEventsBlockedByMovSs));
    }
    match (launch, cpu.nested.slots[id].vmcs12.launched) {
        (true, true) => done(cpu, VmxResult::FailValid(VmxError::VmlaunchNonClearVmcs)),
        (false, false) => done(cpu, VmxResult::FailValid(VmxError::VmresumeNonLaunchedVmcs)),
        _ => entry::enter(cpu, id),
    }
}
