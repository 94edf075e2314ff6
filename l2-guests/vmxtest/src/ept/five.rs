//! Walks of five levels (SDM "Extended-Page-Table Pointer (EPTP)", table "Format of an EPT PML5 Entry (PML5E)"). All guest-physical
//! addresses of the tests lie below the first entry of the PML5 table, which therefore governs the guest itself.

use super::{ADVANCED, Access, Lab, Read, VALUE};
use crate::{
    guest::{Exit, nothing},
    vmxon::too_wide,
};
use l2_kit::{
    Check,
    ept::{ACCESSED, DIRTY, rights},
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    vmx::{self, Outcome, reason as r},
};

/// Of an EPTP: one less than the number of levels.
const LENGTH: u64 = 7 << 3;
const FIVE: u64 = 4 << 3;

/// All of it.
pub fn all(lab: &mut Lab) {
    let four = lab.ept.pointer();
    lab.run_on(four);
    refused(lab);
    if !lab.offered.five_levels() {
        Check::new(&mut Serial, "ept of five levels").fact("offered", false).end();
        return;
    }
    let top = pages::page();
    top[0] = four & !0xFFF | rights::RWX;
    let top = pages::address(top);
    for flags in [0, 1 << 6] {
        if flags == 0 || lab.offered.flags() {
            lab.run_on(top | flags | FIVE | 6);
            accesses(lab, top);
        }
    }
    lab.run_on(top | FIVE | 6);
    the_entry(lab, top);
    both(lab, top, four);
    lab.run_on(four);
}

/// Other lengths than those that there are.
fn refused(lab: &mut Lab) {
    let (own, five) = (lab.eptp, lab.offered.five_levels());
    for levels in (1..=8).filter(|levels| *levels != 4 && !(*levels == 5 && five)) {
        let eptp = own & !LENGTH | (levels - 1) << 3;
        lab.run_on(eptp);
        let entered = lab.guest.execute(nothing, 5);
        let invalidated = vmx::invept(1, [eptp, 0]);
        Check::new(&mut Serial, format_args!("ept of {levels} levels"))
            .expect("entry", entered, Exit::Refused(Outcome::FailValid(7)))
            .expect("invept", invalidated, Outcome::FailValid(28))
            .end();
    }
    lab.run_on(own);
}

/// Each access at each page size, and the flag of the PML5 entry.
fn accesses(lab: &mut Lab, top: u64) {
    let name = if lab.flags() { " with flags" } else { "" };
    for size in lab.offered.sizes() {
        for kind in Access::ALL {
            for right in [rights::RWX, rights::R, rights::NONE] {
                lab.map(size, kind, lab.leaf(size, kind, right));
                set(top, entry(top) & !(ACCESSED | DIRTY));
                let exit = lab.access(kind);
                let needs = kind.needs(lab.flags());
                let done = matches!(exit, Exit::Done(value) if value == kind.value());
                let page = lab.page(size, kind);
                let mut out = Serial;
                let check = Check::new(
                    &mut out,
                    format_args!("ept of five levels{name}: {} {} {right}", size.name, kind.name()),
                )
                .expect("allowed", done, needs & !right == 0)
                .fact("result", exit)
                .fact("flags", Hex(lab.flags_of(page, size.level)))
                // The guest itself lives below the entry.
                .expect("top_flag", Hex(entry(top) >> 8 & 3), Hex(u64::from(lab.flags())));
                if done { check.end() } else { check.fact("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS))).end() }
            }
            lab.map(size, kind, lab.leaf(size, kind, rights::RWX));
        }
    }
}

/// What the entry of the PML5 table grants, and what it must not have.
fn the_entry(lab: &mut Lab, top: u64) {
    let good = entry(top);
    let bare = good & !rights::RWX;
    let execute_only = lab.offered.execute_only();
    let cases = [
        ("rw", bare | rights::R | rights::W, r::EPT_VIOLATION),
        ("none", bare, r::EPT_VIOLATION),
        ("none, beyond the address width", bare | too_wide(), r::EPT_VIOLATION),
        ("x", bare | rights::X, if execute_only { r::EPT_VIOLATION } else { r::EPT_MISCONFIGURATION }),
        ("w", bare | rights::W, r::EPT_MISCONFIGURATION),
        ("beyond the address width", good | too_wide(), r::EPT_MISCONFIGURATION),
        ("bit 3", good | 1 << 3, r::EPT_MISCONFIGURATION),
        ("bit 6", good | 1 << 6, r::EPT_MISCONFIGURATION),
        ("bit 7", good | 1 << 7, r::EPT_MISCONFIGURATION),
    ];
    for (name, bad, reason) in cases {
        set(top, bad);
        lab.forget();
        let exit = lab.guest.execute(nothing, 5);
        let exit = match lab.masked(exit) {
            Exit::Reason(r::EPT_VIOLATION, q) => Exit::Reason(r::EPT_VIOLATION, q & !ADVANCED),
            other => other,
        };
        let physical = vmx::read(f::GUEST_PHYSICAL_ADDRESS);
        set(top, good);
        lab.forget();
        let after = lab.guest.execute(nothing, 5);
        Check::new(&mut Serial, format_args!("ept of five levels, PML5E {name}"))
            .expect("reason", if let Exit::Reason(reason, _) = exit { reason } else { 0 }, reason)
            .fact("result", exit)
            .fact("physical", Hex(physical))
            .expect("after", after, Exit::Done(5))
            .end();
    }
}

/// One tree by four and by five levels, in turns: INVEPT concerns the root table that the pointer names.
fn both(lab: &mut Lab, top: u64, four: u64) {
    let [size, ..] = &super::SIZES;
    let mut seen = [Exit::Done(0); 4];
    for (seen, (eptp, right)) in seen.iter_mut().zip([
        (top | FIVE | 6, rights::RWX),
        (four, rights::RWX),
        (top | FIVE | 6, rights::NONE),
        (four, rights::NONE),
    ]) {
        lab.run_on(eptp);
        lab.map(size, Read, lab.leaf(size, Read, right));
        *seen = lab.access(Read);
    }
    lab.map(size, Read, lab.leaf(size, Read, rights::RWX));
    let gone = |exit| matches!(exit, Exit::Reason(r::EPT_VIOLATION, _));
    Check::new(&mut Serial, "ept of five levels and of four")
        .expect("five", seen[0], Exit::Done(VALUE))
        .expect("four", seen[1], Exit::Done(VALUE))
        .expect("five_unmapped", gone(seen[2]), true)
        .expect("four_unmapped", gone(seen[3]), true)
        .end();
}

fn entry(top: u64) -> u64 {
    // SAFETY: a page of this part's, to which nobody holds a reference.
    let table = unsafe { pages::at(top) };
    table[0]
}

fn set(top: u64, entry: u64) {
    // SAFETY: as above; the guest is stopped.
    let table = unsafe { pages::at(top) };
    table[0] = entry;
}
