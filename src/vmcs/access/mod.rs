//! How L2's VMREAD and VMWRITE reach the fields of a vmcs12 whose home is vmcs02, and what that means for vmcs02 between
//! the entries of L3 ([ADR 0004](../../../docs/adr/0004-field-access-strategies.md)).
//!
//! Each strategy is a file that implements the trait `Strategy`. Outside of this folder nobody asks which one runs:
//! `tests/words.rs` holds that.

mod in_memory;
mod links;
mod shadowed;
mod strategy;
mod trapped;

use super::image::ImageLayout;
use super::lending::RuleBroken;
use super::slot::Slot;
use super::vmcs12::{FieldSet, Vmcs12};
use crate::addr::Hpa;
use crate::hw::vmx::{Region, Vmx};
use crate::vmx::controls::SecondaryControls;
use crate::vmx::lent::{LentValues, Loan};
use crate::vmx::{Capabilities, Field};
use in_memory::InMemory;
use l2_protocol::abi;
pub use links::Links;
use shadowed::Shadowed;
pub use strategy::{
    Description, ExitTakes, HostState, InfoFrom, MachineParts, NestedState, Reached, Report, VmxOperation,
};
use strategy::{Known, Strategy};
use trapped::Trapped;

#[expect(clippy::large_enum_variant, reason = "each processor has one, and there is no heap")]
enum Way {
    Shadowed(Shadowed),
    Trapped(Trapped),
    InMemory(InMemory),
}

/// The strategy that was chosen at start.
pub struct VmcsAccess {
    way: Way,
    common: Known,
}

macro_rules! by {
    ($way:expr, $strategy:ident => $call:expr) => {
        match $way {
            Way::Shadowed($strategy) => $call,
            Way::Trapped($strategy) => $call,
            Way::InMemory($strategy) => $call,
        }
    };
}

impl VmcsAccess {
    /// As the machine has it: with a layout VMCSs that are not current are edited in memory. `links` is used if L2 is to reach
    /// fields by VMCS shadowing.
    pub fn new(
        strategy: abi::Strategy,
        layout: Option<ImageLayout>,
        links: Links,
        exists: FieldSet,
        offered: Capabilities,
        revision: u32,
    ) -> Self {
        let links = match strategy {
            abi::Strategy::ZeroCopy => Some(links),
            abi::Strategy::Trapped => None,
        };
        let way = match (layout, links) {
            (Some(layout), links) => Way::InMemory(InMemory::new(layout, links)),
            (None, Some(links)) => Way::Shadowed(Shadowed::new(links)),
            (None, None) => Way::Trapped(Trapped),
        };
        Self { way, common: Known { exists, revision, offered } }
    }

    /// The processor has this field.
    #[inline(always)]
    pub fn has(&self, field: Field) -> bool {
        self.common.exists.contains(field)
    }

    /// What is told of the strategy.
    pub fn description(&self) -> Description {
        by!(&self.way, strategy => strategy.description())
    }

