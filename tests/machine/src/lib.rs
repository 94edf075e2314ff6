//! A VMX machine as a model, on which nvmx runs from its run loop down, and on which the same guests run without it.
//!
//! * [`processor`] is a processor with VMX: VMCSs, entries, exits, memory behind EPT. Entries are judged by the second
//!   implementation of the checks ([`second`]).
//! * [`guest`] is what a guest does, an instruction each: an async function, so that it can stand still while nvmx handles an
//!   exit and go on behind it.
//! * [`world`] runs one guest program on the bare machine, and under nvmx by every strategy; what it saw must be the same.

#![allow(missing_docs, reason = "public for tests only")]

#[path = "../../checks_model/main.rs"]
#[allow(dead_code, unused_imports, reason = "without its tests")]
pub mod second;

pub mod exits;
pub mod guest;
pub mod memory;
pub mod processor;
pub mod sequences;
pub mod world;

pub use guest::Guest;
pub use processor::{Core, Exit, Level, Storage};
pub use world::{Setup, World};
