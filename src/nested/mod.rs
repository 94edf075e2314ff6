//! Virtual VMX: what L2 gets when it executes VMX instructions.
//!
//! The state machine is [`Operation`]. Each active vmcs12 has a [`slot::Slot`] with nvmx's copy of it and a vmcs02 of its own, so
//! that switching between vmcs12s costs no copy; a slot is the counterpart of what a processor keeps of an active VMCS.
//! Source: Intel SDM vol. 3C, "Virtual-Machine Control Structures" and "VMX Instruction Reference" (December 2024).

pub mod caps;
pub mod checks;
pub mod completion;
pub mod entry;
pub mod events;
pub mod explain;
pub mod inherit;
pub mod instr;
pub mod l3_exit;
pub mod l3_memory;
pub mod merge;
pub mod msr_lists;
pub mod reflect;
pub mod refused;
pub mod route;
pub mod shadow;
pub mod slot;
pub mod slots;
pub mod stale;
pub mod tell;
pub mod timer;
pub mod ve;
pub mod virtual_apic;
pub mod vmcs12;
pub mod vmfunc;
pub mod vpid;

pub use state::{Nested, Operation};

mod state {
    use super::explain::Refusals;
    use super::slots::Slots;
    use super::vpid::VpidMap;
    use crate::addr::Gpa;

    /// Where L2 stands with VMX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum Operation {
        /// Outside VMX operation.
        Off,
        /// VMX root operation: L2 runs.
        Root {
            /// Operand of VMXON.
            vmxon_ptr: Gpa,
            /// The slot of the current vmcs12.
            current: Option<usize>,
        },
        /// VMX non-root operation: L3 runs on the vmcs02 of this slot.
        NonRoot {
            /// Operand of VMXON.
            vmxon_ptr: Gpa,
            /// The slot of the current vmcs12.
            current: usize,
        },
    }

    /// The virtual VMX of one CPU.
    pub struct Nested {
        /// Where L2 stands.
        pub operation: Operation,
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

    impl Nested {
        /// Outside VMX operation, with these free slots.
        pub fn new(slots: Slots) -> Self {
            Nested {
                operation: Operation::Off,
                slots,
                vpids: VpidMap::new(),
                blocking01: 0,
                refusals: Refusals::default(),
                uses: 0,
            }
        }

        /// Operand of VMXON while in VMX operation.
        pub fn vmxon_ptr(&self) -> Option<Gpa> {
            match self.operation {
                Operation::Off => None,
                Operation::Root { vmxon_ptr, .. } | Operation::NonRoot { vmxon_ptr, .. } => Some(vmxon_ptr),
            }
        }

        /// Index of the slot of the current vmcs12.
        pub fn current(&self) -> Option<usize> {
            match self.operation {
                Operation::Off => None,
                Operation::Root { current, .. } => current,
                Operation::NonRoot { current, .. } => Some(current),
            }
        }

        /// Notes that a slot is in use.
        pub fn touch(&mut self, index: usize) {
            self.uses += 1;
            if let Some(slot) = self.slots.get_mut(index) {
                slot.used = self.uses;
            }
        }

        /// The slot for the vmcs12 at `vmptr`, active or not, if there is one.
        pub fn find(&self, vmptr: Gpa) -> Option<usize> {
            self.slots.find(|slot| slot.vmptr == Some(vmptr))
        }
    }
}
