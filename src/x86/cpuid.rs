//! CPUID: bits of answers that nvmx makes.
//!
//! Source: Intel SDM vol. 2A, "CPUID", table "Information Returned by CPUID Instruction". What nvmx itself asks of the processor is
//! decoded by the crate `raw-cpuid`. It only decodes: it has no names for the bits of an answer that is changed, or handed on whole, so
//! that those are here, and in `rules::hidden`.

/// Leaf 1, ECX: VMX
pub const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: CR4.OSXSAVE is 1.
pub const OSXSAVE: u32 = 1 << 27;
/// Leaf 1, ECX: for hypervisors to say that they are there.
pub const HYPERVISOR: u32 = 1 << 31;
/// Leaf 7, ECX: CR4.PKE is 1.
pub const OSPKE: u32 = 1 << 4;
/// Leaf 8000_0001H, EDX: SYSCALL and SYSRET in 64-bit mode.
pub const SYSCALL: u32 = 1 << 11;
