//! The rules of VM entry, applied to the whole of a vmcs12: also to the guest state, which lives in vmcs02.

use crate::addr::Gpa;
use crate::cpu::{Cpu, Operation};
use crate::hw::phys::DirectMap;
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::checks::{self, CheckId, Failure, GuestContext, GuestFailure};
use crate::vmcs::slots::SlotId;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::state::activity;
use crate::vmx::{Capabilities, Field};
use crate::x86::efer;

/// Activity states: HLT, shutdown, wait-for-SIPI.
const INACTIVE: core::ops::RangeInclusive<u64> = activity::HLT..=activity::WAIT_FOR_SIPI;

/// A whole vmcs12, and what the rules need besides.
pub struct Whole<'a> {
    /// All its fields.
    pub vmcs12: &'a Vmcs12,
    /// The processor that L2 sees.
    pub offered: &'a Capabilities,
    context: GuestContext,
    pages: Pages<'a, DirectMap>,
    long_mode: bool,
}

impl Whole<'_> {
    /// All rules on guest state.
    pub fn guest(&self) -> Result<(), GuestFailure> {
        checks::check_guest(self.vmcs12, self.offered, &self.context, &self.pages)
    }

    /// Those on guest state that the processor does not apply to vmcs02 as it would to vmcs12.
    pub fn guest_beyond_hardware(&self) -> Result<(), GuestFailure> {
        // KVM below halts the CPU for a halted guest and does not ask the processor whether the state is valid.
        if INACTIVE.contains(&self.vmcs12.get(Field::GUEST_ACTIVITY_STATE)) {
            return self.guest();
        }
        checks::check_guest_beyond_hardware(self.vmcs12, self.offered, &self.context, &self.pages)
    }

    /// Those on controls that lie in vmcs02.
    pub fn controls_in_vmcs02(&self) -> Result<(), Failure> {
        checks::check_live_controls(self.vmcs12, self.offered)
    }

    /// Those on controls that are the processor's.
    pub fn live_controls(&self) -> Result<(), Failure> {
        self.controls_in_vmcs02()?;
        checks::check_virtual_tpr(self.vmcs12, self.offered, &self.pages)
    }
}

/// L2's memory for the checks.
struct Pages<'a, P>(&'a GuestMemory<P>);

impl<P: PhysMem> checks::ReadsGuest for Pages<'_, P> {
    fn read_u32(&self, address: Gpa) -> Option<u32> {
        self.0.read_u32(address).ok()
    }

    fn read_u64(&self, address: Gpa) -> Option<u64> {
        self.0.read_u64(address).ok()
    }
}

/// What `f` makes of the whole of the vmcs12 in a slot; its vmcs02 is current.
pub fn whole<T>(cpu: &mut Cpu, id: SlotId, f: impl FnOnce(&Whole<'_>) -> T) -> T {
    let slot = &mut cpu.nested.slots[id];
    let context = GuestContext { current_vmptr: slot.vmptr.unwrap_or(Gpa::new(u64::MAX)) };
    let (offered, pages, long_mode) = (&cpu.config.offered, Pages(&cpu.guest), cpu.tracked.efer() & efer::LMA != 0);
    let access = &cpu.config.access;
    access.with_all(&mut cpu.vmx, slot, |vmcs12| f(&Whole { vmcs12, offered, context, pages, long_mode }))
}

/// Every rule that the entry breaks, and what `f` makes of the whole of vmcs12; the current VMCS is the same afterwards.
pub fn all_broken<T>(cpu: &mut Cpu, f: impl FnOnce(&Whole<'_>, &[CheckId]) -> T) -> Option<T> {
    let id = cpu.nested.current()?;
    let root = matches!(cpu.nested.operation, Operation::Root { .. });
    if root {
        cpu.enter_vmcs02(id);
    }
    let result = whole(cpu, id, |whole| {
        let Whole { vmcs12, offered, context, pages, long_mode } = whole;
        f(whole, &checks::all_broken(*vmcs12, offered, *long_mode, context, pages))
    });
    if root {
        cpu.leave_vmcs02(id);
    }
    Some(result)
}
