//! VMREAD and VMWRITE of L2 that exit: all of them without VMCS shadowing, else those on fields that are not open.

use super::require_root;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop};
use crate::nested::fields;
use crate::nested::result::done;
use crate::vmx::VmxResult;
use l2_protocol::abi::Counter;

/// VMREAD
pub fn vmread(cpu: &mut Cpu) -> Result<Next, Stop> {
    cpu.vmx.counters.bump(Counter::TrappedVmread);
    require_root(cpu)?;
    match cpu.nested.current() {
        Some(id) => fields::read(cpu, id),
        None => done(cpu, VmxResult::FailInvalid),
    }
}

/// VMWRITE
pub fn vmwrite(cpu: &mut Cpu) -> Result<Next, Stop> {
    cpu.vmx.counters.bump(Counter::TrappedVmwrite);
    require_root(cpu)?;
    match cpu.nested.current() {
        Some(id) => fields::write(cpu, id),
        None => done(cpu, VmxResult::FailInvalid),
    }
}
