//! What VMX does by its rules: pure functions and tables, tested on the host against a second statement of each.
//!
//! [`checks`] are the rules of VM entry, [`merge`] makes vmcs02's controls, [`route`] says whose an exit is, [`caps`] what L2
//! is offered and [`refused`] what not, and why; [`msr_policy`] and [`hidden`] say the same of MSRs and CPUID; [`switched`] what VM
//! entries and exits switch, and what of it nvmx leaves in the processor; [`explain`] puts a refusal into words.

pub mod caps;
pub mod checks;
pub mod explain;
pub mod hidden;
pub mod merge;
pub mod msr_policy;
pub mod refused;
pub mod route;
pub mod switched;
