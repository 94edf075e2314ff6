//! How L2's VMREAD and VMWRITE reach the fields of a vmcs12 whose home is vmcs02, and what that means for vmcs02 between
//! the entries of L3 ([ADR 0004](../../../docs/adr/0004-field-access-strategies.md)).
//!
//! Each strategy is a file that implements the trait `Strategy`. Outside of this folder a few questions about what a
//! strategy leaves in VMCSs are asked, and none which one runs.

mod in_memory;
mod shadowed;
mod strategy;
mod trapped;

use super::image::Layout;
use super::slot::Slot;
use super::vmcs12::{FieldSet, Vmcs12};
use crate::hw::vmx::{Region, Vmx};
use crate::vmx::Field;
use in_memory::InMemory;
use l2_protocol::abi;
use shadowed::Shadowed;
use strategy::{Common, Strategy};
pub use strategy::{HostState, MachineParts, Report};
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
    common: Common,
}

macro_rules! by {
    ($access:expr, $strategy:ident => $call:expr) => {
        match &$access.way {
            Way::Shadowed($strategy) => $call,
            Way::Trapped($strategy) => $call,
            Way::InMemory($strategy) => $call,
        }
    };
}

impl VmcsAccess {
    /// As the machine has it: with a layout VMCSs that are not current are edited in memory.
    pub fn new(strategy: abi::Strategy, layout: Option<Layout>, exists: FieldSet, revision: u32) -> Self {
        let way = match (layout, strategy) {
            (Some(layout), strategy) => Way::InMemory(InMemory::new(layout, strategy == abi::Strategy::ZeroCopy)),
            (None, abi::Strategy::ZeroCopy) => Way::Shadowed(Shadowed),
            (None, abi::Strategy::Trapped) => Way::Trapped(Trapped),
        };
        Self { way, common: Common { exists, revision } }
    }

    /// The processor has this field.
    #[inline(always)]
    pub fn has(&self, field: Field) -> bool {
        self.common.exists.contains(field)
    }

    /// Its name in the counters' interface.
    pub fn strategy(&self) -> abi::Strategy {
        if self.vmcs01_links() { abi::Strategy::ZeroCopy } else { abi::Strategy::Trapped }
    }

    /// VMCSs that are not current are edited in memory.
    pub fn is_in_memory(&self) -> bool {
        matches!(self.way, Way::InMemory(_))
    }

    /// L2 reaches fields of the VMCS to which vmcs01 links, without an exit.
    pub fn vmcs01_links(&self) -> bool {
        match &self.way {
            Way::Shadowed(_) => true,
            Way::Trapped(_) => false,
            Way::InMemory(strategy) => strategy.is_shadowed(),
        }
    }

    /// L3 reaches fields of its shadow VMCS by the hardware as well, if L2 lets it.
    pub fn vmcs02_links(&self) -> bool {
        matches!(self.way, Way::Shadowed(_))
    }

    /// The value of a field whose home is vmcs02 and that is not in the copy.
    pub fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64 {
        by!(self, strategy => strategy.read(on, slot, current, field))
    }

    /// L2 writes a field whose home is vmcs02.
    pub fn write(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field, value: u64) {
        by!(self, strategy => strategy.write(on, slot, current, field, value));
    }

    /// VMWRITE of HOST_RSP, which is in the copy already. The VMCS at `current` is current. `learn` tells that this is the sign of an L2
    /// that writes it often: from now on it is lent. True if it was not before.
    #[cold]
    pub fn write_host_rsp(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, learn: bool) -> bool {
        let learned = learn && !slot.lends && matches!(self.way, Way::Shadowed(_));
        slot.lends |= learned;
        if let Some(value) = slot.host_rsp_to_lend() {
            on.vmx.ptrld(slot.vmcs02.region());
            slot.vmcs02.lend(on.vmx, on.phys, value);
            on.vmx.ptrld(current);
        }
        learned
    }

    /// The copy in a slot was loaded from L2's memory; vmcs01 is current.
    pub fn load(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(self, strategy => strategy.load(on, slot, &self.common));
    }

    /// Completes the copy in a slot, which is to be stored to L2's memory; vmcs01 is current.
    pub fn store(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(self, strategy => strategy.store(on, slot, &self.common));
    }

    /// The copy was stored, and the vmcs12 is inactive.
    pub fn stored(&self, slot: &mut Slot) {
        by!(self, strategy => strategy.stored(slot));
    }

    /// Makes vmcs02 the current VMCS, with all that L2 wrote.
    #[inline(always)]
    pub fn enter(&self, on: MachineParts<'_>, slot: &mut Slot) {
        if let Some(host_rsp) = slot.vmcs02.load(on.vmx, on.phys, self.common.revision) {
            slot.host_rsp_is_back(host_rsp);
        }
        if !slot.vmcs12.dirty.is_empty() {
            self.write_dirty(on, slot);
        }
    }

    #[inline(never)]
    fn write_dirty(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(self, strategy => strategy.enter(on, slot, &self.common));
    }

    /// What `f` makes of the whole of vmcs12; vmcs02 is current.
    pub fn with_all<T>(&self, vmx: &mut Vmx, slot: &mut Slot, f: impl FnOnce(&Vmcs12) -> T) -> T {
        slot.vmcs12.fetch_missing(vmx, &self.common.exists);
        let result = f(&slot.vmcs12);
        by!(self, strategy => strategy.looked_at(slot));
        result
    }

    /// From vmcs02, which is current, back to vmcs01; what L2 may reach by VMCS shadowing becomes reachable again.
    pub fn leave(&self, on: MachineParts<'_>, slot: &mut Slot) {
        by!(self, strategy => strategy.leave(on, slot, &self.common));
    }

    /// An exit of L3 goes to L2: from vmcs02, which is current, to vmcs01, which gets L2's state. `report` replaces what the
    /// processor said.
    #[inline(always)]
    pub fn exit(&self, on: MachineParts<'_>, slot: &mut Slot, report: Option<Report>, to: impl HostState) {
        by!(self, strategy => strategy.exit(on, slot, &self.common, report, to));
    }

    /// vmcs02, which is not current, takes the form in which vmcs01 and other vmcs02s may link to it.
    pub fn rest(&self, on: MachineParts<'_>, slot: &mut Slot) {
        slot.vmcs02.rest(on.vmx, on.phys, self.common.revision);
    }
}
