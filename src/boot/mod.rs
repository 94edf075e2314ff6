//! What stands before the first instruction of L2: the command line, what the loader and firmware say, what the processor must have.
//!
//! Everything here is pure: it reads tables through [`PhysMem`](crate::mm::PhysMem) and returns values. What touches the
//! machine is in `hw::boot`.

pub mod acpi;
pub mod extras;
pub mod guest_image;
pub mod identity;
pub mod info;
pub mod int15;
pub mod layout;
pub mod machine;
pub mod multiboot;
pub mod multiboot1;
pub mod multiboot2;
pub mod options;
pub mod pvh;
mod read;
pub mod requirements;
pub mod text;

pub use info::BootInfo;
pub use machine::CpuList;
pub use options::Options;
pub use requirements::FoundProcessor;
