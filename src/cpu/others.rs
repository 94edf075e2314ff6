//! What a virtual CPU knows of the others: how many there are, whether L2 has started a second one, the counters of all, and
//! whether the machine is over. Starting them is `run::smp`'s.

use crate::hw::halt::halt;
use crate::hw::serial;
use crate::trace::Totals;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// How many CPUs L2 has.
static USED: AtomicU32 = AtomicU32::new(1);
/// Counters of all CPUs.
static TOTALS: Totals = Totals::new();
/// L2 has started a second processor.
static SEVERAL: AtomicBool = AtomicBool::new(false);

/// L2 has so many CPUs.
pub fn set_used_cpus(count: u32) {
    USED.store(count, Ordering::Release);
}

/// L2 runs on this processor too from now on.
pub fn note_running() {
    SEVERAL.store(true, Ordering::SeqCst);
}

/// L2 has started a second processor at some time.
#[inline(always)]
pub fn several_run() -> bool {
    SEVERAL.load(Ordering::Relaxed)
}

/// How many CPUs L2 has.
pub fn used_cpus() -> u32 {
    USED.load(Ordering::Relaxed)
}

/// The counters of all CPUs.
pub fn totals() -> &'static Totals {
    &TOTALS
}

/// An INIT came: if it is `run::smp::stop_others`', this processor stops.
pub fn stop_if_over() {
    if serial::is_over() {
        halt();
    }
}
