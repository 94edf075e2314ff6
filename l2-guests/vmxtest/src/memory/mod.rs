//! EPT: what each right allows at each page size, what is recorded when it does not, what is misconfigured, what INVEPT must
//! do (SDM "The Extended Page Table Mechanism", "Exit Qualification for EPT Violations").

mod misconfigured;
mod remapped;

use crate::guest::{Exit, Guest};
use core::ptr;
use l2_kit::{
    Check, caps,
    ept::{self, Ept, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, secondary},
    vmx::{self, reason as r},
};

/// Where the guest's page tables map the physical pages under test: linear and physical addresses differ.
const ALIAS: u64 = 5 << 30;
/// Bits 9 to 11 of the qualification are undefined without advanced information.
const ADVANCED: u64 = 7 << 9;
/// Linear address valid; the access was to it and not to page tables.
const LINEAR: u64 = 1 << 7;
const FINAL: u64 = 1 << 8;

extern "C" fn read(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::read_volatile(address as *const u64) }
}

extern "C" fn write(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::write_volatile(address as *mut u64, 0x77) };
    0x77
}

extern "C" fn call(address: u64) -> u64 {
    // SAFETY: the code that `Pages::new` puts there.
    let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(address) };
    code()
}

/// `mov eax, 0x77; ret`
const CODE: [u8; 6] = [0xB8, 0x77, 0, 0, 0, 0xC3];

/// The physical pages under test: 2 MiB, and a second 2 MiB to map instead.
struct Pages {
    first: u64,
    second: u64,
}

impl Pages {
    fn new(guest: &Guest) -> Self {
        let pages = Self { first: pages::take(LARGE, LARGE), second: pages::take(LARGE, LARGE) };
        for offset in [0, PAGE] {
            pages::set_entry(guest.cr3, ALIAS + offset, (pages.first + offset) | 3);
        }
        for (page, value) in [(pages.first, 0xA), (pages.second, 0xB)] {
            // SAFETY: fresh memory.
            let words = unsafe { pages::at(page) };
            words[0] = value;
            words[64..65].copy_from_slice(&[u64::from_le_bytes([
                CODE[0], CODE[1], CODE[2], CODE[3], CODE[4], CODE[5], 0x90, 0x90,
            ])]);
        }
        pages
    }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let vpid = if setup::allowed_one(Kind::Secondary, secondary::VPID) { secondary::VPID } else { 0 };
    let mut guest = Guest::new(Controls { secondary: secondary::EPT | vpid, ..Controls::default() })?;
    if vpid != 0 {
        vmx::write(f::VPID, 1);
    }
    let Some(ept) = guest.ept else { return Ok(()) };
    let pages = Pages::new(&guest);
    allowed(&mut guest, ept, &pages);
    misconfigured::entries(&mut guest, ept, pages.first);
    misconfigured::page_tables(&mut guest, ept);
    upgrades(&mut guest, ept, &pages);
    switching(&mut guest, ept, &pages);
    sizes(&mut guest, ept, &pages);
    remapped::all(&mut guest, ept, &pages);
    Ok(())
}

/// Forgets what was cached: types 1 and 2 both exist wherever EPT is useful.
fn invalidate() {
    let _ = vmx::invept(2, [0, 0]);
}

/// What happened, without the undefined bits.
fn masked(exit: Exit) -> Exit {
    match exit {
        Exit::Reason(r::EPT_VIOLATION, qualification) => Exit::Reason(r::EPT_VIOLATION, qualification & !ADVANCED),
        // A misconfiguration has no qualification.
        Exit::Reason(r::EPT_MISCONFIGURATION, _) => Exit::Reason(r::EPT_MISCONFIGURATION, 0),
        other => other,
    }
}

fn allowed(guest: &mut Guest, ept: Ept, pages: &Pages) {
    let execute_only = caps::get(setup::VMX_EPT_VPID_CAP) & 1 != 0;
    for (size, size_name) in [(PAGE, "4K"), (LARGE, "2M")] {
        if size == LARGE {
            // Back to one large page: the small ones of before go.
            ept.set_entry(pages.first, 1, 0);
        }
        for (right, right_name) in
            [(0, "none"), (rights::R, "r"), (3, "rw"), (5, "rx"), (rights::RWX, "rwx"), (rights::X, "x")]
        {
            if right == rights::X && !execute_only {
                Check::new(&mut Serial, format_args!("ept {size_name} x")).fact("offered", false).end();
                continue;
            }
            ept.map(pages.first, size, right);
            for (name, access, program, offset) in [
                ("read", rights::R, read as extern "C" fn(u64) -> u64, 8),
                ("write", rights::W, write, 8),
                ("execute", rights::X, call, 512),
            ] {
                invalidate();
                let exit = masked(guest.execute(program, ALIAS + offset));
                let good = if access == rights::R { 0 } else { 0x77 };
                let wanted = if right & access != 0 {
                    Exit::Done(good)
                } else {
                    Exit::Reason(r::EPT_VIOLATION, access | right << 3 | LINEAR | FINAL)
                };
                let mut out = Serial;
                let check = Check::new(&mut out, format_args!("ept {size_name} {right_name}: {name}"))
                    .expect("result", exit, wanted);
                match exit {
                    Exit::Reason(..) => check
                        .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(pages.first + offset))
                        .expect("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS)), Hex(ALIAS + offset))
                        .end(),
                    _ => check.end(),
                }
                // SAFETY: the page under test; the guest is stopped.
                let words = unsafe { pages::at(pages.first) };
                words[1] = 0;
            }
        }
    }
    // An upper entry takes rights away from all below it.
    ept.map(pages.first, PAGE, rights::RWX);
    ept.set_entry(pages.first, 1, ept.entry(pages.first, 1) & !rights::W);
    invalidate();
    let exit = masked(guest.execute(write, ALIAS + 8));
    ept.set_entry(pages.first, 1, ept.entry(pages.first, 1) | rights::W);
    let wanted = Exit::Reason(r::EPT_VIOLATION, rights::W | 5 << 3 | LINEAR | FINAL);
    Check::new(&mut Serial, "ept: an upper entry without w").expect("result", exit, wanted).end();
}

