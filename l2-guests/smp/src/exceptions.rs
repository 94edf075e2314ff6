//! Exceptions of a guest while interrupts take it out, time and again: each is delivered once, and its handler goes on where
//! an exit stopped it, were it before its first instruction.

use crate::{
    cpus,
    guest::{self, Exit, Guest},
    messages::{VECTOR, set_hooks},
};
use core::arch::asm;
use l2_kit::{
    apic, cpu, descriptors,
    setup::{Controls, exit_controls, pin},
    smp, trap,
    vmx::reason,
};

const EXCEPTIONS: u64 = 20_000;
/// Exits by interrupts that are enough to meet every place of the guest's loop.
const MANY: u64 = 200;
/// The word in which the hook counts.
const TAKEN: usize = 11;

/// One CPU after the other.
pub fn all(_ids: &[u32]) {
    set_hooks();
    trap::hook(
        trap::UD,
        Some(|frame| {
            smp::count(descriptors::index(), TAKEN);
            frame.rip += 2;
            true
        }),
    );
    (0..cpus()).for_each(|index| smp::run_on(index, interrupted));
    trap::hook(trap::UD, None);
    crate::print("exceptions of a guest that is interrupted", &["exit", "stack_moved", "taken", "often_interrupted"]);
}

fn interrupted(index: usize) {
    if cpu::cr4() & cpu::CR4_VMXE == 0 {
        guest::enter_vmx();
    }
    let exit = exit_controls::ACKNOWLEDGE;
    let guest = Guest::make(index, 0x300, Controls { pin: pin::EXTERNAL_INTERRUPT, exit, ..Default::default() });
    guest.start(raise, EXCEPTIONS, true);
    let mut interrupts = 0;
    let end = loop {
        // Sometimes too soon for the guest to do anything.
        apic::start_timer(VECTOR, 200 + (interrupts as u32 * 97) % 4000);
        match guest.run() {
            Exit::Reason(reason::EXTERNAL_INTERRUPT) => apic::eoi(),
            end => break end,
        }
        interrupts += 1;
    };
    apic::start_timer(VECTOR, 0);
    smp::note(index, 0, if let Exit::Done(_) = end { 0 } else { end.word() });
    smp::note(index, 1, end.word());
    smp::note(index, 2, smp::noted(index, TAKEN));
    smp::note(index, 3, u64::from(interrupts >= MANY));
}

/// The program: raises so many #UD, and returns by how much the stack is elsewhere afterwards.
extern "C" fn raise(count: u64) -> u64 {
    let (before, after): (u64, u64);
    // SAFETY: the hook skips UD2.
    unsafe {
        asm!(
            "mov {before}, rsp", "2:", "ud2", "dec {count}", "jnz 2b", "mov {after}, rsp",
            before = out(reg) before, after = out(reg) after, count = inout(reg) count => _,
        );
    }
    before - after
}
