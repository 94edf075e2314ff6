//! Memory: what the machine has, what nvmx keeps for itself, and L2's memory by [`Gpa`](crate::addr::Gpa).
//!
//! * [`map`] is the machine's memory map and what L2 gets to see of it, [`mtrr`] the memory types behind it.
//! * [`frames`] hands out nvmx's own frames, [`paging`] builds nvmx's own page tables from them.
//! * [`phys`] is the interface to physical memory; the real one is `hw::phys`, tests use a vector.
//! * [`Place`] is the right to write there: only who owns the memory makes one.
//! * [`guest`] is the one place where a guest-physical address becomes a host-physical one (invariant I5).

pub mod frames;
pub mod guest;
pub mod linear;
pub mod map;
pub mod mtrr;
pub mod paging;
pub mod phys;
mod place;
pub mod plain_read;

pub use frames::{Frame, FramePool, FrameRun};
pub use guest::{GuestMemory, NotOwned};
pub use map::{MemoryMap, Span};
pub use phys::PhysMem;
pub use place::Place;
