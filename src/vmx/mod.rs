//! Definitions of VMX without state.

mod access;
pub mod bitmap;
pub mod caps;
pub mod controls;
pub mod ept_entry;
pub mod error;
pub mod event;
pub mod exit;
pub mod field;
pub mod instr;
pub mod lent;
pub mod qualification;
pub mod region;
pub mod requirements;
pub mod segment;
pub mod state;

pub use access::FieldAccess;
pub use caps::Capabilities;
pub use controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls, TertiaryControls};
pub use error::{VmxError, VmxResult};
pub use exit::{BasicReason, ExitReason};
pub use field::{Field, Fields};
