//! What a strategy is asked for, and with what.

use crate::addr::Hpa;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Region, Vmx};
use crate::vmcs::lending::RuleBroken;
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::exit::ExitReason;
use crate::vmx::lent::Loan;
use crate::vmx::{Capabilities, Field, FieldAccess};
use l2_protocol::abi;

/// What a reflected exit tells L2 in place of what the processor said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// Exit reason
    pub reason: ExitReason,
    /// Exit qualification
    pub qualification: u64,
    /// VM-exit interruption information and error code, of an exception or NMI.
    pub event: Option<(u32, Option<u32>)>,
}

impl Report {
    /// One that is about no event.
    pub const fn new(reason: ExitReason, qualification: u64) -> Self {
        Self { reason, qualification, event: None }
    }

    /// Hands out its fields.
    #[inline(always)]
    pub(super) fn fields(&self, mut set: impl FnMut(Field, u64)) {
        set(Field::VM_EXIT_REASON, self.reason.0.into());
        set(Field::EXIT_QUALIFICATION, self.qualification);
        if let Some((info, error)) = self.event {
            set(Field::VM_EXIT_INTR_INFO, info.into());
            if let Some(error) = error {
                set(Field::VM_EXIT_INTR_ERROR_CODE, error.into());
            }
        }
    }
}

/// What an exit of L3 that goes to L2 moves, by instructions or in the images of both VMCSs, as the vmcs12 in `slot` says.
pub trait HostState {
    /// Takes from vmcs02 what L3 leaves, and puts back what L2 is to find there.
    fn take(&mut self, vmcs02: &mut impl FieldAccess, slot: &mut Slot);

    /// Writes L2's state to vmcs01, all that does not depend on what L3 left.
    fn load(&mut self, vmcs01: &mut impl FieldAccess, slot: &Slot);

    /// Writes what else differs to vmcs01, which is seldom anything: the MSRs that nvmx knows ([`Tracked`](crate::vmcs::tracked::Tracked)).
    fn load_tracked(&mut self, vmcs01: &mut impl FieldAccess, slot: &Slot);
}

/// What an entry of L3 brings to vmcs02, besides what L2 wrote there, by instructions or in its image.
pub trait NestedState {
    /// Writes it, as the vmcs12 in `slot` says.
    fn bring(&mut self, vmcs02: &mut impl FieldAccess, slot: &mut Slot);
}

/// An entry by which no guest runs brings nothing.
impl NestedState for () {
    fn bring(&mut self, _: &mut impl FieldAccess, _: &mut Slot) {}
}

/// The machine as a strategy sees it.
pub struct MachineParts<'a> {
    /// VMX instructions.
    pub vmx: &'a mut Vmx,
    /// Physical memory.
    pub phys: &'a DirectMap,
    /// The VMCS that runs L2.
    pub vmcs01: &'a Region,
}

/// Whether L2 is in VMX operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmxOperation {
    /// Behind VMXON.
    On,
    /// Before VMXON, and behind VMXOFF.
    Off,
}

/// Where the processor's answer about an instruction of L2 is cheapest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InfoFrom {
    /// In the field for it.
    Field,
    /// In the bytes of the instruction: a hypervisor below that emulates VMX may not shadow the field.
    Code,
}

/// Where VMCSs are that are not current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Reached {
    /// In the processor: VMX instructions reach them.
    ByInstructions = 0,
    /// In memory, where nvmx edits them.
    InMemory = 1,
}

impl Reached {
    /// The word on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Reached::ByInstructions => "instructions",
            Reached::InMemory => "memory",
        }
    }
}

/// What people and programs are told of the strategy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Description {
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub strategy: abi::Strategy,
    /// How nvmx reaches a VMCS that is not current.
    pub vmcs: Reached,
}

/// What an exit of L3 takes besides L2's state in vmcs01, if nvmx reports nothing in place of the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitTakes {
    /// To leave vmcs02, no more.
    Leaving,
    /// More than that.
    More,
}

/// One strategy. `slot` is that of the vmcs12; vmcs01 is current before and after, except where a method says something else.
pub(super) trait Strategy {
    /// What is told of it.
    fn description(&self) -> Description;

