//! Each access of L2 exits: the copy answers what it has, and keeps what L2 writes until the next entry.

use super::strategy::{Description, HostState, Known, MachineParts, Reached, Report, Strategy, on_vmcs02};
use crate::hw::vmx::{Region, Vmx};
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::Field;
use l2_protocol::abi;

pub(super) struct Trapped;

/// Fields that L2 reads after nearly every exit: fetched at once.
const HOT: [Field; 12] = [
    Field::VM_EXIT_REASON,
    Field::EXIT_QUALIFICATION,
    Field::VM_EXIT_INSTRUCTION_LEN,
    Field::VM_EXIT_INTR_INFO,
    Field::IDT_VECTORING_INFO_FIELD,
    Field::GUEST_RIP,
    Field::GUEST_RSP,
    Field::GUEST_RFLAGS,
    Field::GUEST_CR0,
    Field::GUEST_CR3,
    Field::GUEST_CR4,
    Field::GUEST_INTERRUPTIBILITY_INFO,
];

impl Strategy for Trapped {
    fn description(&self) -> Description {
        Description { strategy: abi::Strategy::Trapped, vmcs: Reached::ByInstructions }
    }

    fn read(&self, on: MachineParts<'_>, slot: &mut Slot, current: Region, field: Field) -> u64 {
        let value = on_vmcs02(on.vmx, slot.vmcs02.region(), current, |vmx| vmx.read(field));
        slot.vmcs12.fetched(field, value);
        value
    }

    fn write(&self, _: MachineParts<'_>, slot: &mut Slot, _: Region, field: Field, value: u64) {
        slot.vmcs12.written(field, value);
    }

    fn load(&self, _: MachineParts<'_>, _: &mut Slot, _: &Known) {}

    fn store(&self, on: MachineParts<'_>, slot: &mut Slot, common: &Known) {
        on.vmx.ptrld(slot.vmcs02.region());
        slot.vmcs12.fetch_missing(&mut on.vmx.batch(), &common.exists);
        on.vmx.ptrld(*on.vmcs01);
    }

    fn write_dirty(&self, vmx: &mut Vmx, slot: &mut Slot, common: &Known) {
        // Exit information stays in the copy: not every processor can VMWRITE it.
        slot.vmcs12.write_dirty(vmx, |field| common.exists.contains(field) && !field.is_read_only());
    }

    fn looked_at(&self, _: &mut Slot) {}

    fn leave(&mut self, on: MachineParts<'_>, _: &mut Slot, _: &Known) {
        on.vmx.ptrld(*on.vmcs01);
    }

    #[inline(never)]
    fn exit(
        &mut self,
        on: MachineParts<'_>,
        slot: &mut Slot,
        _: &Known,
        report: Option<Report>,
        mut state: impl HostState,
    ) {
        state.take(on.vmx, slot);
        slot.vmcs12.valid = FieldSet::CACHED;
        for field in HOT {
            let value = on.vmx.read(field);
            slot.vmcs12.fetched(field, value);
        }
        if let Some(report) = report {
            report.fields(|field, value| slot.vmcs12.fetched(field, value));
        }
        on.vmx.ptrld(*on.vmcs01);
        state.load(&mut on.vmx.batch(), slot);
        state.load_tracked(on.vmx, slot);
    }
}
