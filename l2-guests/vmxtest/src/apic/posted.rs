//! Posted interrupts: the notification comes while the guest runs, while the hypervisor does, or is another's (SDM "Posted-
//! Interrupt Processing").

use super::{Apic, POSTED, offset};
use crate::{
    apic::interrupts::{End, IF, taking},
    guest::{Exit, Program, nothing},
    injection::noting,
};
use core::arch::asm;
use l2_kit::{
    Check, apic as local_apic, fields as f,
    protocol::Hex,
    serial::Serial,
    vmx::{self, reason as r},
};

/// The notification vector.
pub const NOTIFICATION: u8 = 0xF2;
const OTHER: u8 = 0xF3;
const VALID: u64 = 1 << 31;
/// Where the descriptor's outstanding-notification bit is.
const OUTSTANDING: u64 = 32;

/// The guest has the CPU's own APIC: it sends itself the interrupt.
extern "C" fn send(vector: u64) -> u64 {
    local_apic::send_self(vector as u8);
    for _ in 0..10 {
        // SAFETY: no effect.
        unsafe { asm!("nop") };
    }
    5
}

/// Sets requests and the outstanding notification.
pub fn post(apic: &Apic, vectors: &[u8]) {
    for byte in 0..64 {
        write_byte(apic, byte, 0);
    }
    for vector in vectors {
        let byte = u64::from(vector / 8);
        write_byte(apic, byte, read_byte(apic, byte) | 1 << (vector % 8));
    }
    write_byte(apic, OUTSTANDING, 1);
}

fn read_byte(apic: &Apic, byte: u64) -> u8 {
    // SAFETY: the descriptor is this part's.
    unsafe { ((apic.descriptor + byte) as *const u8).read_volatile() }
}

fn write_byte(apic: &Apic, byte: u64, value: u8) {
    // SAFETY: as above.
    unsafe { ((apic.descriptor + byte) as *mut u8).write_volatile(value) };
}

/// Whether nothing is left in the descriptor.
fn is_empty(apic: &Apic) -> bool {
    (0..64).all(|byte| read_byte(apic, byte) == 0)
}

/// Takes what is pending in our own IDT.
fn take_own() {
    // SAFETY: the handlers return.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

pub fn all(apic: &mut Apic) {
    if !apic.choose(&POSTED) {
        Check::new(&mut Serial, "posted interrupts").fact("offered", false).end();
        return;
    }
    in_guest(apic);
    before_entry(apic);
    in_hypervisor(apic);
    another(apic);
}

fn run(apic: &mut Apic, program: Program, argument: u64, rflags: u64) -> (Exit, u64) {
    apic.guest.start(program, argument);
    vmx::write(f::GUEST_RFLAGS, 2 | rflags);
    taking(End::None, || apic.guest.run())
}

/// Requested and serviced vector after the highest of some was delivered, or none.
fn status_after(vectors: &[u8], delivered: bool) -> u64 {
    let highest = vectors.iter().copied().max().unwrap_or(0);
    let next = vectors.iter().copied().filter(|v| *v != highest).max().unwrap_or(0);
    if delivered { u64::from(highest) << 8 | u64::from(next) } else { highest.into() }
}

const SETS: [&[u8]; 4] = [&[], &[0x41], &[0x41, 0x4F], &[0x41, 0x52, 0x61, 0xFE]];

/// The guest is interrupted by the notification: it sees what was posted.
fn in_guest(apic: &mut Apic) {
    for (number, set) in (0u64..).zip(SETS) {
        for (how, rflags, priority) in [("taken", IF, 0), ("off", 0, 0), ("masked", IF, 0xF0)] {
            let _ = apic.choose(&POSTED);
            post(apic, set);
            apic.set(offset::TPR, priority);
            let ((exit, taken), seen) = noting(NOTIFICATION, || run(apic, send, NOTIFICATION.into(), rflags));
            let delivered = how == "taken" && !set.is_empty();
            let wanted = if delivered { set.iter().copied().max().unwrap_or(0) } else { 0 };
            Check::new(&mut Serial, format_args!("posted set {number} while the guest runs, {how}"))
                .expect("result", exit, Exit::Done(5))
                .expect("taken", Hex(taken), Hex(wanted.into()))
                .expect("notifications_seen", seen.count, 0)
                .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(status_after(set, delivered)))
                .expect("descriptor_empty", is_empty(apic), true)
                .end();
        }
    }
}

/// The notification is pending at the entry.
fn before_entry(apic: &mut Apic) {
    for (number, set) in (0u64..).zip(SETS) {
        let _ = apic.choose(&POSTED);
        post(apic, set);
        local_apic::send_self(NOTIFICATION);
        let ((exit, taken), seen) = noting(NOTIFICATION, || run(apic, nothing, 5, IF));
        Check::new(&mut Serial, format_args!("posted set {number} before the entry"))
            .expect("result", exit, Exit::Done(5))
            .expect("taken", Hex(taken), Hex(set.iter().copied().max().unwrap_or(0).into()))
            .expect("notifications_seen", seen.count, 0)
            .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(status_after(set, !set.is_empty())))
            .expect("descriptor_empty", is_empty(apic), true)
            .end();
    }
}

/// While the hypervisor runs the notification is an interrupt like any other, and nothing is processed.
fn in_hypervisor(apic: &mut Apic) {
    let _ = apic.choose(&POSTED);
    post(apic, &[0x41]);
    let ((), seen) = noting(NOTIFICATION, || {
        local_apic::send_self(NOTIFICATION);
        take_own();
    });
    local_apic::eoi();
    let (kept, outstanding) = (read_byte(apic, 8), read_byte(apic, OUTSTANDING));
    // Sent again it is the guest's.
    local_apic::send_self(NOTIFICATION);
    let (exit, taken) = run(apic, nothing, 5, IF);
    Check::new(&mut Serial, "notification while the hypervisor runs")
        .expect("seen", seen.count, 1)
        .expect("kept", kept, 2)
        .expect("outstanding", outstanding, 1)
        .expect("result", exit, Exit::Done(5))
        .expect("taken", Hex(taken), Hex(0x41))
        .end();
}

/// Other interrupts exit, acknowledged.
fn another(apic: &mut Apic) {
    let _ = apic.choose(&POSTED);
    post(apic, &[0x41]);
    let (exit, taken) = run(apic, send, OTHER.into(), IF);
    let info = vmx::read(f::EXIT_INTERRUPTION_INFO);
    local_apic::eoi();
    let outstanding = read_byte(apic, OUTSTANDING);
    let (rest, later) = taking(End::None, || apic.guest.run());
    Check::new(&mut Serial, "interrupt that is no notification")
        .expect("result", exit, Exit::Reason(r::EXTERNAL_INTERRUPT, 0))
        .expect("info", Hex(info), Hex(VALID | u64::from(OTHER)))
        .expect("taken", Hex(taken), Hex(0))
        .expect("outstanding", outstanding, 1)
        .expect("rest", rest, Exit::Done(5))
        .expect("later", Hex(later), Hex(0))
        .end();
}
