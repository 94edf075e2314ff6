//! One virtual CPU as data: the registers, the VMCSs and tables that run L2 and L3, where L2 stands with VMX, which events
//! wait; and the little that it knows of the others.

mod events;
mod operation;
pub mod others;
mod state;

pub use events::{Events, INJECTION, Startup, Waiting};
pub use operation::{Nested, Operation};
pub use state::{Cpu, Trace};
