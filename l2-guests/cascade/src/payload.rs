//! What the guest executes; the hypervisor executes the same loops itself, without VMX, for comparison.
//!
//! All of it runs in ring 0 of the same image with the same linear addresses, so both kinds of run are the same
//! instructions.

use crate::{
    calls::{self, call},
    events::{self, EVENTS, WARM_UP},
};
use core::{arch::asm, ptr::write_volatile};
use l2_kit::{
    Global, apic,
    cpu::{self, CR0_AM, CR4_TSD, CSTAR, LSTAR},
    pages::PAGE,
};

/// Raises that many events.
pub type Loop = fn(u64);

/// MSR that exits; it does nothing in 64-bit mode on these CPUs.
pub const MSR_INTERCEPTED: u32 = CSTAR;
/// MSR that does not; nobody here uses SYSCALL.
pub const MSR_PASSED: u32 = LSTAR;
/// Port that exits: a scratch register of the DMA page file.
pub const PORT_INTERCEPTED: u16 = 0x84;
/// Port that does not: the POST code port.
pub const PORT_PASSED: u16 = 0x80;
/// The interrupt that the guest sends itself.
pub const VECTOR: u8 = 0x51;

/// Interrupts that were taken, by whoever took them.
pub static INTERRUPTS: Global<u64> = Global::new(0);
/// The next page that the guest finds missing.
pub static HOLE: Global<u64> = Global::new(0);
/// How many pages a guest uses after each INVEPT.
const USED: u64 = 16;
/// The next page that is mapped and was never touched.
pub static FRESH: Global<u64> = Global::new(0);

/// Repeats one instruction.
macro_rules! repeat {
    ($count:ident, $($asm:tt)*) => {
        for _ in 0..$count {
            // SAFETY: the instruction and its exit leave everything that is not named as output as it was.
            unsafe { asm!($($asm)*, options(nostack)) };
        }
    };
}

pub fn nothing(_: u64) {}

pub fn cpuid(count: u64) {
    for _ in 0..count {
        cpu::cpuid(0, 0);
        // SAFETY: no instruction; keeps the loop from being thrown away.
        unsafe { asm!("", options(nostack)) };
    }
}

pub fn vmcall(count: u64) {
    for _ in 0..count {
        call(calls::NOTHING, 0, 0);
    }
}

pub fn rdmsr_intercepted(count: u64) {
    repeat!(count, "rdmsr", in("ecx") MSR_INTERCEPTED, out("eax") _, out("edx") _);
}

pub fn rdmsr_passed(count: u64) {
    repeat!(count, "rdmsr", in("ecx") MSR_PASSED, out("eax") _, out("edx") _);
}

pub fn wrmsr_intercepted(count: u64) {
    repeat!(count, "wrmsr", in("ecx") MSR_INTERCEPTED, in("eax") 0x1000, in("edx") 0);
}

pub fn wrmsr_passed(count: u64) {
    repeat!(count, "wrmsr", in("ecx") MSR_PASSED, in("eax") 0x1000, in("edx") 0);
}

pub fn in_intercepted(count: u64) {
    repeat!(count, "in al, dx", in("dx") PORT_INTERCEPTED, out("al") _);
}

pub fn in_passed(count: u64) {
    repeat!(count, "in al, dx", in("dx") PORT_PASSED, out("al") _);
}

pub fn out_intercepted(count: u64) {
    repeat!(count, "out dx, al", in("dx") PORT_INTERCEPTED, in("al") 0u8);
}

pub fn out_passed(count: u64) {
    repeat!(count, "out dx, al", in("dx") PORT_PASSED, in("al") 0u8);
}

pub fn rdtsc(count: u64) {
    repeat!(count, "rdtsc", out("eax") _, out("edx") _);
}

pub fn hlt(count: u64) {
    repeat!(count, "hlt");
}

pub fn mov_cr3(count: u64) {
    let cr3 = cpu::cr3();
    repeat!(count, "mov cr3, {}", in(reg) cr3);
}

