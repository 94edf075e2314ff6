//! What L2 itself exits for: the platform is thin, so this is all of it.

pub mod cpuid;
pub mod cr;
pub mod cr_exit;
pub mod init;
pub mod msr;
pub mod task_switch;
pub mod unasked;
pub mod xsetbv;
