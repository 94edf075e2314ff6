//! Mode-based execute control: fetches of user mode and of supervisor mode each have a right of their own (SDM "EPT Translation
//! Mechanism", "EPT Misconfigurations", table "Exit Qualification for EPT Violations"). The mode is that of the linear address,
//! not the privilege level: a user-mode page is one where U/S is 1 in each entry of the guest's page tables.

use crate::guest::{self, Exit, Guest, Program};
use core::ptr;
use l2_kit::{
    Check, caps,
    ept::{Ept, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, secondary},
    vmx::{self, Outcome, reason as r},
};

/// Where the guest's page tables map the page under test for supervisor mode, and for user mode: in another PML4 entry, since
/// all entries have a say in that.
const SUPERVISOR: u64 = 5 << 30;
const USER: u64 = 1 << 39 | SUPERVISOR;
/// Linear address valid; the access was to it and not to page tables.
const LINEAR: u64 = 1 << 7 | 1 << 8;
const FETCH: u64 = 1 << 2;
/// Bit of the qualification: executable in user mode.
const USER_EXECUTABLE: u64 = 1 << 6;
/// Bits 9 to 11: advanced information.
const OF_USER: u64 = 1 << 9;
const WRITABLE: u64 = 1 << 10;

/// `mov eax, 0x77; ret`
const CODE: u64 = u64::from_le_bytes([0xB8, 0x77, 0, 0, 0, 0xC3, 0x90, 0x90]);

extern "C" fn read(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::read_volatile(address as *const u64) };
    0x77
}

extern "C" fn write(address: u64) -> u64 {
    // SAFETY: the guest's page under test, beside its code.
    unsafe { ptr::write_volatile((address + 8) as *mut u64, 1) };
    0x77
}

extern "C" fn call(address: u64) -> u64 {
    // SAFETY: `all` puts code there.
    let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(address) };
    code()
}

const ACCESSES: [(&str, Program, u64, u64); 5] = [
    ("read", read, SUPERVISOR, rights::R),
    ("write", write, SUPERVISOR, rights::W),
    ("write to a user page", write, USER, rights::W),
    ("fetch", call, SUPERVISOR, rights::X),
    ("fetch of user mode", call, USER, rights::XU),
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let Some(ept) = guest.ept else { return Ok(()) };
    if !setup::allowed_one(Kind::Secondary, secondary::MODE_BASED_EXECUTE) {
        Check::new(&mut Serial, "mode-based execute control").fact("offered", false).end();
        return Ok(());
    }
    let page = pages::take(LARGE, LARGE);
    // SAFETY: fresh memory.
    let words = unsafe { pages::at(page) };
    words[0] = CODE;
    pages::set_entry(guest.cr3, SUPERVISOR, page | 3);
    pages::set_entry(guest.cr3, USER, page | 7);
    let controls = vmx::read(f::SECONDARY_CONTROLS) | u64::from(secondary::MODE_BASED_EXECUTE);
    vmx::write(f::SECONDARY_CONTROLS, controls);
    grid(&mut guest, ept, page);
    upper(&mut guest, ept, page);
    misconfigured(&mut guest, ept, page);
    upgrades(&mut guest, ept, page);
    switched_off(&mut guest, ept, page);
    needs_ept(&mut guest);
    Ok(())
}

fn execute_only() -> bool {
    caps::get(setup::VMX_EPT_VPID_CAP) & 1 != 0
}

fn invalidate() {
    let _ = vmx::invept(2, [0, 0]);
}

/// What is defined of the qualification.
fn defined(exit: Exit) -> Exit {
    match exit {
        Exit::Reason(r::EPT_MISCONFIGURATION, _) => Exit::Reason(r::EPT_MISCONFIGURATION, 0),
        other => other,
    }
}

/// What an access comes to where these rights are granted.
fn wanted(right: u64, at: u64, needed: u64) -> Exit {
    if right & needed != 0 {
        return Exit::Done(0x77);
    }
    let access = if needed == rights::XU { FETCH } else { needed };
    let user = if right & rights::XU != 0 { USER_EXECUTABLE } else { 0 };
    let linear = LINEAR | WRITABLE | if at == USER { OF_USER } else { 0 };
    let advanced = if caps::get(setup::VMX_EPT_VPID_CAP) & 1 << 22 != 0 { !0 } else { !(7 << 9) };
    Exit::Reason(r::EPT_VIOLATION, (access | (right & rights::RWX) << 3 | user | linear) & advanced)
}

fn one(guest: &mut Guest, how: core::fmt::Arguments<'_>, right: u64, page: u64) {
    for (name, program, at, needed) in ACCESSES {
        invalidate();
        let exit = defined(guest.execute(program, at));
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("execute {how}: {name}")).expect(
            "result",
            exit,
            wanted(right, at, needed),
        );
        match exit {
            Exit::Reason(..) => check
                .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !0xF), Hex(page))
                .expect("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS) & !0xF), Hex(at))
                .end(),
            _ => check.end(),
        }
    }
}

/// Every combination of rights in the entry of the page, in both sizes.
fn grid(guest: &mut Guest, ept: Ept, page: u64) {
    for (size, size_name) in [(PAGE, "4K"), (LARGE, "2M")] {
        if size == LARGE {
            ept.set_entry(page, 1, 0);
        }
        for right in [0, 1, 3, 4, 5, 7] {
            for right in [right, right | rights::XU] {
                if right & rights::R == 0 && right != 0 && !execute_only() {
                    continue;
                }
                ept.map(page, size, right);
                one(guest, format_args!("{size_name} {right:#x}"), right, page);
            }
        }
    }
}