/// More rights need no INVEPT: the violation has thrown away what was cached. Fewer rights need it.
fn upgrades(guest: &mut Guest, ept: Ept, pages: &Pages) {
    let violation = |access: u64, right: u64| Exit::Reason(r::EPT_VIOLATION, access | right << 3 | LINEAR | FINAL);
    ept.map(pages.first, PAGE, rights::NONE);
    invalidate();
    let missing = masked(guest.execute(read, ALIAS));
    ept.map(pages.first, PAGE, rights::R);
    let readable = guest.run();
    let refused = masked(guest.execute(write, ALIAS + 8));
    ept.map(pages.first, PAGE, rights::RWX);
    let writable = guest.run();
    ept.map(pages.first, PAGE, rights::R);
    let one = vmx::invept(1, [ept.pointer(), 0]);
    let revoked = masked(guest.execute(write, ALIAS + 8));
    ept.map(pages.first, PAGE, rights::RWX);
    Check::new(&mut Serial, "ept: rights come and go")
        .expect("missing", missing, violation(rights::R, 0))
        .expect("mapped", readable, Exit::Done(0xA))
        .expect("read_only", refused, violation(rights::W, rights::R))
        .expect("upgraded", writable, Exit::Done(0x77))
        .fact("invept", one)
        .expect("revoked", revoked, violation(rights::W, rights::R))
        .end();
    invalidate();
}

/// Two trees need no INVEPT between them; a changed one does.
fn switching(guest: &mut Guest, ept: Ept, pages: &Pages) {
    let other = Ept::identity();
    other.set(pages.first, PAGE, pages.second | ept::WRITE_BACK | rights::RWX);
    let mut seen = [Exit::Done(0); 6];
    for (slot, tree) in seen.iter_mut().zip([ept, other, ept, other]) {
        vmx::write(f::EPTP, tree.pointer());
        *slot = guest.execute(read, ALIAS);
    }
    other.set(pages.first, PAGE, pages.first | ept::WRITE_BACK | rights::RWX);
    let _ = vmx::invept(1, [other.pointer(), 0]);
    seen[4] = guest.execute(read, ALIAS);
    other.set(pages.first, PAGE, pages.second | ept::WRITE_BACK | rights::RWX);
    invalidate();
    seen[5] = guest.execute(read, ALIAS);
    vmx::write(f::EPTP, ept.pointer());
    let [a, b, a_again, b_again, one, all] = seen;
    Check::new(&mut Serial, "ept: switching trees")
        .expect("a", a, Exit::Done(0xA))
        .expect("b", b, Exit::Done(0xB))
        .expect("a_again", a_again, Exit::Done(0xA))
        .expect("b_again", b_again, Exit::Done(0xB))
        .expect("changed_and_one", one, Exit::Done(0xA))
        .expect("changed_and_all", all, Exit::Done(0xB))
        .end();
}

/// Pages of all sizes that are not mapped one to one.
fn sizes(guest: &mut Guest, ept: Ept, pages: &Pages) {
    let has_1g = caps::get(setup::VMX_EPT_VPID_CAP) >> 17 & 1 != 0;
    let linear = ALIAS + 32 * LARGE;
    let (small, large, huge) = (9 << 30, (9 << 30) + LARGE, 10 << 30);
    ept.set(small, PAGE, pages.second | ept::WRITE_BACK | rights::RWX);
    ept.set(large, LARGE, pages.second | ept::WRITE_BACK | 1 << 7 | rights::RWX);
    if has_1g {
        ept.set_entry(huge, 2, ept::WRITE_BACK | 1 << 7 | rights::RWX);
    }
    for (name, physical, applies) in [("4K", small, true), ("2M", large, true), ("1G", huge + pages.second, has_1g)] {
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("ept: a page of {name} elsewhere"));
        if applies {
            pages::set_entry(guest.cr3, linear, physical | 3);
            invalidate();
            let _ = vmx::invvpid(2, [0, 0]);
            check.expect("result", guest.execute(read, linear), Exit::Done(0xB)).end();
        } else {
            check.fact("offered", false).end();
        }
    }
}
