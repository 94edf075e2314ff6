//! What vmcs01 has for L2's own accesses: the VMCS to which it links, and the VMREAD and VMWRITE bitmaps.

use super::strategy::VmxOperation;
use crate::addr::Hpa;
use crate::hw::vmx::Vmx;
use crate::vmcs::kept::Kept;
use crate::vmcs::slot::Slot;
use crate::vmx::Field;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::region::NO_LINK;

/// VMREAD and VMWRITE bitmap.
pub type Bitmaps = [Hpa; 2];

/// The link and the bitmaps of vmcs01.
pub struct Links {
    closed: Bitmaps,
    lent: Bitmaps,
    /// Those that vmcs01 has.
    fields: [Kept; 2],
}

impl Links {
    /// `lent` opens HOST_RSP as well ([ADR 0021](../../../docs/adr/0021-host-rsp-is-lent.md)).
    pub fn new(closed: Bitmaps, lent: Bitmaps) -> Self {
        Self { closed, lent, fields: [Field::VMREAD_BITMAP, Field::VMWRITE_BITMAP].map(Kept::new) }
    }

    /// vmcs01, which is current, links to the vmcs02 of a slot, or to none.
    pub(super) fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        vmx.write(Field::VMCS_LINK_POINTER, slot.map_or(NO_LINK, |slot| slot.vmcs02.region().at().get()));
        self.open(vmx, if slot.is_some_and(|slot| slot.lends) { self.lent } else { self.closed });
    }

    /// L2 reaches HOST_RSP of the linked vmcs02 from now on; vmcs01 is current.
    pub(super) fn open_lent(&mut self, vmx: &mut Vmx) {
        self.open(vmx, self.lent);
    }

    /// L2 reaches them only in VMX operation; vmcs01 is current.
    pub(super) fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        let shadowing = match operation {
            VmxOperation::On => SecondaryControls::VMCS_SHADOWING,
            VmxOperation::Off => SecondaryControls::empty(),
        };
        vmx.write(Field::SECONDARY_VM_EXEC_CONTROL, (others | shadowing).bits().into());
    }

    fn open(&mut self, vmx: &mut Vmx, bitmaps: Bitmaps) {
        for (field, bitmap) in self.fields.iter_mut().zip(bitmaps) {
            field.put(vmx, bitmap.get());
        }
    }
}