    /// A slot became the current one of L2, or none is any more.
    fn link(&mut self, _: &mut Vmx, _slot: Option<&Slot>) {}

    /// L2 enters or leaves VMX operation; `others` are the secondary controls of vmcs01 that this does not touch.
    fn confine(&self, _: &mut Vmx, _operation: VmxOperation, _others: SecondaryControls) {}

    /// VMREAD and VMWRITE bitmap by which L3 reaches its shadow VMCS, in the vmcs02 of a slot; `None` where each access exits.
    fn nested_bitmaps(&self, _: &Slot) -> Option<(Hpa, Hpa)> {
        None
    }

    /// Where to look for what the processor says of a VMREAD or VMWRITE of L2.
    fn info_from(&self) -> InfoFrom {
        InfoFrom::Field
    }

    /// What an exit of L3 takes.
    fn exit_takes(&self) -> ExitTakes {
        ExitTakes::More
    }

    /// VMWRITE of a field that can be lent: `write` does it in the copy, which has then what L2 is lent, and says what it is lent from now
    /// on. That is more only for the vmcs12 to which vmcs01 links. The VMCS at `current` is current.
    fn write_lent(
        &mut self,
        _: MachineParts<'_>,
        slot: &mut Slot,
        _current: Region,
        common: &Known,
        write: impl FnOnce(&mut Slot, &Capabilities) -> Loan,
    ) {
        write(slot, &common.offered);
    }

    /// What L2 left in fields that it is lent is in the copy for a look: L2 may change it again without an exit. vmcs01 is current.
    fn look_at_lent(&self, _: MachineParts<'_>, _slot: &mut Slot, _: &Known) {}

    /// VMREAD of a field that is not in the copy. The VMCS at `current` is current.
    fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64;

    /// VMWRITE of a field whose home is vmcs02. The VMCS at `current` is current.
    fn write(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field, value: u64);

    /// The copy was loaded from L2's memory, all of it.
    fn load(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known);

    /// The copy is to have the value of each field, with what L2 left where it is lent something: the vmcs12 goes to L2's memory and
    /// becomes inactive. Which of them it keeps is as for one that is active.
    fn store(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known);

    /// Makes vmcs02 the current VMCS, with what L2 wrote and what the entry brings. If what L2 left where it was lent something breaks a
    /// rule, nothing else is written to vmcs02.
    #[inline(always)]
    fn enter(
        &self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        mut state: impl NestedState,
    ) -> Result<(), RuleBroken> {
        let values = slot.vmcs02.load(on.vmx, on.phys, common.revision);
        slot.has_back(values, &common.offered)?;
        self.write_dirty(on.vmx, slot, common);
        state.bring(on.vmx, slot);
        Ok(())
    }

    /// vmcs02, which is current now, gets what L2 wrote and is in the copy alone: nothing, where `load` and `write` bring all to vmcs02.
    #[inline(always)]
    fn write_dirty(&self, _: &mut Vmx, _: &mut Slot, _: &Known) {}

    /// The copy was filled with what only vmcs02 has, for a look at the whole: L2 may change that again without an exit.
    fn looked_at(&self, slot: &mut Slot);

    /// From vmcs02, which is current, back to vmcs01, without an exit of L3.
    fn leave(&mut self, on: MachineParts<'_>, slot: &mut Slot, common: &Known);

    /// An exit of L3 goes to L2: from vmcs02, which is current, to vmcs01, which gets L2's state.
    fn exit(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        report: Option<Report>,
        to: impl HostState,
    );
}

/// What all strategies know.
pub(super) struct Known {
    /// Fields that the processor has.
    pub(super) exists: FieldSet,
    /// Its revision identifier.
    pub(super) revision: u32,
    /// What L2 is offered, as far as rules on values depend on it.
    pub(super) offered: Capabilities,
}

/// Runs `f` with vmcs02 as the current VMCS, in whichever form it is, and goes back to the one that was.
pub(super) fn on_vmcs02<T>(vmx: &mut Vmx, vmcs02: Region, current: Region, f: impl FnOnce(&mut Vmx) -> T) -> T {
    vmx.ptrld(vmcs02);
    let result = f(vmx);
    vmx.ptrld(current);
    result
}
