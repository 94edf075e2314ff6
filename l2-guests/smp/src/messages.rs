//! Interrupts and NMIs between CPUs, without guests.

use crate::cpus;
use core::arch::asm;
use l2_kit::{apic, descriptors, smp, trap};

/// The vector of interrupts between CPUs.
pub const VECTOR: u8 = 0x50;
/// The words in which hooks count.
pub const INTERRUPTS: usize = 14;
/// As [`INTERRUPTS`]
pub const NMIS: usize = 15;
const ROUNDS: u64 = 20;

/// Hooks that count what arrives, by CPU.
pub fn set_hooks() {
    trap::hook(
        VECTOR,
        Some(|_| {
            smp::count(descriptors::index(), INTERRUPTS);
            apic::eoi();
            true
        }),
    );
    trap::hook(
        trap::NMI,
        Some(|_| {
            smp::count(descriptors::index(), NMIS);
            true
        }),
    );
}

/// Sleeps until an interrupt has been taken.
pub fn sleep() {
    // SAFETY: the hook returns to the instruction after HLT.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// A token goes round: each CPU sleeps until the one before it wakes it.
pub fn all(ids: &[u32]) {
    set_hooks();
    for index in 1..cpus() {
        smp::give(index, |index| {
            smp::note(index, 1, 1);
            for round in 1..=ROUNDS {
                while smp::noted(index, INTERRUPTS) < round {
                    sleep();
                }
                smp::note(index, 0, round);
            }
        });
        smp::wait_for_note(index, 1);
    }
    for round in 1..=ROUNDS {
        for (index, id) in ids.iter().enumerate().skip(1) {
            apic::send(*id, apic::message::interrupt(VECTOR));
            smp::until(10_000_000, || smp::noted(index, 0) >= round);
        }
    }
    (1..cpus()).for_each(smp::wait);
    for index in 1..cpus() {
        smp::note(index, 1, smp::noted(index, INTERRUPTS));
    }
    crate::print("interrupts that wake CPUs", &["rounds", "interrupts"]);

    for (index, id) in ids.iter().enumerate().skip(1) {
        smp::give(index, |index| {
            smp::note(index, 0, 1);
            let came = smp::until(50_000_000, || smp::noted(index, NMIS) == 3);
            smp::note(index, 1, u64::from(came));
        });
        smp::wait_for_note(index, 0);
        for sent in 1..=3 {
            apic::send(*id, apic::message::NMI);
            smp::until(10_000_000, || smp::noted(index, NMIS) >= sent);
        }
        smp::wait(index);
    }
    crate::print("NMIs from another CPU", &["ready", "three_came"]);
}
