//! What vmcs01 has for L2's own accesses: the VMCS to which it links, and the VMREAD and VMWRITE bitmaps.

use super::strategy::VmxOperation;
use crate::addr::Hpa;
use crate::hw::vmx::Vmx;
use crate::vmcs::kept::Kept;
use crate::vmcs::slot::Slot;
use crate::vmx::Field;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::lent::Loan;
use crate::vmx::region::NO_LINK;

/// VMREAD and VMWRITE bitmap.
pub type Bitmaps = [Hpa; 2];

/// The link and the bitmaps of vmcs01.
pub struct Links {
    /// By the loan that they open besides the rest.
    bitmaps: [Bitmaps; 3],
    /// The link pointer that vmcs01 has, and the bitmaps.
    pointer: Kept,
    fields: [Kept; 2],
}

impl Links {
    /// The bitmaps that open a loan ([`bitmap::open_lent`](crate::vmx::bitmap::open_lent)), as `of` says.
    pub fn new(mut of: impl FnMut(Loan) -> Option<Bitmaps>) -> Option<Self> {
        Some(Self {
            bitmaps: [of(Loan::Nothing)?, of(Loan::Stack)?, of(Loan::Thread)?],
            pointer: Kept::new(Field::VMCS_LINK_POINTER),
            fields: [Field::VMREAD_BITMAP, Field::VMWRITE_BITMAP].map(Kept::new),
        })
    }

    /// vmcs01, which is current, links to the vmcs02 of a slot, or to none, and L2 reaches in it what it is lent.
    pub(super) fn link(&mut self, vmx: &mut Vmx, slot: Option<&Slot>) {
        self.pointer.put(vmx, pointer_to(slot));
        let [closed, stack, thread] = &self.bitmaps;
        let bitmaps = match slot.map_or(Loan::Nothing, |slot| slot.loan.loan) {
            Loan::Nothing => closed,
            Loan::Stack => stack,
            Loan::Thread => thread,
        };
        for (field, bitmap) in self.fields.iter_mut().zip(bitmaps) {
            field.put(vmx, bitmap.get());
        }
    }

    /// vmcs01 links to the vmcs02 of this slot.
    pub(super) fn lead_to(&self, slot: &Slot) -> bool {
        self.pointer.holds(pointer_to(Some(slot)))
    }

    /// L2 reaches them only in VMX operation; vmcs01 is current.
    pub(super) fn confine(&self, vmx: &mut Vmx, operation: VmxOperation, others: SecondaryControls) {
        let shadowing = match operation {
            VmxOperation::On => SecondaryControls::VMCS_SHADOWING,
            VmxOperation::Off => SecondaryControls::empty(),
        };
        vmx.write(Field::SECONDARY_VM_EXEC_CONTROL, (others | shadowing).bits().into());
    }
}

fn pointer_to(slot: Option<&Slot>) -> u64 {
    slot.map_or(NO_LINK, |slot| slot.vmcs02.region().at().get())
}
