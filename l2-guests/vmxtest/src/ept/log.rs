//! The page-modification log.
//!
//! With its index out of range the SDM wants an exit when a flag has to be set; Bochs exits at the next translation that it
//! does not have cached. So that both mean the same, what follows sets flags at every step.

use super::{Lab, WRITTEN};
use crate::{
    guest::{self, Exit},
    vmxon::too_wide,
};
use core::{fmt, ptr};
use l2_kit::{
    Check,
    ept::{ACCESSED, DIRTY, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    protocol::{Hex, Value},
    serial::Serial,
    setup::{self, Kind, secondary},
    trap,
    vmx::{self, Outcome, reason as r},
};

/// Pages of the guest that are written here.
const PAGES: u64 = 4;
/// Where they lie in its physical memory.
const BASE: u64 = 20 << 30;
/// And where its page tables map them.
const LINEAR: u64 = super::LINEAR + 64 * PAGE;
const LAST: u64 = 511;

/// Writes to each of the pages.
extern "C" fn write_all(address: u64) -> u64 {
    for page in 0..PAGES {
        // SAFETY: the guest's pages under test.
        unsafe { ptr::write_volatile((address + page * PAGE) as *mut u64, WRITTEN) };
    }
    WRITTEN
}

/// Reads each of the pages.
extern "C" fn read_all(address: u64) -> u64 {
    // SAFETY: the guest's pages under test.
    (0..PAGES).fold(0, |all, page| all | unsafe { ptr::read_volatile((address + page * PAGE) as *const u64) })
}

/// The entries of a log from an index on that were written, the first first.
struct Entries {
    log: u64,
    from: u64,
}

impl Value for Entries {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        // SAFETY: the log is ours; the guest is stopped.
        let log = unsafe { pages::at(self.log) };
        let mut index = self.from;
        while index != vmx::read(f::PML_INDEX) && index <= LAST {
            write!(out, "{:#x},", log[index as usize])?;
            index = index.wrapping_sub(1) & 0xFFFF;
        }
        write!(out, "{index:#x}")
    }
}

/// All of it.
pub fn all(lab: &mut Lab) {
    if !setup::allowed_one(Kind::Secondary, secondary::PML) {
        Check::new(&mut Serial, "pml").fact("offered", false).end();
        return;
    }
    let log = pages::address(pages::page());
    let controls = vmx::read(f::SECONDARY_CONTROLS);
    refused(lab, log);
    for page in 0..PAGES {
        lab.ept.set(BASE + page * PAGE, PAGE, (lab.target + page * PAGE) | l2_kit::ept::WRITE_BACK | rights::RWX);
        pages::set_entry(lab.guest.cr3, LINEAR + page * PAGE, (BASE + page * PAGE) | super::PRESENT);
    }
    vmx::write(f::PML_ADDR, log);
    lab.run_on(lab.ept.pointer_with_flags());
    // What the guest needs besides is dirty from now on.
    lab.forget();
    let _ = lab.guest.execute(write_all, LINEAR);
    vmx::write(f::SECONDARY_CONTROLS, controls | u64::from(secondary::PML));

    let cleaned = start(lab, log, DIRTY, LAST);
    report(lab, "pml: the first write to a page", log, cleaned, write_all);
    let again = lab.guest.execute(write_all, LINEAR);
    Check::new(&mut Serial, "pml: no entry for a page that is dirty")
        .expect("result", again, Exit::Done(WRITTEN))
        .expect("index", vmx::read(f::PML_INDEX), LAST - PAGES)
        .end();
    let cleaned = start(lab, log, ACCESSED | DIRTY, 200);
    report(lab, "pml: a read is not logged", log, cleaned, read_all);
    report(lab, "pml: the write after it is", log, cleaned, write_all);
    large(lab, log);
    full(lab, log);
    during_delivery(lab, log);

    start(lab, log, DIRTY, LAST);
    lab.run_on(lab.ept.pointer());
    lab.forget();
    report(lab, "pml: nothing without flags", log, LAST, write_all);

    // Everything from nothing: page tables are logged, too.
    lab.run_on(lab.ept.pointer_with_flags());
    start(lab, log, DIRTY, LAST);
    lab.ept.clear_flags();
    lab.forget();
    report(lab, "pml: everything", log, LAST, write_all);

    vmx::write(f::SECONDARY_CONTROLS, controls);
}

/// Clears flags of the pages and empties the log.
fn start(lab: &Lab, log: u64, flags: u64, index: u64) -> u64 {
    for page in 0..PAGES {
        let at = BASE + page * PAGE;
        lab.ept.set_entry(at, 0, lab.ept.entry(at, 0) & !flags);
    }
    // SAFETY: ours.
    unsafe { pages::at(log) }.fill(0);
    vmx::write(f::PML_INDEX, index);
    lab.forget();
    index
}

fn report(lab: &mut Lab, name: &str, log: u64, before: u64, program: guest::Program) {
    let exit = lab.guest.execute(program, LINEAR);
    let flags = (0..PAGES).fold(0, |word, page| word << 4 | lab.ept.entry(BASE + page * PAGE, 0) >> 8 & 3);
    Check::new(&mut Serial, name)
        .expect("result", exit, Exit::Done(WRITTEN))
        .fact("before", before)
        .fact("index", vmx::read(f::PML_INDEX))
        .fact("flags", Hex(flags))
        .fact("log", Entries { log, from: before })
        .end();
}

