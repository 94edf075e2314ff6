//! The guest's side of an instruction that nvmx completes or refuses for it: operands, memory, what is injected.
//!
//! The guest is that of the current VMCS: L2, or L3 where nvmx acts for L2's processor.

pub mod events;
pub mod initial;
pub mod inject;
pub mod machine_check;
pub mod missing;
pub mod nested_memory;
pub mod operand;
mod outcome;

pub use outcome::{Next, Stop};
