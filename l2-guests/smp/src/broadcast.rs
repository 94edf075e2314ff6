//! Messages to all other CPUs at once: INIT and start-up, and, where the CPU has the activity state, a start-up message for
//! guests that wait for one.

use crate::{cpus, guest, messages};
use l2_kit::{Check, apic, caps, cpu, fields as f, serial::Serial, setup::Controls, smp, vmx};

/// All other CPUs, as destination shorthand.
const OTHERS: u32 = 3 << 18;
/// Where CPUs begin here: conventional memory that nothing of ours uses.
const PAGE: u64 = 0x6_0000;
const COUNT_AT: u64 = PAGE + 0x100;
/// lock inc word cs:[100h]; cli; hlt; back to the hlt
const CODE: [u8; 11] = [0xF0, 0x2E, 0xFF, 0x06, 0x00, 0x01, 0xFA, 0xF4, 0xEB, 0xFD, 0x90];
const WAITS_FOR_SIPI: u64 = 3;
/// Basic exit reason
const STARTED: u64 = 4;
const MISC: u32 = 0x485;
/// What the message says
const VECTOR: u8 = 0x42;

pub fn all(ids: &[u32]) {
    leave_vmx();
    // SAFETY: see `PAGE`.
    unsafe {
        core::ptr::copy_nonoverlapping(CODE.as_ptr(), PAGE as *mut u8, CODE.len());
        (COUNT_AT as *mut u16).write_volatile(0);
    }
    apic::send(0, apic::message::INIT | OTHERS);
    smp::pause(10_000);
    apic::send(0, apic::message::startup((PAGE >> 12) as u8) | OTHERS);
    // SAFETY: see `PAGE`.
    let came = || usize::from(unsafe { (COUNT_AT as *const u16).read_volatile() });
    smp::until(1_000_000, || came() == cpus() - 1);
    let came = came();
    let back = ids.iter().enumerate().skip(1).filter(|(index, id)| smp::start(*index, **id)).count();
    Check::new(&mut Serial, "start-up for all at once")
        .expect("came", came, cpus() - 1)
        .expect("back", back, cpus() - 1)
        .end();
    if caps::own_or_0(MISC) & 1 << 8 != 0 {
        guests_that_wait(ids, "a start-up message to all guests that wait for one", true);
        guests_that_wait(ids, "a start-up message to each guest that waits for one", false);
    }
}

fn leave_vmx() {
    smp::run_on_all(cpus(), |_| {
        if cpu::cr4() & cpu::CR4_VMXE != 0 {
            vmx::vmxoff();
            cpu::set_cr4(cpu::cr4() & !cpu::CR4_VMXE);
        }
    });
}

/// Each guest exits for the message, and for no INIT, NMI or interrupt before it.
fn guests_that_wait(ids: &[u32], name: &str, broadcast: bool) {
    messages::set_hooks();
    for (index, id) in ids.iter().enumerate().skip(1) {
        smp::give(index, |index| {
            guest::enter_vmx();
            let guest = guest::Guest::make(index, index as u64, Controls::default());
            guest.start(guest::read_memory, PAGE, false);
            vmx::write(f::GUEST_ACTIVITY, WAITS_FOR_SIPI);
            smp::note(index, 0, 1);
            guest.run();
            smp::note(index, 1, vmx::read(f::EXIT_REASON));
            smp::note(index, 2, vmx::read(f::EXIT_QUALIFICATION));
            smp::note(index, 3, vmx::read(f::GUEST_ACTIVITY));
        });
        smp::wait_for_note(index, 0);
        smp::pause(100_000);
        apic::send(*id, apic::message::NMI);
    }
    smp::pause(100_000);
    let early = (1..cpus()).filter(|index| smp::noted(*index, 1) != 0).count();
    if broadcast {
        apic::send(0, apic::message::startup(VECTOR) | OTHERS);
    }
    for (index, id) in ids.iter().enumerate().skip(1) {
        if !broadcast {
            apic::send(*id, apic::message::startup(VECTOR));
        }
        smp::until(1_000_000, || smp::noted(index, 1) != 0);
    }
    let came = |word, value| (1..cpus()).filter(|index| smp::noted(*index, word) == value).count();
    let others = cpus() - 1;
    Check::new(&mut Serial, name)
        .expect("early", early, 0)
        .expect("reasons", came(1, STARTED), others)
        .expect("vectors", came(2, VECTOR.into()), others)
        .expect("still_waiting", came(3, WAITS_FOR_SIPI), others)
        .end();
    smp::clear_notes();
    leave_vmx();
}
