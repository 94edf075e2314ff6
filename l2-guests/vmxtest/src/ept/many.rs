//! More tables than a hypervisor below may want to keep: each of many large regions goes through a page table of its own
//! as far as it can tell, although all are the same table here.

use super::{DATA, Lab, VALUE};
use crate::guest::Exit;
use core::ptr;
use l2_kit::{
    Check,
    ept::{self, LARGE_BIT, rights},
    identity::{Slot, counters},
    log,
    pages::{self, LARGE, PAGE},
    protocol::abi::Counter,
    serial::Serial,
};

/// Regions of 2 MiB.
const REGIONS: u64 = 400;
/// Where they begin in the guest's physical memory, and in its linear addresses.
const BASE: u64 = 24 << 30;
const LINEAR: u64 = 7 << 30;
const ROUNDS: u64 = 3;

/// Reads, writes and reads again in every region.
extern "C" fn everywhere(address: u64) -> u64 {
    let mut sum = 0;
    for region in 0..REGIONS {
        let at = (address + region * LARGE + region % 8 * PAGE) as *mut u64;
        // SAFETY: the guest's pages under test; a page of the same number is the same in all regions.
        unsafe {
            sum += ptr::read_volatile(at);
            ptr::write_volatile(at, ptr::read_volatile(at) + 1);
        }
    }
    sum
}

/// All of it, with flags if there are any.
pub fn all(lab: &mut Lab) {
    // One page table, which every region refers to.
    let table = pages::page();
    for (page, entry) in (0..).zip(table.iter_mut().take(8)) {
        *entry = (lab.target + page * PAGE) | ept::WRITE_BACK | rights::RWX;
    }
    let table = pages::address(table);
    lab.ept.set(BASE, PAGE, 0);
    for region in 0..REGIONS {
        lab.ept.set_entry(BASE + region * LARGE, 1, table | rights::RWX);
        let linear = LINEAR + region * LARGE;
        if region == 0 {
            pages::set_entry(lab.guest.cr3, linear, 0);
        }
        super::set_directory_entry(lab.guest.cr3, linear, (BASE + region * LARGE) | super::PRESENT | LARGE_BIT);
    }
    for pointer in [lab.ept.pointer(), lab.ept.pointer_with_flags()] {
        if pointer & 1 << 6 != 0 && !lab.offered.flags() {
            continue;
        }
        lab.run_on(pointer);
        lab.forget();
        for page in 0..8 {
            // SAFETY: ours; the guest is stopped.
            unsafe { ptr::write_volatile((lab.target + page * PAGE + DATA) as *mut u64, VALUE) };
        }
        // Each of the eight pages is counted up by every eighth region.
        let each = REGIONS / 8;
        for round in 0..ROUNDS {
            let first = VALUE + round * each;
            let wanted = 8 * (each * first + each * (each - 1) / 2);
            let exit = lab.guest.execute(everywhere, LINEAR + DATA);
            let with = if lab.flags() { " with flags" } else { "" };
            Check::new(&mut Serial, format_args!("ept{with}: {REGIONS} page tables, round {round}"))
                .expect("result", exit, Exit::Done(wanted))
                .end();
        }
    }
    if Slot::find() == Slot::Nvmx {
        log!("ept02 evictions: {}", counters()[Counter::Ept02Evictions as usize]);
    }
}
