//! What L2 asked for.

use crate::addr::Gpa;
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::route::GuestWants;
use crate::vmcs::slot::Slot;
use crate::vmx::Field;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::controls::{PinControls, PrimaryControls, SecondaryControls};

/// What L2 asked for, from nvmx's copy of vmcs12 and L2's MSR bitmap.
pub struct Wants<'a, P> {
    /// The slot of vmcs12.
    pub slot: &'a Slot,
    /// L2's memory.
    pub guest: &'a GuestMemory<P>,
}

impl<P: PhysMem> Wants<'_, P> {
    /// A bit of the page that this field points to; a page that L2 does not own reads as all ones.
    fn bit(&self, bitmap: Field, bit: u16) -> bool {
        let page = Gpa::new(self.slot.vmcs12.get(bitmap)).page();
        let word = self.guest.read_u64(Gpa::new(page.get() + bit as u64 / 64 * 8)).unwrap_or(u64::MAX);
        word >> (bit % 64) & 1 == 1
    }
}

impl<P: PhysMem> GuestWants for Wants<'_, P> {
    #[inline(always)]
    fn pin(&self) -> PinControls {
        PinControls::from_bits_retain(self.slot.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32)
    }

    #[inline(always)]
    fn primary(&self) -> PrimaryControls {
        PrimaryControls::from_bits_retain(self.slot.vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32)
    }

    #[inline(always)]
    fn secondary(&self) -> SecondaryControls {
        match self.primary().contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            true => SecondaryControls::from_bits_retain(self.slot.vmcs12.get(Field::SECONDARY_VM_EXEC_CONTROL) as u32),
            false => SecondaryControls::empty(),
        }
    }

    fn msr_bitmap(&self, index: u32, access: Access) -> bool {
        let Some(bit) = MsrBitmap::index(index, access) else { return true };
        self.bit(Field::MSR_BITMAP, bit)
    }

    fn shadow_bitmap(&self, bit: u16, access: Access) -> bool {
        let bitmap = match access {
            Access::Read => Field::VMREAD_BITMAP,
            Access::Write => Field::VMWRITE_BITMAP,
        };
        self.bit(bitmap, bit)
    }
}
