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
use crate::vmcs::lending::{Lending, RuleBroken};
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::lent::{self, LentValues, Loan};
use crate::vmx::{Capabilities, Field, FieldAccess};
use l2_protocol::abi;

pub(super) struct InMemory {
    layout: ImageLayout,
    /// With VMCS shadowing for L2.
    links: Option<Links>,
}

impl InMemory {
    pub(super) fn new(layout: ImageLayout, links: Option<Links>) -> Self {
        Self { layout, links }
    }

    /// A VMCS that is not current.
    fn image<'a>(&'a self, phys: &'a DirectMap, region: Region) -> VmcsImage<'a> {
        VmcsImage { layout: &self.layout, phys, region }
    }

    /// vmcs02 is to become a shadow VMCS: where the fields lie that L2 is lent, and their values.
    #[inline(always)]
    fn to_lend(&self, slot: &mut Slot) -> Option<(Places, [u64; lent::COUNT])> {
        match slot.lend() {
            LentValues::Thread(values) => Some((self.layout.lent()?, values)),
            _ => None,
        }
    }

    /// What L2 was lent in vmcs02 is in the copy again.
    fn end_loan(&self, vmx: &Vmx, phys: &DirectMap, slot: &mut Slot, common: &Known) {
        let values = slot.vmcs02.end_loan_in_memory(vmx, phys, common.revision);
        // A rule that is broken is noted in the slot, and judged by the next entry.
        let _ = slot.has_back(values, &common.offered);
    }

    #[inline(always)]
    fn become_shadow(&self, phys: &DirectMap, slot: &mut Slot, common: &Known) {
        if self.links.is_some() {
            let lend = self.to_lend(slot);
            slot.vmcs02.become_shadow_in_memory(phys, common.revision, lend);
        }
    }
}

impl Strategy for InMemory {
    fn description(&self) -> Description {
        let strategy = if self.links.is_some() { abi::Strategy::ZeroCopy } else { abi::Strategy::Trapped };
        Description { strategy, vmcs: Reached::InMemory }
    }

    fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        if let Some(links) = &mut self.links {
            links.link(vmx, slot);
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
        self.end_loan(on.vmx, on.phys, slot, common);
        let learned = write(slot, &common.offered);
        if self.links.is_none() || self.layout.lent().is_none() || learned == Loan::Nothing || !slot.vmcs02.is_shadow()
        {
            return;
        }
        // An exit of L2 costs so much here, and a loan so little, that there is only the one for all.
        let changes = slot.loan.loan != Loan::Thread;
        slot.loan.is(Loan::Thread);
        let lend = self.to_lend(slot);
        slot.vmcs02.lend_in_memory(on.phys, common.revision, lend);
        if let Some(links) = self.links.as_mut().filter(|_| changes) {
            links.link(on.vmx, Some(slot));
        }
    }

    fn look_at_lent(&self, on: MachineParts<'_>, slot: &mut Slot) {
        let vmcs02 = slot.vmcs02.region();
        slot.loan
            .loan
            .fields()
            .iter()
            .for_each(|field| slot.vmcs12.set(*field, self.layout.read(on.phys, vmcs02, *field)));
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
        for field in slot.vmcs12.dirty.iter() {
            self.layout.write(on.phys, slot.vmcs02.region(), field, slot.vmcs12.get(field));
        }
        slot.vmcs12.dirty = FieldSet::EMPTY;
        slot.vmcs12.valid = FieldSet::CACHED;
        self.become_shadow(on.phys, slot, common);
    }

    fn store(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        self.end_loan(on.vmx, on.phys, slot, common);
        slot.loan = Lending::NOTHING;
        let (missing, vmcs02) = (common.exists.without(&slot.vmcs12.valid), slot.vmcs02.region());
        slot.vmcs12.fetch(missing, |field| self.layout.read(on.phys, vmcs02, field));
    }

    fn stored(&self, slot: &mut Slot) {
        slot.vmcs12.valid = FieldSet::CACHED;
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
        let values = slot.vmcs02.take_back_in_memory(on.vmx, on.phys, common.revision);
        let result = slot.has_back(values, &common.offered);
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
