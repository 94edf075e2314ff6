//! The rules of VM entry, applied to the whole of a vmcs12: also to the guest state, which lives in vmcs02.

use crate::addr::Gpa;
use crate::cpu::{Cpu, Operation};
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::checks::{self, CheckId, GuestContext};
use crate::vmcs::vmcs12::{FieldSet, Vmcs12};
use l2_protocol::abi::Strategy;

const EFER_LMA: u64 = 1 << 10;

/// What the rules on guest state need besides vmcs12.
pub fn context(cpu: &Cpu, index: usize) -> GuestContext {
    let vmptr = cpu.nested.slots.get(index).and_then(|slot| slot.vmptr);
    GuestContext { current_vmptr: vmptr.unwrap_or(Gpa::new(u64::MAX)) }
}

/// L2's memory for the checks.
pub struct Pages<'a, P>(pub &'a GuestMemory<P>);

impl<P: PhysMem> checks::GuestMemory for Pages<'_, P> {
    fn read_u32(&self, address: Gpa) -> Option<u32> {
        self.0.read_u32(address).ok()
    }

    fn read_u64(&self, address: Gpa) -> Option<u64> {
        self.0.read_u64(address).ok()
    }
}

/// The rules on controls that are the processor's.
pub fn live_controls(cpu: &Cpu, vmcs12: &Vmcs12) -> Result<(), checks::Failure> {
    let offered = &cpu.config.offered;
    checks::check_live_controls(vmcs12, offered)?;
    checks::check_virtual_tpr(vmcs12, offered, &Pages(&cpu.guest))
}

/// Runs `f` on the whole of vmcs12, guest state fetched from vmcs02, which is current.
pub fn with_guest_state<T>(cpu: &mut Cpu, index: usize, f: impl FnOnce(&Cpu, &Vmcs12) -> T) -> T {
    let slot = &mut cpu.nested.slots[index];
    slot.fetch_all(&mut cpu.vmx, &cpu.config.exists);
    let result = f(cpu, &cpu.nested.slots[index].vmcs12);
    if cpu.config.strategy == Strategy::ZeroCopy || cpu.config.layout.is_some() {
        cpu.nested.slots[index].vmcs12.valid = FieldSet::CACHED;
    }
    result
}

/// Every rule that the entry breaks, and what `f` makes of the whole of vmcs12; the current VMCS is the same afterwards.
pub fn all_broken<T>(cpu: &mut Cpu, f: impl FnOnce(&Cpu, &Vmcs12, &[CheckId]) -> T) -> Option<T> {
    let index = cpu.nested.current()?;
    let long_mode = cpu.tracked.efer() & EFER_LMA != 0;
    let root = matches!(cpu.nested.operation, Operation::Root { .. });
    if root {
        let slot = &mut cpu.nested.slots[index];
        slot.load_vmcs02(&mut cpu.vmx, &cpu.phys, cpu.config.hardware.basic.revision());
        slot.flush_dirty(&mut cpu.vmx, cpu.config.strategy, &cpu.config.exists);
    }
    let result = with_guest_state(cpu, index, |cpu, vmcs12| {
        let (offered, context) = (&cpu.config.offered, context(cpu, index));
        f(cpu, vmcs12, &checks::all_broken(vmcs12, offered, long_mode, &context, &Pages(&cpu.guest)))
    });
    if root {
        cpu.nested.slots[index].leave_vmcs02(&mut cpu.vmx, &cpu.phys, &cpu.config, cpu.vmcs01);
    }
    Some(result)
}
