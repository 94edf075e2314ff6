//! INVEPT and an entry, with so much memory of the guest mapped and in use.

use crate::{
    bracket::measure,
    guest::{Guest, Stop, must, tables},
};
use core::fmt;
use l2_kit::{
    ept::{Ept, LARGE_BIT, WRITE_BACK, rights},
    pages::{self, LARGE, PAGE},
    vmx,
};

/// Where the guest finds the memory; linear and guest-physical addresses are the same.
const WINDOW: u64 = 1 << 30;
/// MiB that are mapped by 4 KiB pages, and by 2 MiB pages.
const SMALL: [u64; 5] = [1, 2, 64, 320, 1024];
const BIG: [u64; 3] = [64, 320, 1024];
/// Entries that L2 changes before each INVEPT.
const CHANGED: u64 = 16;
const ROUNDS: u64 = 8;

/// All sizes.
///
/// # Errors
/// If a guest does not run.
pub fn all() -> Result<(), Stop> {
    let cr3 = tables();
    let frames = pages::take(LARGE, LARGE);
    let mut vpid = 1;
    let mut guest = |ept: &Ept| {
        vpid += 1;
        Guest::new(cr3, ept, vpid)
    };
    // After these lie the EPT tables, which a hypervisor keeps from its guest.
    let hidden = frames + LARGE;
    let (pool, bytes) = pages::pool();
    let identity = || {
        let ept = Ept::identity();
        (hidden..pool + bytes).step_by(LARGE as usize).for_each(|at| ept.unmap(at, LARGE));
        ept
    };
    let ept = identity();
    round(format_args!("invept_nothing"), &mut guest(&ept)?, &ept, |_| ())?;
    for (page, by, sizes) in [(LARGE, "2m", &BIG[..]), (PAGE, "4k", &SMALL[..])] {
        let ept = identity();
        let mut guest = guest(&ept)?;
        // Every page of the window is one of the same 2 MiB: what counts is the number of entries.
        let entry =
            |at: u64| (frames + at % LARGE) | WRITE_BACK | rights::RWX | if page == LARGE { LARGE_BIT } else { 0 };
        let mut mapped = 0;
        for &mib in sizes {
            let bytes = mib << 20;
            (mapped..bytes).step_by(page as usize).for_each(|at| ept.set(WINDOW + at, page, entry(at)));
            guest.load()?;
            guest.touch(WINDOW + mapped, (bytes - mapped) / PAGE)?;
            mapped = bytes;
            round(format_args!("invept_{mib}m_by_{by}"), &mut guest, &ept, |_| ())?;
            if page == PAGE {
                let apart = bytes / CHANGED;
                let change = |round: u64| {
                    for at in (0..CHANGED).map(|n| n * apart) {
                        ept.set(WINDOW + at, PAGE, entry(at + round % 2 * PAGE));
                    }
                };
                round(format_args!("invept_{mib}m_by_{by}_{CHANGED}_changed"), &mut guest, &ept, change)?;
            }
        }
    }
    Ok(())
}

fn round(name: fmt::Arguments<'_>, guest: &mut Guest, ept: &Ept, mut change: impl FnMut(u64)) -> Result<(), Stop> {
    guest.load()?;
    measure(name, 2, ROUNDS, |number| {
        change(number);
        must("INVEPT", vmx::invept(1, [ept.pointer(), 0]))?;
        guest.round()
    })
}
