//! What vmcs01 has for L2's own accesses: the VMCS to which it links, and the VMREAD and VMWRITE bitmaps.

use super::strategy::VmxOperation;
use crate::addr::Hpa;
use crate::hw::vmx::Vmx;
use crate::vmcs::image::ImageLayout;
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
    /// By the loan that they open besides the rest; none for one that is never made.
    bitmaps: [Option<Bitmaps>; 4],
    /// The link pointer that vmcs01 has.
    pointer: Kept,
    /// What its bitmaps open; none are in it before the first link.
    open: Option<Loan>,
}

impl Links {
    /// The bitmaps that open a loan ([`bitmap::open_lent`](crate::vmx::bitmap::open_lent)), as `of` says: of each that is made, which
    /// is always the same one where VMCSs are in memory with this layout.
    pub fn new(layout: Option<&ImageLayout>, mut of: impl FnMut(Loan) -> Option<Bitmaps>) -> Option<Self> {
        let loans: &[Loan] = match layout {
            None => &[Loan::Nothing, Loan::Stack, Loan::Thread],
            Some(_) => &[Loan::All],
        };
        let mut bitmaps = [None; 4];
        for loan in loans {
            bitmaps[*loan as usize] = Some(of(*loan)?);
        }
        Some(Self { bitmaps, pointer: Kept::new(Field::VMCS_LINK_POINTER), open: None })
    }

    /// vmcs01, which is current, links to the vmcs02 of a slot, in which L2 reaches this loan, or to none. Most vmcs12s of an L2 are
    /// lent the same, so the bitmaps mostly stay; without a link nothing is reached, and they stay too.
    #[inline(always)]
    pub(super) fn link(&mut self, vmx: &mut Vmx, to: Option<(&Slot, Loan)>) {
        self.pointer.put(vmx, pointer_to(to.map(|(slot, _)| slot)));
        let loan = to.map(|(_, loan)| loan).or(self.open).unwrap_or(Loan::Nothing);
        if self.open != Some(loan) {
            self.open(vmx, loan);
        }
    }

    #[cold]
    fn open(&mut self, vmx: &mut Vmx, loan: Loan) {
        self.open = Some(loan);
        let Some([read, write]) = self.bitmaps[loan as usize] else { return };
        vmx.write(Field::VMREAD_BITMAP, read.get());
        vmx.write(Field::VMWRITE_BITMAP, write.get());
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
