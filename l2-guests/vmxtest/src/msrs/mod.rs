//! MSRs: what RDMSR and WRMSR do in the hypervisor and, where its bitmap lets them pass, in its guest.

mod apic_base;
#[path = "../../../../src/rules/msr_policy.rs"]
#[expect(dead_code, reason = "the reasons are for people")]
pub mod policy;
mod sweep;
mod values;

use crate::guest::Guest;
use l2_kit::{
    Global,
    setup::{Controls, Missing, secondary},
};

/// An address in memory that the machine of this hypervisor does not have, because nvmx is there (`outside=` on the command
/// line); 0 if there is none to try.
pub static OUTSIDE: Global<u64> = Global::new(0);

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    apic_base::all(&mut guest);
    values::all();
    sweep::all(&mut guest);
    Ok(())
}
