//! Definitions of VMX without state.

pub mod bitmap;
pub mod caps;
pub mod controls;
pub mod debug;
pub mod event;
pub mod exit;
pub mod field;
pub mod image;
pub mod instr;
pub mod qualification;
pub mod requirements;
pub mod segment;

pub use caps::Capabilities;
pub use controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};
pub use exit::{BasicReason, ExitReason};
pub use field::{Field, Fields};
