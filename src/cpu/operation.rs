//! Where L2 stands with VMX, and its active vmcs12s.

use crate::addr::Gpa;
use crate::hw::vmx::Region;
use crate::mm::FramePool;
use crate::rules::explain::Refusals;
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::{SlotId, Slots};
use crate::vmcs::vpid::VpidMap;

/// Where L2 stands with VMX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Outside VMX operation.
    Off,
    /// VMX root operation: L2 runs.
    Root {
        /// The slot of the current vmcs12.
        current: Option<SlotId>,
    },
    /// VMX non-root operation: L3 runs on the vmcs02 of this slot.
    NonRoot {
        /// The slot of the current vmcs12.
        current: SlotId,
    },
}

/// The virtual VMX of one CPU.
pub struct Nested {
    /// Where L2 stands.
    pub operation: Operation,
    /// Operand of the last VMXON.
    pub vmxon_operand: Gpa,
    /// Active vmcs12s.
    pub slots: Slots,
    /// vpid12 to vpid02.
    pub vpids: VpidMap,
    /// Interruptibility state of L2 at its last VMLAUNCH or VMRESUME.
    pub blocking01: u64,
    /// What was refused last, for L2 to read.
    pub refusals: Refusals,
    /// Counts uses, for their order.
    pub uses: u64,
}

impl Operation {
    /// L2 runs, and the vmcs12 in this slot is current.
    pub fn is_root_with(self, id: SlotId) -> bool {
        matches!(self, Operation::Root { current: Some(current), .. } if current == id)
    }
}

impl Nested {
    /// Outside VMX operation, with these free slots.
    pub fn new(slots: Slots) -> Self {
        Nested {
            operation: Operation::Off,
            vmxon_operand: Gpa::new(0),
            slots,
            vpids: VpidMap::new(),
            blocking01: 0,
            refusals: Refusals::default(),
            uses: 0,
        }
    }

    /// L2 leaves VMX operation: no vmcs12 is active or current, and the slots beyond the first ones go back to the pool. `clear`
    /// executes VMCLEAR. The active vmcs12s were stored before.
    pub fn leave(&mut self, frames: &mut FramePool, clear: impl FnMut(Region)) {
        self.operation = Operation::Off;
        self.slots.iter_mut().for_each(Slot::release);
        self.slots.shrink(frames, clear);
    }

    /// Operand of VMXON while in VMX operation.
    pub fn vmxon_ptr(&self) -> Option<Gpa> {
        (self.operation != Operation::Off).then_some(self.vmxon_operand)
    }

    /// The slot of the current vmcs12.
    pub fn current(&self) -> Option<SlotId> {
        match self.operation {
            Operation::Off => None,
            Operation::Root { current, .. } => current,
            Operation::NonRoot { current, .. } => Some(current),
        }
    }

    /// Notes that a slot is in use.
    pub fn touch(&mut self, id: SlotId) {
        self.uses += 1;
        self.slots[id].used = self.uses;
    }

    /// The slot for the vmcs12 at `vmptr`, active or not, if there is one.
    pub fn find(&self, vmptr: Gpa) -> Option<SlotId> {
        self.slots.find(|slot| slot.vmptr == Some(vmptr))
    }
}
