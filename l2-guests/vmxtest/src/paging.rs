//! A guest without EPT: its page tables are the hypervisor's business (SDM "VMM Exception Handling: page faults",
//! "Page-Fault Error-Code Mask").

use crate::guest::{Exit, Guest, Program};
use core::ptr;
use l2_kit::{
    Check, fields as f,
    pages::{self, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, primary, secondary},
    trap, vmx,
    vmx::reason as r,
};

/// Linear addresses with nothing mapped.
const FAR: u64 = 5 << 30;
const PAGE_FAULT: u64 = 1 << 31 | 1 << 11 | 3 << 8 | trap::PF as u64;

extern "C" fn read(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::read_volatile(address as *const u64) }
}

extern "C" fn write(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::write_volatile(address as *mut u64, 0x77) };
    0x77
}

extern "C" fn call_through(address: u64) -> u64 {
    // SAFETY: no code is there: this faults.
    let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(address) };
    code()
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    for (name, bits) in [("without VPID", 0), ("with VPID", secondary::VPID)] {
        if setup::allowed_one(Kind::Secondary, bits) {
            let mut guest = Guest::new(Controls { secondary: bits, ..Controls::default() })?;
            if bits != 0 {
                vmx::write(f::VPID, 2);
            }
            faults(&mut guest, name);
            passed_on(&mut guest, name);
            tables(&mut guest, name);
        }
    }
    Ok(())
}

/// Forgets the guest's translations as MOV to CR3 or INVLPG would.
fn invalidate() {
    if vmx::read(f::SECONDARY_CONTROLS) as u32 & secondary::VPID != 0
        && vmx::read(f::PRIMARY_CONTROLS) as u32 & primary::SECONDARY != 0
    {
        let _ = vmx::invvpid(1, [2, 0]);
    }
}

/// Page faults exit; the hypervisor maps the page, and the guest goes on.
fn faults(guest: &mut Guest, when: &str) {
    vmx::write(f::EXCEPTION_BITMAP, 1 << trap::PF);
    let page = pages::page();
    page[0] = 0xA;
    let page = pages::address(page);
    for (number, (name, program, error, done)) in
        (0u64..).zip([("read", read as Program, 0u64, 0xA), ("write", write, 2, 0x77)])
    {
        let linear = FAR + number * PAGE;
        let exit = guest.execute(program, linear + 8 * number);
        let (info, code) = (vmx::read(f::EXIT_INTERRUPTION_INFO), vmx::read(f::EXIT_INTERRUPTION_ERROR));
        pages::set_entry(guest.cr3, linear, page | 3);
        let rest = guest.run();
        Check::new(&mut Serial, format_args!("page fault by a {name} {when}"))
            .expect("result", exit, Exit::Reason(r::EXCEPTION_OR_NMI, linear + 8 * number))
            .expect("info", Hex(info), Hex(PAGE_FAULT))
            .expect("error", code, error)
            .expect("rest", rest, Exit::Done(done))
            .end();
    }
    let exit = guest.execute(call_through, FAR + 7 * PAGE);
    Check::new(&mut Serial, format_args!("page fault by a call {when}"))
        .expect("result", exit, Exit::Reason(r::EXCEPTION_OR_NMI, FAR + 7 * PAGE))
        .fact("error", vmx::read(f::EXIT_INTERRUPTION_ERROR))
        .end();
    // Read-only: present, write
    pages::set_entry(guest.cr3, FAR, page | 1);
    invalidate();
    let exit = guest.execute(write, FAR);
    Check::new(&mut Serial, format_args!("page fault on a read-only page {when}"))
        .expect("result", exit, Exit::Reason(r::EXCEPTION_OR_NMI, FAR))
        .expect("error", vmx::read(f::EXIT_INTERRUPTION_ERROR), 3)
        .end();
    // Mask and match: faults on pages that are there exit, others do not.
    vmx::write(f::PF_ERROR_MASK, 1);
    vmx::write(f::PF_ERROR_MATCH, 1);
    let present = guest.execute(write, FAR);
    vmx::write(f::PF_ERROR_MATCH, 0);
    let absent = guest.execute(write, FAR + 8 * PAGE);
    vmx::write(f::PF_ERROR_MASK, 0);
    Check::new(&mut Serial, format_args!("page faults by mask and match {when}"))
        .expect("present", present, Exit::Reason(r::EXCEPTION_OR_NMI, FAR))
        .expect("absent", absent, Exit::Reason(r::EXCEPTION_OR_NMI, FAR + 8 * PAGE))
        .end();
}

extern "C" fn catch_fault(address: u64) -> u64 {
    match trap::catch(|| read(address)) {
        Ok(_) => 0,
        Err(trap) => u64::from(trap.vector) << 56 | trap.address,
    }
}

/// Page faults that do not exit are the guest's: its handler sees CR2.
fn passed_on(guest: &mut Guest, when: &str) {
    vmx::write(f::EXCEPTION_BITMAP, 0);
    let result = guest.execute(catch_fault, FAR + 9 * PAGE + 0x123);
    vmx::write(f::EXCEPTION_BITMAP, 1 << trap::PF);
    let masked = vmx::read(f::PF_ERROR_MASK);
    vmx::write(f::PF_ERROR_MASK, 1);
    vmx::write(f::PF_ERROR_MATCH, 1);
    let by_match = guest.execute(catch_fault, FAR + 9 * PAGE + 0x456);
    vmx::write(f::PF_ERROR_MASK, masked);
    vmx::write(f::PF_ERROR_MATCH, 0);
    let seen = |offset| Exit::Done(u64::from(trap::PF) << 56 | (FAR + 9 * PAGE + offset));
    Check::new(&mut Serial, format_args!("page faults of the guest's own {when}"))
        .expect("bitmap_clear", result, seen(0x123))
        .expect("no_match", by_match, seen(0x456))
        .end();
}

/// Another CR3 is another address space, and back.
fn tables(guest: &mut Guest, when: &str) {
    vmx::write(f::EXCEPTION_BITMAP, 1 << trap::PF);
    let (a, b) = (pages::page(), pages::page());
    (a[0], b[0]) = (0xA, 0xB);
    let other = pages::identity_tables(pages::Access::Kernel);
    let linear = FAR + 16 * PAGE;
    pages::set_entry(guest.cr3, linear, pages::address(a) | 3);
    pages::set_entry(other, linear, pages::address(b) | 3);
    let mut seen = [Exit::Done(0); 4];
    for (slot, cr3) in seen.iter_mut().zip([guest.cr3, other, guest.cr3, other]) {
        vmx::write(f::GUEST_CR3, cr3);
        invalidate();
        *slot = guest.execute(read, linear);
    }
    vmx::write(f::GUEST_CR3, guest.cr3);
    invalidate();
    let [first, second, first_again, second_again] = seen;
    Check::new(&mut Serial, format_args!("address spaces {when}"))
        .expect("first", first, Exit::Done(0xA))
        .expect("second", second, Exit::Done(0xB))
        .expect("first_again", first_again, Exit::Done(0xA))
        .expect("second_again", second_again, Exit::Done(0xB))
        .end();
}
