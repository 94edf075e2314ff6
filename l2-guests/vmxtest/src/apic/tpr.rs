//! The TPR shadow: CR8, and exits below the threshold on each way to the task priority (SDM "Virtualizing CR8-Based TPR
//! Accesses", "TPR Virtualization").

use super::{Apic, DELIVERY, OPERAND, TPR, and, offset};
use crate::{
    guest::{Exit, Program, nothing},
    injection::noting,
};
use core::arch::asm;
use l2_kit::{
    Check, cpu, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, primary, secondary as s},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
const IF: u64 = 0x200;
const X2APIC_TPR: u32 = 0x808;

extern "C" fn read_cr8(_: u64) -> u64 {
    let value;
    // SAFETY: reading has no effect.
    unsafe { asm!("mov {}, cr8", out(reg) value) };
    value
}

extern "C" fn write_cr8(priority: u64) -> u64 {
    // SAFETY: the guest's task priority is virtual.
    unsafe { asm!("mov cr8, {}", in(reg) priority) };
    5
}

extern "C" fn write_memory(priority: u64) -> u64 {
    // SAFETY: the APIC-access page.
    unsafe { asm!("mov [{}], {:e}", in(reg) OPERAND.get(), in(reg) (priority << 4) as u32) };
    5
}

extern "C" fn write_msr(priority: u64) -> u64 {
    cpu::wrmsr(X2APIC_TPR, priority << 4);
    5
}

pub fn all(apic: &mut Apic) {
    if !apic.choose(&TPR) {
        Check::new(&mut Serial, "TPR shadow").fact("offered", false).end();
        return;
    }
    cr8(apic);
    thresholds(apic);
    after_injection(apic);
}

/// The low half of the register is not CR8's: it is not read, and written as 0.
fn cr8(apic: &mut Apic) {
    let (mut read, mut written) = (0u64, 0u64);
    for priority in 0..16u32 {
        apic.set(offset::TPR, 0xFFFF_FF0A | priority << 4);
        read |= u64::from(apic.guest.execute(read_cr8, 0) == Exit::Done(priority.into())) << priority;
        let exit = apic.guest.execute(write_cr8, priority.into());
        written |= u64::from(exit == Exit::Done(5) && apic.get(offset::TPR) & 0xFF == priority << 4) << priority;
    }
    Check::new(&mut Serial, "CR8 with TPR shadow")
        .expect("read", Hex(read), Hex(0xFFFF))
        .expect("written", Hex(written), Hex(0xFFFF))
        .end();
    for (name, control, program, qualification) in
        [("load", primary::CR8_LOAD, write_cr8 as Program, 0x8u64), ("store", primary::CR8_STORE, read_cr8, 0x18)]
    {
        let _ = apic.choose(&Controls { primary: TPR.primary | control, ..TPR });
        apic.threshold(0);
        apic.set(offset::TPR, 0xF0);
        let exit = apic.guest.execute(program, 1);
        let register = match exit {
            Exit::Reason(_, all) => all & 0xF00,
            _ => 0,
        };
        Check::new(&mut Serial, format_args!("CR8 {name} exits before the TPR shadow is asked"))
            .expect("result", exit, Exit::Reason(r::CR_ACCESS, qualification | register))
            .expect("priority", Hex(apic.get(offset::TPR).into()), Hex(0xF0))
            .end();
    }
}

/// For each way and threshold: the priorities that exit. The write is done then, and the guest after it.
fn thresholds(apic: &mut Apic) {
    OPERAND.set(apic.access + offset::TPR);
    for (way, mode, program) in [
        ("CR8", TPR, write_cr8 as Program),
        ("memory", and(TPR, s::APIC_ACCESSES), write_memory),
        ("MSR", and(TPR, s::X2APIC_MODE), write_msr),
        // The threshold means nothing then.
        ("CR8 with virtual interrupts", DELIVERY, write_cr8),
    ] {
        for threshold in 0..16u64 {
            let (mut below, mut strange) = (0u64, 0u64);
            for priority in 0..16u64 {
                if !apic.choose(&mode) {
                    continue;
                }
                apic.set(offset::TPR, 0xF0);
                apic.threshold(threshold);
                let exit = apic.guest.execute(program, priority);
                let kept = u64::from(apic.get(offset::TPR)) == priority << 4;
                match exit {
                    Exit::Done(5) if kept => {}
                    Exit::Reason(r::TPR_BELOW_THRESHOLD, 0) if kept => {
                        below |= 1 << priority;
                        // After the instruction, so it comes to its end.
                        apic.threshold(0);
                        strange += u64::from(apic.guest.run() != Exit::Done(5));
                    }
                    _ => strange += 1,
                }
            }
            let wanted = if mode.secondary & s::VIRTUAL_INTERRUPTS != 0 { 0 } else { (1 << threshold) - 1 };
            Check::new(&mut Serial, format_args!("TPR threshold {threshold} by {way}"))
                .expect("strange", strange, 0)
                .expect("below", Hex(below), Hex(wanted))
                .end();
        }
    }
}

/// An event is injected before the task priority is found too low.
fn after_injection(apic: &mut Apic) {
    let mut out = Serial;
    let check = Check::new(&mut out, "entry below TPR threshold with an event");
    if !apic.choose(&and(TPR, s::APIC_ACCESSES)) {
        check.fact("offered", false).end();
        return;
    }
    apic.threshold(5);
    apic.guest.start(nothing, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | 0x60);
    let (exit, early) = noting(0x60, || apic.guest.run());
    let moved = vmx::read(f::GUEST_RIP) != nothing as *const () as u64;
    apic.threshold(0);
    let (rest, seen) = noting(0x60, || apic.guest.run());
    check
        .expect("result", exit, Exit::Reason(r::TPR_BELOW_THRESHOLD, 0))
        .expect("in_handler", moved, true)
        .expect("taken_before", early.count, 0)
        .expect("rest", rest, Exit::Done(5))
        .expect("taken", seen.count, 1)
        .end();
}