/// A large page is dirty as a whole, and the entry tells where it was written first.
fn large(lab: &mut Lab, log: u64) {
    let at = 21 << 30;
    let leaf = lab.target | l2_kit::ept::WRITE_BACK | l2_kit::ept::LARGE_BIT | rights::RWX;
    lab.ept.set(at, LARGE, leaf);
    for page in 0..PAGES {
        pages::set_entry(lab.guest.cr3, LINEAR + page * PAGE, (at + (PAGES - page) * PAGE) | super::PRESENT);
    }
    start(lab, log, 0, LAST);
    let exit = lab.guest.execute(write_all, LINEAR);
    // SAFETY: ours.
    let first = unsafe { pages::at(log) }[LAST as usize];
    Check::new(&mut Serial, "pml: a page of 2M")
        .expect("result", exit, Exit::Done(WRITTEN))
        .expect("index", vmx::read(f::PML_INDEX), LAST - 1)
        .expect("log", Hex(first), Hex(at + PAGES * PAGE))
        .end();
    for page in 0..PAGES {
        pages::set_entry(lab.guest.cr3, LINEAR + page * PAGE, (BASE + page * PAGE) | super::PRESENT);
    }
}

/// An exit when there is no room, and L3 goes on when there is again.
fn full(lab: &mut Lab, log: u64) {
    start(lab, log, ACCESSED | DIRTY, 1);
    let first = lab.guest.execute(write_all, LINEAR);
    let (index, rip) = (vmx::read(f::PML_INDEX), vmx::read(f::GUEST_RIP));
    let flags = (0..PAGES).fold(0, |word, page| word << 4 | lab.ept.entry(BASE + page * PAGE, 0) >> 8 & 3);
    vmx::write(f::PML_INDEX, 0);
    let second = lab.guest.run();
    let at_same = vmx::read(f::GUEST_RIP) == rip;
    vmx::write(f::PML_INDEX, LAST);
    let third = lab.guest.run();
    let exit = Exit::Reason(r::PML_FULL, 0);
    Check::new(&mut Serial, "pml: full")
        .expect("first", first, exit)
        .expect("index", index, 0xFFFF)
        .expect("flags", Hex(flags), Hex(0x3300))
        .fact("rip", Hex(rip))
        .expect("second", second, exit)
        .fact("same", at_same)
        .expect("third", third, Exit::Done(WRITTEN))
        .fact("log", Entries { log, from: LAST })
        .end();
    for index in [0xFFFF, 512, 0x8000] {
        start(lab, log, ACCESSED | DIRTY, index);
        lab.ept.clear_flags();
        lab.forget();
        let exit = lab.guest.execute(write_all, LINEAR);
        let rip = vmx::read(f::GUEST_RIP);
        Check::new(&mut Serial, format_args!("pml: index {index:#x}"))
            .expect("result", exit, Exit::Reason(r::PML_FULL, 0))
            .expect("index", vmx::read(f::PML_INDEX), index)
            .expect("at_start", rip == write_all as *const () as u64, true)
            .end();
    }
    vmx::write(f::PML_INDEX, LAST);
    let _ = lab.guest.execute(write_all, LINEAR);
}

/// An exit while an exception is delivered tells which.
fn during_delivery(lab: &mut Lab, log: u64) {
    start(lab, log, 0, 0xFFFF);
    lab.ept.clear_flags();
    lab.forget();
    lab.guest.start(write_all, LINEAR);
    let event = 1 << 31 | 3 << 8 | u64::from(trap::UD);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, event);
    let exit = lab.guest.run();
    Check::new(&mut Serial, "pml: full while an exception is delivered")
        .expect("result", exit, Exit::Reason(r::PML_FULL, 0))
        .expect("vectoring", Hex(vmx::read(f::IDT_VECTORING_INFO)), Hex(event))
        .end();
    vmx::write(f::ENTRY_INTERRUPTION_INFO, 0);
    vmx::write(f::PML_INDEX, LAST);
    let _ = lab.guest.execute(write_all, LINEAR);
}

/// What a VM entry refuses.
fn refused(lab: &mut Lab, log: u64) {
    let bad = Exit::Refused(Outcome::FailValid(7));
    let controls = vmx::read(f::SECONDARY_CONTROLS);
    let with = controls | u64::from(secondary::PML);
    let cases = [
        ("without EPT", with & !u64::from(secondary::EPT), log, bad),
        ("misaligned", with, log + 8, bad),
        ("beyond the address width", with, log | too_wide(), bad),
        ("with bit 63", with, log | 1 << 63, bad),
        ("that is switched off", controls, log + 8, Exit::Done(5)),
        ("without flags", with, log, Exit::Done(5)),
    ];
    lab.run_on(lab.ept.pointer());
    for (name, controls, address, wanted) in cases {
        vmx::write(f::SECONDARY_CONTROLS, controls);
        vmx::write(f::PML_ADDR, address);
        let exit = lab.guest.execute(guest::nothing, 5);
        Check::new(&mut Serial, format_args!("pml: address {name}")).expect("result", exit, wanted).end();
    }
    vmx::write(f::SECONDARY_CONTROLS, controls);
}
