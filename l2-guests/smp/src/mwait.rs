//! A CPU that waits by MONITOR and MWAIT, and another that wakes it by a write: how an idle CPU waits where it may.
//!
//! The one that writes has the page at another linear address: the processor watches a physical one.

use crate::{
    cpus,
    messages::{self, INTERRUPTS},
};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use l2_kit::{
    apic, cpu,
    pages::{self, Access},
    smp,
};

/// CPUID.01H:ECX bit 3
const HAS_MONITOR: u32 = 1 << 3;
const ROUNDS: u64 = 10;
/// Turns of a loop after which a write did not wake.
const SOON: u32 = 100_000;
/// Where the CPU that writes has the page with the lines.
const ALIAS: u64 = 0x3F00_0000;
/// Bytes of a line that is watched.
const LINE: u64 = 64;

/// The page that holds the watched lines, one for each round.
static PAGE: AtomicU64 = AtomicU64::new(0);

/// The word that is watched in a round, in the page at `page`.
fn word(page: u64, round: u64) -> &'static AtomicU64 {
    // SAFETY: the page is one of the pool's, which nobody else has, at one of its two linear addresses.
    unsafe { &*((page + round * LINE) as *const AtomicU64) }
}

/// Each CPU but the first waits a few times, and the first wakes it.
pub fn all(ids: &[u32]) {
    let offered = u64::from(cpu::cpuid(1, 0)[2] & HAS_MONITOR != 0);
    for index in (1..cpus()).filter(|_| offered != 0) {
        wake(index, ids[index]);
    }
    smp::note(0, 4, offered);
    crate::print("a write wakes a CPU in MWAIT", &["began", "ended", "woken_by_write", "interrupts", "offered"]);
}

fn wake(index: usize, apic_id: u32) {
    messages::set_hooks();
    let page = pages::address(pages::page());
    PAGE.store(page, Ordering::SeqCst);
    let (before, root) = (cpu::cr3(), pages::identity_tables(Access::Kernel));
    pages::set_entry(root, ALIAS, page | 3);
    cpu::set_cr3(root);
    // A translation to write by is there before the other CPU begins to watch.
    word(ALIAS, 0).store(1, Ordering::SeqCst);
    smp::give(index, wait_for_all);
    let mut by_write = 0;
    for round in 1..=ROUNDS {
        smp::until(SOON, || smp::noted(index, 0) == round);
        smp::pause(1000);
        word(ALIAS, round).store(1, Ordering::SeqCst);
        if smp::until(SOON, || smp::noted(index, 1) == round) {
            by_write += 1;
        } else {
            apic::send(apic_id, apic::message::interrupt(messages::VECTOR));
        }
    }
    smp::wait(index);
    cpu::set_cr3(before);
    smp::note(index, 2, by_write);
    smp::note(index, 3, smp::noted(index, INTERRUPTS));
}

/// Leaves the round in which it waits, and the last from which it came back.
fn wait_for_all(index: usize) {
    let page = PAGE.load(Ordering::SeqCst);
    for round in 1..=ROUNDS {
        let word = word(page, round);
        smp::note(index, 0, round);
        while word.load(Ordering::SeqCst) == 0 {
            wait(word);
        }
        smp::note(index, 1, round);
    }
}

/// Waits until something is written to the line of `word`, if it is 0, or until an interrupt has been taken.
fn wait(word: &AtomicU64) {
    // SAFETY: MONITOR and CMP read a word that is there; an interrupt's hook returns to the instruction after MWAIT.
    unsafe {
        asm!(
            "monitor",
            "cmp qword ptr [rax], 0",
            "jne 2f",
            "xor eax, eax",
            "sti",
            "mwait",
            "cli",
            "2:",
            inout("rax") word.as_ptr() => _, in("rcx") 0, in("rdx") 0, options(nostack)
        );
    }
}
