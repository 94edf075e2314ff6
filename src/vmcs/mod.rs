//! VMCSs as state: slots with nvmx's copies of vmcs12s, vmcs01, what is switched with them, and VMCSs in memory.

pub mod access;
mod config;
pub mod image;
pub mod inherit;
pub mod kept;
pub mod lending;
pub mod msr_bitmap;
pub mod msr_lists;
pub mod msrs;
pub mod mtrrs;
pub mod once;
pub mod probe;
pub mod slot;
pub mod slots;
pub mod stale;
pub mod timer;
pub mod tracked;
pub mod vmcs01;
pub mod vmcs02;
pub mod vmcs12;
pub mod vpid;

pub use config::Config;