/// Flips CR0.AM, which has no effect in ring 0.
pub fn mov_cr0(count: u64) {
    let mut cr0 = cpu::cr0();
    for _ in 0..count {
        cr0 ^= CR0_AM;
        cpu::set_cr0(cr0);
    }
}

/// Flips CR4.TSD, which has no effect in ring 0.
pub fn mov_cr4(count: u64) {
    let mut cr4 = cpu::cr4();
    for _ in 0..count {
        cr4 ^= CR4_TSD;
        cpu::set_cr4(cr4);
    }
}

/// Writes the task priority that lets every interrupt in.
pub fn mov_cr8(count: u64) {
    repeat!(count, "mov cr8, {}", in(reg) 0u64);
}

/// Length of the instruction in [`undefined`].
pub const UD2_LENGTH: u64 = 2;

pub fn undefined(count: u64) {
    repeat!(count, "ud2");
}

pub fn touch_hole(count: u64) {
    touch(&HOLE, count);
}

pub fn touch_fresh(count: u64) {
    touch(&FRESH, count);
}

/// Has its hypervisor execute INVEPT, and then uses pages that were touched before it.
pub fn invept(count: u64) {
    let mapped = FRESH.get() - PAGE;
    for _ in 0..count {
        call(calls::INVEPT, 0, 0);
        for page in 0..USED {
            // SAFETY: pages that `touch_fresh` wrote.
            unsafe { write_volatile((mapped - page * PAGE) as *mut u64, page) };
        }
    }
}

fn touch(next: &Global<u64>, count: u64) {
    for _ in 0..count {
        let page = next.get();
        // SAFETY: the page is set aside for this.
        unsafe { write_volatile(page as *mut u64, page) };
        next.set(page + PAGE);
    }
}

/// Sends itself an interrupt and waits until somebody took it.
pub fn interrupt(count: u64) {
    // SAFETY: the image has a handler, or the hypervisor takes all interrupts.
    unsafe { asm!("sti", options(nostack)) };
    for _ in 0..count {
        let before = INTERRUPTS.get();
        apic::send_self(VECTOR);
        while INTERRUPTS.get() == before {
            // The handler changes it behind the compiler's back.
            // SAFETY: no instruction but PAUSE.
            unsafe { asm!("pause", options(nostack)) };
        }
    }
    // SAFETY: back to how it was.
    unsafe { asm!("cli", options(nostack)) };
}

/// Writes XCR0 with the one bit that must be set.
pub fn xsetbv(count: u64) {
    repeat!(count, "xsetbv", in("ecx") 0, in("eax") 1, in("edx") 0);
}

pub fn invd(count: u64) {
    repeat!(count, "invd");
}

pub fn host_writes(count: u64) {
    for _ in 0..count {
        call(calls::HOST_WRITES, 0, 0);
    }
}

pub fn control_writes(count: u64) {
    for _ in 0..count {
        call(calls::CONTROL_WRITES, 0, 0);
    }
}

/// Each call is two switches: to the other guest and back.
pub fn take_turns(count: u64) {
    for _ in 0..count / 2 {
        call(calls::YIELD, 0, 0);
    }
}

/// The program of a guest that raises events.
pub extern "C" fn raise_events(greeting: &'static &'static str, who: u64) -> ! {
    call(calls::SAY, greeting.as_ptr() as u64, greeting.len() as u64);
    for (number, event) in (0u64..).zip(EVENTS).filter(|(n, e)| e.who as u64 == who && events::possible(*n)) {
        for turn in 0..events::brackets() {
            call(calls::PREPARE, number, turn as u64);
            (event.run)(WARM_UP);
            call(calls::BEGIN, number, 0);
            (event.run)(event.count());
            call(calls::END, number, 0);
        }
    }
    call(calls::DONE, 0, 0);
    unreachable!("the hypervisor does not come back to a guest that is done")
}

/// The program of the guest that the first one takes turns with.
pub extern "C" fn yield_for_ever(greeting: &'static &'static str, _: u64) -> ! {
    call(calls::SAY, greeting.as_ptr() as u64, greeting.len() as u64);
    loop {
        call(calls::YIELD, 0, 0);
    }
}