/// Each entry above takes rights away.
fn upper(guest: &mut Guest, ept: Ept, page: u64) {
    const ALL: u64 = rights::RWX | rights::XU;
    ept.map(page, PAGE, ALL);
    let whole = ept.entry(page, 1);
    for taken in [rights::XU, rights::X, rights::W, rights::X | rights::XU] {
        ept.set_entry(page, 1, whole & !taken);
        one(guest, format_args!("below an entry without {taken:#x}"), ALL & !taken, page);
    }
    // Present by the right of user mode alone
    if execute_only() {
        ept.set_entry(page, 1, whole & !rights::RWX);
        one(guest, format_args!("below an entry of user mode"), rights::XU, page);
    }
    ept.set_entry(page, 1, whole);
}

fn misconfigured(guest: &mut Guest, ept: Ept, page: u64) {
    for (right, applies) in [
        (rights::W, true),
        (rights::W | rights::X, true),
        (rights::W | rights::XU, true),
        (rights::W | rights::X | rights::XU, true),
        (rights::XU, !execute_only()),
        (rights::X | rights::XU, !execute_only()),
    ] {
        if !applies {
            continue;
        }
        ept.map(page, PAGE, right);
        for (name, program, at, _) in ACCESSES {
            invalidate();
            let exit = defined(guest.execute(program, at));
            Check::new(&mut Serial, format_args!("execute misconfigured {right:#x}: {name}"))
                .expect("result", exit, Exit::Reason(r::EPT_MISCONFIGURATION, 0))
                .end();
        }
    }
}

/// More rights need no INVEPT, fewer do.
fn upgrades(guest: &mut Guest, ept: Ept, page: u64) {
    ept.map(page, PAGE, rights::R | rights::W);
    invalidate();
    let none = defined(guest.execute(call, USER));
    ept.map(page, PAGE, rights::RWX | rights::XU);
    let both = guest.run();
    let supervisor = guest.execute(call, SUPERVISOR);
    ept.map(page, PAGE, rights::RWX);
    invalidate();
    let taken = defined(guest.execute(call, USER));
    let kept = guest.execute(call, SUPERVISOR);
    ept.map(page, PAGE, rights::R | rights::XU);
    invalidate();
    let other_taken = defined(guest.execute(call, SUPERVISOR));
    ept.map(page, PAGE, rights::RWX | rights::XU);
    Check::new(&mut Serial, "execute rights come and go")
        .expect("none", none, wanted(3, USER, rights::XU))
        .expect("both", both, Exit::Done(0x77))
        .expect("supervisor", supervisor, Exit::Done(0x77))
        .expect("taken", taken, wanted(7, USER, rights::XU))
        .expect("kept", kept, Exit::Done(0x77))
        .expect("other_taken", other_taken, wanted(rights::R | rights::XU, SUPERVISOR, rights::X))
        .expect("again", guest.run(), Exit::Done(0x77))
        .end();
}

/// Without the control the bit is ignored.
fn switched_off(guest: &mut Guest, ept: Ept, page: u64) {
    let on = vmx::read(f::SECONDARY_CONTROLS);
    let off = on & !u64::from(secondary::MODE_BASED_EXECUTE);
    for (right, with, without) in [
        (rights::R | rights::XU, Exit::Done(0x77), wanted(rights::R, USER, rights::X)),
        (rights::R | rights::X, wanted(rights::R | rights::X, USER, rights::XU), Exit::Done(0x77)),
        (rights::XU, if execute_only() { Exit::Done(0x77) } else { Exit::Reason(r::EPT_MISCONFIGURATION, 0) }, {
            wanted(0, USER, rights::X)
        }),
    ] {
        ept.map(page, PAGE, right);
        let mut seen = [Exit::Done(0); 4];
        for (exit, controls) in seen.iter_mut().zip([on, off, on, off]) {
            vmx::write(f::SECONDARY_CONTROLS, controls);
            invalidate();
            *exit = defined(guest.execute(call, USER));
            if let Exit::Reason(r::EPT_VIOLATION, q) = exit {
                // Undefined without the control
                if controls == off {
                    *q &= !USER_EXECUTABLE;
                }
            }
        }
        Check::new(&mut Serial, format_args!("execute {right:#x} with and without the control"))
            .expect("with", seen[0], with)
            .expect("without", seen[1], without)
            .expect("with_again", seen[2], with)
            .expect("without_again", seen[3], without)
            .end();
    }
    vmx::write(f::SECONDARY_CONTROLS, on);
    ept.map(page, PAGE, rights::RWX | rights::XU);
    invalidate();
}

fn needs_ept(guest: &mut Guest) {
    let on = vmx::read(f::SECONDARY_CONTROLS);
    vmx::write(f::SECONDARY_CONTROLS, on & !u64::from(secondary::EPT));
    let refused = guest.execute(guest::nothing, 5);
    vmx::write(f::SECONDARY_CONTROLS, on);
    Check::new(&mut Serial, "mode-based execute control without EPT")
        .expect("result", refused, Exit::Refused(Outcome::FailValid(7)))
        .end();
}
