//! The capability MSRs that this image goes by: the CPU's, clamped to those that `caps=` on its command line names.
//!
//! A guest whose records are to be compared with those of another machine must use nothing that only one of them offers.

use super::{cpu, report};
use crate::{BootInfo, Global};
use l2_protocol::{Kind, caps::Caps};

/// `None` until [`init`]
static USED: Global<Option<Caps>> = Global::new(None);

/// Reads the command line and prints, as a `caps` record, what the image goes by. A machine that lacks something of what the
/// command line names makes the image fail.
pub fn init(info: &BootInfo) {
    let whole = Caps::read(own);
    let used = match info.option("caps").map(Caps::parse) {
        None => whole,
        Some(Some(limit)) => {
            let used = whole.clamped(&limit);
            if used.comparable() != limit.comparable() {
                report::fail(format_args!("this machine has not all of the capabilities of caps="));
            }
            used
        }
        Some(None) => {
            report::fail(format_args!("caps= cannot be read"));
            whole
        }
    };
    USED.set(Some(used));
    report::record(Kind::Caps, &[("msrs", &used.comparable())]);
}

/// A capability MSR of the CPU itself.
pub fn own(msr: u32) -> Option<u64> {
    cpu::try_rdmsr(msr).ok()
}

/// A capability MSR as the image goes by it.
pub fn msr(msr: u32) -> Option<u64> {
    match USED.get() {
        None => own(msr),
        Some(used) => used.get(msr),
    }
}

/// [`msr`], with no capabilities where there is no such MSR.
pub fn get(index: u32) -> u64 {
    msr(index).unwrap_or(0)
}

/// [`own`], with no capabilities where there is no such MSR.
pub fn own_or_0(index: u32) -> u64 {
    own(index).unwrap_or(0)
}
