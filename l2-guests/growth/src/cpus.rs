//! One guest, on the first of several CPUs that L2 has started.

use crate::{
    bracket::measure,
    guest::{Guest, Stop, tables},
    switch::SWITCHES,
};
use l2_kit::{apic, ept::Ept, smp};

/// Starts all CPUs, and measures. They wait in a loop, so that each has entered L2 and none exits.
///
/// # Errors
/// If a CPU does not start, or the guest does not run.
pub fn all() -> Result<(), Stop> {
    apic::init();
    let ids = smp::find();
    for (index, id) in ids.iter().enumerate().skip(1) {
        if !smp::start(index, *id) {
            return Err(Stop::Absent(index));
        }
    }
    let mut guest = Guest::new(tables(), &Ept::identity(), 1)?;
    measure(format_args!("cpus_{}", ids.len()), 2, SWITCHES, |_| guest.round())
}