    /// A slot became the current one of L2, or none is any more; vmcs01 is current.
    pub fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        by!(&mut self.way, strategy => strategy.link(vmx, slot));
    }

    /// L2 enters or leaves VMX operation; `others` are the secondary controls of vmcs01, which is current, that have nothing to
    /// do with that.
    pub fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        by!(&self.way, strategy => strategy.confine(vmx, operation, others));
    }

    /// VMREAD and VMWRITE bitmap by which L3 reaches its shadow VMCS, in the vmcs02 of a slot; `None` where each access exits.
    pub fn nested_bitmaps(&self, slot: &Slot) -> Option<(Hpa, Hpa)> {
        by!(&self.way, strategy => strategy.nested_bitmaps(slot))
    }

    /// Where to look for what the processor says of a VMREAD or VMWRITE of L2.
    #[inline(always)]
    pub fn info_from(&self) -> InfoFrom {
        by!(&self.way, strategy => strategy.info_from())
    }

    /// The value of a field whose home is vmcs02 and that is not in the copy.
    pub fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64 {
        by!(&self.way, strategy => strategy.read(on, slot, current, field))
    }

    /// L2 writes a field whose home is vmcs02.
    pub fn write(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field, value: u64) {
        by!(&self.way, strategy => strategy.write(on, slot, current, field, value));
    }

    /// VMWRITE of a field that can be lent: `write` does it in the copy, and says what the vmcs12 is lent from now on; more than it is
    /// lent only if it is the current one of L2, and vmcs01 is current. The VMCS at `current` is current.
    #[cold]
    pub fn write_lent(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        current: Region,
        write: impl FnOnce(&mut Slot, &Capabilities) -> Loan,
    ) {
        by!(&mut self.way, strategy => strategy.write_lent(on, slot, current, &self.common, write));
    }

    /// What L2 left in fields that it is lent is in the copy for a look; vmcs01 is current.
    pub fn look_at_lent(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(&self.way, strategy => strategy.look_at_lent(on, slot, &self.common));
    }

    /// The copy in a slot was loaded from L2's memory; vmcs01 is current.
    pub fn load(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(&self.way, strategy => strategy.load(on, slot, &self.common));
    }

    /// Completes the values in the copy of a slot, which is to be stored to L2's memory and becomes inactive; vmcs01 is current.
    pub fn store(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(&self.way, strategy => strategy.store(on, slot, &self.common));
    }

    /// Makes vmcs02 the current VMCS, with all that L2 wrote and what the entry brings. If what L2 left where it was lent something
    /// breaks a rule, or must be judged with others, the slot is stale, and the entry brings nothing.
    #[inline(always)]
    pub fn enter(&self, on: MachineParts<'_>, slot: &mut Slot, state: impl NestedState) -> Result<(), RuleBroken> {
        by!(&self.way, strategy => strategy.enter(on, slot, &self.common, state))
    }

    /// The same where an exit takes [`ExitTakes::Leaving`]: what L2 writes goes to vmcs02 at once, and the copy has nothing for it.
    #[inline(always)]
    pub fn enter_again(&self, on: MachineParts<'_>, slot: &mut Slot) -> Result<(), RuleBroken> {
        debug_assert!(slot.vmcs12.dirty.is_empty(), "what L2 wrote is in vmcs02");
        let values = slot.vmcs02.load(on.vmx, on.phys, self.common.revision);
        slot.has_back(values, &self.common.offered)
    }

    /// What `f` makes of the whole of vmcs12; vmcs02 is current.
    pub fn with_all<T>(&self, vmx: &mut Vmx, slot: &mut Slot, f: impl FnOnce(&Vmcs12) -> T) -> T {
        slot.vmcs12.fetch_missing(&mut vmx.batch(), &self.common.exists);
        let result = f(&slot.vmcs12);
        by!(&self.way, strategy => strategy.looked_at(slot));
        result
    }

    /// From vmcs02, which is current, back to vmcs01; what L2 may reach by VMCS shadowing becomes reachable again.
    pub fn leave(&mut self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(&mut self.way, strategy => strategy.leave(on, slot, &self.common));
    }

    /// An exit of L3 goes to L2: from vmcs02, which is current, to vmcs01, which gets L2's state. `report` replaces what the
    /// processor said.
    #[inline(always)]
    pub fn exit(&mut self, on: MachineParts<'_>, slot: &mut Slot, report: Option<Report>, to: impl HostState) {
        by!(&mut self.way, strategy => strategy.exit(on, slot, &self.common, report, to));
    }

    /// What an exit of L3 takes that reports nothing of nvmx's own.
    pub fn exit_takes(&self) -> ExitTakes {
        by!(&self.way, strategy => strategy.exit_takes())
    }

    /// From vmcs02, which is current, to vmcs01, where an exit takes [`ExitTakes::Leaving`].
    #[inline(always)]
    pub fn leave_by_exit(&mut self, on: MachineParts<'_>, slot: &mut Slot) {
        if slot.loan.loan == Loan::Nothing {
            slot.vmcs02.become_shadow(on.vmx, on.phys, self.common.revision, LentValues::Nothing, on.vmcs01);
        } else if let Way::Shadowed(strategy) = &mut self.way {
            strategy.leave(on, slot, &self.common);
        }
    }

    /// vmcs02, which is not current, takes the form in which vmcs01 and other vmcs02s may link to it.
    pub fn rest(&self, on: MachineParts<'_>, slot: &mut Slot) {
        slot.vmcs02.rest(on.vmx, on.phys, self.common.revision);
    }
}
