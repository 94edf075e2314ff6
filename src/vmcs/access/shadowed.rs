//! Zero-copy: vmcs02 is the shadow VMCS to which vmcs01 links while L2 runs, so that L2's accesses reach it without an exit.

use super::links::Links;
use super::strategy::{
    Description, ExitTakes, HostState, Known, MachineParts, Reached, Report, Strategy, VmxOperation, on_vmcs02,
};
use crate::addr::Hpa;
use crate::hw::vmx::{Region, Vmx};
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::Field;
use crate::vmx::controls::SecondaryControls;
use l2_protocol::abi;

pub(super) struct Shadowed {
    links: Links,
}

impl Shadowed {
    pub(super) fn new(links: Links) -> Self {
        Self { links }
    }
}

impl Strategy for Shadowed {
    fn description(&self) -> Description {
        Description { strategy: abi::Strategy::ZeroCopy, vmcs: Reached::ByInstructions }
    }

    fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        self.links.link(vmx, slot);
    }

    fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        self.links.confine(vmx, operation, others);
    }

    fn nested_bitmaps(&self, slot: &Slot) -> Option<(Hpa, Hpa)> {
        let [read, write] = &slot.shadow_bitmaps;
        Some((read.hpa(), write.hpa()))
    }

    fn lend(&mut self, vmx: &mut Vmx, slot: &mut Slot) {
        if !slot.lends {
            slot.lends = true;
            self.links.open_lent(vmx);
        }
    }

    fn write_host_rsp(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, _: &Known) {
        if let Some(value) = slot.host_rsp_to_lend() {
            on.vmx.ptrld(slot.vmcs02.region());
            slot.vmcs02.lend(on.vmx, on.phys, value);
            on.vmx.ptrld(current);
        }
    }

    fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64 {
        // A shadow VMCS changes without an exit, so that its values are never kept.
        on_vmcs02(on.vmx, slot, current, |vmx| vmx.read(field))
    }

    fn write(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field, value: u64) {
        on_vmcs02(on.vmx, slot, current, |vmx| vmx.write(field, value & field.mask()));
    }

    fn load(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        slot.vmcs02.rest(on.vmx, on.phys, common.revision);
        on.vmx.ptrld(slot.vmcs02.region());
        slot.vmcs12.write_dirty(on.vmx, |field| common.exists.contains(field));
        slot.vmcs12.valid = FieldSet::CACHED;
        on.vmx.ptrld(*on.vmcs01);
    }

    fn store(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        on.vmx.ptrld(slot.vmcs02.region());
        slot.vmcs12.fetch_missing(on.vmx, &common.exists);
        on.vmx.ptrld(*on.vmcs01);
    }

    fn stored(&self, slot: &mut Slot) {
        slot.vmcs12.valid = FieldSet::CACHED;
        slot.lends = false;
    }

    fn looked_at(&self, slot: &mut Slot) {
        slot.vmcs12.valid = FieldSet::CACHED;
    }

    fn exit_takes(&self) -> ExitTakes {
        ExitTakes::Leaving
    }

    #[inline(always)]
    fn leave(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        let host_rsp = slot.host_rsp_to_lend();
        slot.vmcs02.become_shadow(on.vmx, on.phys, common.revision, host_rsp, on.vmcs01);
    }

    #[inline(always)]
    fn exit(
        &self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        report: Option<Report>,
        mut to: impl HostState,
    ) {
        if let Some(report) = report {
            report.fields(|field, value| on.vmx.write(field, value));
        }
        let host_rsp = slot.host_rsp_to_lend();
        slot.vmcs02.become_shadow(on.vmx, on.phys, common.revision, host_rsp, on.vmcs01);
        to.load(&mut on.vmx.batch(), slot);
    }
}
