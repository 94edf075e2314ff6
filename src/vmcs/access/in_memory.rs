//! Under a hypervisor that keeps VMCSs in memory: those that are not current are edited there, with VMCS shadowing for L2 or
//! without ([ADR 0008](../../../docs/adr/0008-vmcs-in-memory.md)).

use super::links::Links;
use super::strategy::{
    Description, HostState, InfoFrom, Known, MachineParts, NestedState, Reached, Report, Strategy, VmxOperation,
};
use crate::hw::host_area::Places;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Region, Vmx};
use crate::vmcs::image::{ImageLayout, VmcsImage};
use crate::vmcs::lending::RuleBroken;
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::lent::{Loan, Returned};
use crate::vmx::{Capabilities, Field, FieldAccess};
use l2_protocol::abi;

pub(super) struct InMemory {
    layout: ImageLayout,
    /// Where the fields lie that L2 is lent.
    lent: Places,
    /// With VMCS shadowing for L2: each vmcs12 is lent [`Loan::All`] whenever it may be. An exit of L2 costs so much here, and a loan so
    /// little.
    links: Option<Links>,
}

impl InMemory {
    pub(super) fn new(layout: ImageLayout, links: Option<Links>) -> Self {
        Self { lent: layout.lent(), layout, links }
    }

    /// A VMCS that is not current.
    fn image<'a>(&'a self, phys: &'a DirectMap, region: Region) -> VmcsImage<'a> {
        VmcsImage { layout: &self.layout, phys, region }
    }

    /// vmcs02 becomes a shadow VMCS: L2 has what it is lent in it, and the copy has it no more.
    #[inline(always)]
    fn become_shadow(&self, phys: &DirectMap, slot: &mut Slot, common: &Known) {
        if self.links.is_some() {
            let values = slot.lend_all();
            slot.vmcs02.become_shadow_in_memory(phys, common.revision, self.lent, values);
        }
    }

    /// vmcs02 is an ordinary VMCS, and what L2 was lent is in the copy again.
    fn end_loan(&self, on: &MachineParts<'_>, slot: &mut Slot, common: &Known) -> Result<(), RuleBroken> {
        let values = slot.vmcs02.take_back_in_memory(on.vmx, on.phys, common.revision);
        slot.has_back(values, &common.offered)
    }
}

impl Strategy for InMemory {
    fn description(&self) -> Description {
        let strategy = if self.links.is_some() { abi::Strategy::ZeroCopy } else { abi::Strategy::Trapped };
        Description { strategy, vmcs: Reached::InMemory }
    }

    fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        if let Some(links) = &mut self.links {
            links.link(vmx, slot.map(|slot| (slot, Loan::All)));
        }
    }

    fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        if let Some(links) = &self.links {
            links.confine(vmx, operation, others);
        }
    }

    fn info_from(&self) -> InfoFrom {
        InfoFrom::Code
    }

    fn write_lent(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        _: Region,
        common: &Known,
        write: impl FnOnce(&mut Slot, &Capabilities) -> Loan,
    ) {
        let was_shadow = slot.vmcs02.is_shadow();
        // A rule that is broken is noted in the slot, and judged by the next entry.
        let _ = self.end_loan(&on, slot, common);
        write(slot, &common.offered);
        if was_shadow {
            self.become_shadow(on.phys, slot, common);
        }
    }

    fn look_at_lent(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        let values = slot.vmcs02.lent_in_memory(on.phys);
        let _ = slot.has_back(values, &common.offered);
        if values != Returned::Nothing {
            slot.lend_all();
        }
    }

    fn read(&self, on: MachineParts<'_>, slot: &mut Slot, _: Region, field: Field) -> u64 {
        self.layout.read(on.phys, slot.vmcs02.region(), field)
    }

    fn write(&self, on: MachineParts<'_>, slot: &mut Slot, _: Region, field: Field, value: u64) {
        // What nvmx reported in place of the processor, if it did, is overwritten.
        slot.vmcs12.valid.remove(field);
        self.layout.write(on.phys, slot.vmcs02.region(), field, value);
    }

    fn load(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        // The slot's vmcs12 before this one was lent what is no one's now.
        slot.vmcs02.take_back_in_memory(on.vmx, on.phys, common.revision);
        for field in slot.vmcs12.dirty.iter() {
            self.layout.write(on.phys, slot.vmcs02.region(), field, slot.vmcs12.get(field));
        }
        slot.vmcs12.dirty = FieldSet::EMPTY;
        slot.vmcs12.valid = FieldSet::CACHED;
        self.become_shadow(on.phys, slot, common);
    }

    fn store(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        let _ = self.end_loan(&on, slot, common);
        let (missing, vmcs02) = (common.exists.without(&slot.vmcs12.valid), slot.vmcs02.region());
        slot.vmcs12.fetch(missing, |field| self.layout.read(on.phys, vmcs02, field));
        slot.vmcs12.valid = FieldSet::CACHED;
        self.become_shadow(on.phys, slot, common);
    }

    fn looked_at(&self, slot: &mut Slot) {
        slot.vmcs12.valid = FieldSet::CACHED;
    }

    #[inline(never)]
    fn enter(
        &self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        mut state: impl NestedState,
    ) -> Result<(), RuleBroken> {
        let result = self.end_loan(&on, slot, common);
        if result.is_ok() {
            state.bring(&mut self.image(on.phys, slot.vmcs02.region()), slot);
        }
        slot.vmcs02.load(on.vmx, on.phys, common.revision);
        result
    }

    fn leave(&mut self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        on.vmx.ptrld(*on.vmcs01);
        self.become_shadow(on.phys, slot, common);
    }

    #[inline(never)]
    fn exit(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        report: Option<Report>,
        mut state: impl HostState,
    ) {
        if self.links.is_none() {
            slot.vmcs12.valid = FieldSet::CACHED;
            if let Some(report) = report {
                report.fields(|field, value| slot.vmcs12.fetched(field, value));
            }
        }
        state.load(&mut self.image(on.phys, *on.vmcs01), slot);
        on.vmx.ptrld(*on.vmcs01);
        let mut vmcs02 = self.image(on.phys, slot.vmcs02.region());
        state.take(&mut vmcs02, slot);
        state.load_tracked(on.vmx, slot);
        if self.links.is_some() {
            if let Some(report) = report {
                report.fields(|field, value| vmcs02.write(field, value));
            }
            self.become_shadow(on.phys, slot, common);
        }
    }
}
