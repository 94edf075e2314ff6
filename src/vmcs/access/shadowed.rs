//! Zero-copy: vmcs02 is the shadow VMCS to which vmcs01 links while L2 runs, so that L2's accesses reach it without an exit.

use super::links::Links;
use super::strategy::{
    Description, ExitTakes, HostState, Known, MachineParts, Reached, Report, Strategy, VmxOperation, on_vmcs02,
};
use crate::addr::Hpa;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Region, Vmx};
use crate::vmcs::lending::Lending;
use crate::vmcs::slot::Slot;
use crate::vmcs::stale::Stale;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::lent::{LentValues, Loan};
use crate::vmx::{Capabilities, Field};
use l2_protocol::abi;

pub(super) struct Shadowed {
    links: Links,
}

impl Shadowed {
    pub(super) fn new(links: Links) -> Self {
        Self { links }
    }

    /// From vmcs02, which is current, to vmcs01: L2 has what it is lent.
    #[inline(always)]
    fn become_shadow(&mut self, vmx: &mut Vmx, phys: &DirectMap, vmcs01: &Region, slot: &mut Slot, common: &Known) {
        match slot.loan.loan {
            Loan::Nothing => slot.vmcs02.become_shadow(vmx, phys, common.revision, LentValues::Nothing, vmcs01),
            _ => self.become_lent(vmx, phys, vmcs01, slot, common),
        }
    }

    #[inline(never)]
    fn become_lent(&mut self, vmx: &mut Vmx, phys: &DirectMap, vmcs01: &Region, slot: &mut Slot, common: &Known) {
        let ends = slot.loan.is_forgotten() && self.links.lead_to(slot);
        if ends {
            slot.loan = Lending::NOTHING;
        }
        let lend = slot.lend();
        slot.vmcs02.become_shadow(vmx, phys, common.revision, lend, vmcs01);
        if ends {
            self.links.link(vmx, Some((slot, slot.loan.loan)));
        }
    }
}

/// What L2 was lent in vmcs02, which is current, is in the copy again.
fn end_loan(vmx: &mut Vmx, slot: &mut Slot, common: &Known) {
    let values = slot.vmcs02.end_loan(vmx);
    // A rule that is broken is noted in the slot, and judged by the next entry.
    let _ = slot.has_back(values, &common.offered);
}

impl Strategy for Shadowed {
    fn description(&self) -> Description {
        Description { strategy: abi::Strategy::ZeroCopy, vmcs: Reached::ByInstructions }
    }

    fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        self.links.link(vmx, slot.map(|slot| (slot, slot.loan.loan)));
    }

    fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        self.links.confine(vmx, operation, others);
    }

    fn nested_bitmaps(&self, slot: &Slot) -> Option<(Hpa, Hpa)> {
        let [read, write] = &slot.shadow_bitmaps;
        Some((read.hpa(), write.hpa()))
    }

    fn write_lent(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        current: Region,
        common: &Known,
        write: impl FnOnce(&mut Slot, &Capabilities) -> Loan,
    ) {
        let vmcs02 = slot.vmcs02.region();
        if slot.loan.loan != Loan::Nothing {
            on_vmcs02(on.vmx, vmcs02, current, |vmx| end_loan(vmx, slot, common));
        }
        let loan = write(slot, &common.offered);
        if loan == Loan::Nothing || !slot.vmcs02.is_shadow() {
            return;
        }
        let changes = slot.loan.loan != loan;
        slot.loan.is(loan);
        let lend = slot.lend();
        on_vmcs02(on.vmx, vmcs02, current, |vmx| slot.vmcs02.lend(vmx, on.phys, lend));
        if changes {
            self.links.link(on.vmx, Some((slot, loan)));
        }
    }

    fn look_at_lent(&self, on: MachineParts<'_>, slot: &mut Slot, _: &Known) {
        if slot.loan.loan == Loan::Nothing || !slot.stale.contains(Stale::HOST) {
            return;
        }
        on_vmcs02(on.vmx, slot.vmcs02.region(), *on.vmcs01, |vmx| {
            slot.loan.loan.fields().iter().for_each(|field| slot.vmcs12.set(*field, vmx.read(*field)));
        });
    }

    fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64 {
        // A shadow VMCS changes without an exit, so that its values are never kept.
        on_vmcs02(on.vmx, slot.vmcs02.region(), current, |vmx| vmx.read(field))
    }

    fn write(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field, value: u64) {
        on_vmcs02(on.vmx, slot.vmcs02.region(), current, |vmx| vmx.write(field, value & field.mask()));
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
        end_loan(on.vmx, slot, common);
        slot.loan = Lending::NOTHING;
        slot.vmcs12.fetch_missing(&mut on.vmx.batch(), &common.exists);
        slot.vmcs12.valid = FieldSet::CACHED;
        on.vmx.ptrld(*on.vmcs01);
    }

    fn looked_at(&self, slot: &mut Slot) {
        slot.vmcs12.valid = FieldSet::CACHED;
    }

    fn exit_takes(&self) -> ExitTakes {
        ExitTakes::Leaving
    }

    #[inline(always)]
    fn leave(&mut self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        self.become_shadow(on.vmx, on.phys, on.vmcs01, slot, common);
    }

    #[inline(always)]
    fn exit(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        common: &Known,
        report: Option<Report>,
        mut state: impl HostState,
    ) {
        state.take(on.vmx, slot);
        if let Some(report) = report {
            report.fields(|field, value| on.vmx.write(field, value));
        }
        self.become_shadow(on.vmx, on.phys, on.vmcs01, slot, common);
        state.load(&mut on.vmx.batch(), slot);
        state.load_tracked(on.vmx, slot);
    }
}
