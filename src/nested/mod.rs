//! Virtual VMX: what L2 gets when it executes VMX instructions, and what becomes of exits of L3.
//!
//! The state machine is [`Operation`](crate::cpu::Operation). Each active vmcs12 has a [`Slot`](crate::vmcs::slot::Slot) with
//! nvmx's copy of it and a vmcs02 of its own, so that switching between vmcs12s costs no copy; a slot is the counterpart of
//! what a processor keeps of an active VMCS.
//! Source: Intel SDM vol. 3C, "Virtual-Machine Control Structures" and "VMX Instruction Reference" (December 2024).

pub mod active;
pub mod completion;
pub mod entry;
pub mod events;
pub mod fields;
pub mod fill;
pub mod instr;
pub mod judge;
pub mod nested_exit;
pub mod reflect;
pub mod result;
pub mod shadow;
pub mod sub_pages;
pub mod tell;
pub mod usual;
pub mod ve;
pub mod violation;
pub mod virtual_apic;
pub mod vmfunc;
pub mod wants;
