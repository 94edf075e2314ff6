//! Accesses to the APIC-access page: which are virtualized, which exit, before or after the access (SDM "Virtualizing Memory-
//! Mapped APIC Accesses").

use super::{Apic, MODES, OPERAND, TPR, and, mode, offset};
use crate::guest::{Exit, Program, nothing};
use core::arch::asm;
use l2_kit::{
    Check, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, pin, primary, secondary as s},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
const IF: u64 = 0x200;
/// What is written: reserved bits for the ICR, so that it is no self-IPI.
const VALUE: u32 = 0x1122_3344;

/// Registers that APIC-register virtualization lets the guest read.
const READABLE: [u64; 18] = [
    0x20, 0x30, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380,
    0x3E0,
];
/// ... and write.
const WRITABLE: [u64; 17] =
    [0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0];

extern "C" fn read(address: u64) -> u64 {
    let value: u32;
    // SAFETY: the page under test.
    unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) address) };
    value.into()
}

extern "C" fn write(address: u64) -> u64 {
    // SAFETY: the page under test.
    unsafe { asm!("mov [{}], {:e}", in(reg) address, in(reg) OPERAND.get() as u32) };
    5
}

extern "C" fn read_byte(address: u64) -> u64 {
    let value: u64;
    // SAFETY: the page under test.
    unsafe { asm!("movzx {:e}, byte ptr [{}]", out(reg) value, in(reg) address) };
    value
}

extern "C" fn write_byte(address: u64) -> u64 {
    // SAFETY: the page under test.
    unsafe { asm!("mov byte ptr [{}], 0x44", in(reg) address) };
    5
}

extern "C" fn read_word(address: u64) -> u64 {
    let value: u64;
    // SAFETY: the page under test.
    unsafe { asm!("movzx {:e}, word ptr [{}]", out(reg) value, in(reg) address) };
    value
}

extern "C" fn read_quad(address: u64) -> u64 {
    let value: u64;
    // SAFETY: the page under test.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address) };
    value
}

extern "C" fn write_quad(address: u64) -> u64 {
    // SAFETY: the page under test.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) OPERAND.get()) };
    5
}

/// One instruction that reads and writes.
extern "C" fn modify(address: u64) -> u64 {
    // SAFETY: the page under test.
    unsafe { asm!("or dword ptr [{}], 0x40", in(reg) address) };
    5
}

/// What a register holds before an access.
fn content(offset: u64) -> u32 {
    (offset as u32) << 8 | 0xA5
}

fn fill(apic: &Apic) {
    (0..0x400).step_by(16).for_each(|offset| apic.set(offset, content(offset)));
}

fn has(mode: &Controls, secondary: u32) -> bool {
    mode.secondary & secondary != 0
}

fn read_is_virtual(mode: &Controls, offset: u64) -> bool {
    let status = (0x100..0x280).contains(&offset);
    mode.primary & primary::TPR_SHADOW != 0
        && (offset == offset::TPR || has(mode, s::APIC_REGISTERS) && (status || READABLE.contains(&offset)))
}

fn write_is_virtual(mode: &Controls, offset: u64) -> bool {
    let delivery = has(mode, s::VIRTUAL_INTERRUPTS) && matches!(offset, offset::EOI | offset::ICR);
    mode.primary & primary::TPR_SHADOW != 0
        && (offset == offset::TPR || delivery || has(mode, s::APIC_REGISTERS) && WRITABLE.contains(&offset))
}

/// How a write ends, and what the register holds then.
fn written(mode: &Controls, offset: u64) -> (Exit, u32) {
    if !write_is_virtual(mode, offset) {
        // With virtual interrupts the entry computes the processor priority.
        let computed = offset == offset::PPR && has(mode, s::VIRTUAL_INTERRUPTS);
        let kept = if computed { content(offset::TPR) & 0xFF } else { content(offset) };
        return (Exit::Reason(r::APIC_ACCESS, 1 << 12 | offset), kept);
    }
    match offset {
        offset::TPR => (Exit::Done(5), VALUE & 0xFF),
        offset::ICR_HIGH => (Exit::Done(5), VALUE & 0xFF00_0000),
        offset::EOI if has(mode, s::VIRTUAL_INTERRUPTS) => (Exit::Done(5), 0),
        _ => (Exit::Reason(r::APIC_WRITE, offset), VALUE),
    }
}

pub fn all(apic: &mut Apic) {
    OPERAND.set(VALUE.into());
    for offset in (0..0x400).step_by(16) {
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("APIC register {offset:#x} read"));
        for (name, mode) in &MODES {
            if !apic.choose(&and(*mode, s::APIC_ACCESSES)) {
                continue;
            }
            fill(apic);
            let wanted = match read_is_virtual(mode, offset) {
                true => Exit::Done(content(offset).into()),
                false => Exit::Reason(r::APIC_ACCESS, offset),
            };
            check = check.expect(name, apic.guest.execute(read, apic.access + offset), wanted);
        }
        check.end();
        let mut check = Check::new(&mut out, format_args!("APIC register {offset:#x} written"));
        let (mut held, mut should) = ([0u32; MODES.len()], [0u32; MODES.len()]);
        for (((name, mode), held), should) in MODES.iter().zip(&mut held).zip(&mut should) {
            if !apic.choose(&and(*mode, s::APIC_ACCESSES)) {
                continue;
            }
            fill(apic);
            let (wanted, value) = written(mode, offset);
            check = check.expect(name, apic.guest.execute(write, apic.access + offset), wanted);
            (*held, *should) = (apic.get(offset), value);
        }
        check.expect("stored", held == should, true).fact("last", Hex(held[4].into())).end();
    }
    shapes(apic);
    delivery_through_it(apic);
}

/// The task priority alone, for a guest of another kind.
pub fn some(apic: &mut Apic) {
    OPERAND.set(VALUE.into());
    for (name, mode) in [("off", mode(0, 0)), ("tpr", TPR)] {
        // The guest's controls have no secondary word of their own.
        let mode = Controls { primary: mode.primary | primary::SECONDARY, ..and(mode, s::APIC_ACCESSES) };
        for (how, program, kind) in [("read", read as Program, 0u64), ("written", write, 1)] {
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("task priority {how}, {name}, without EPT"));
            if !apic.choose(&mode) {
                check.fact("offered", false).end();
                continue;
            }
            fill(apic);
            let exit = apic.guest.execute(program, apic.access + offset::TPR);
            let wanted = match (name, kind) {
                ("off", _) => Exit::Reason(r::APIC_ACCESS, kind << 12 | offset::TPR),
                (_, 0) => Exit::Done(content(offset::TPR).into()),
                _ => Exit::Done(5),
            };
            check.expect("result", exit, wanted).fact("priority", Hex(apic.get(offset::TPR).into())).end();
        }
    }
}

/// Accesses of other sizes, and across registers.
fn shapes(apic: &mut Apic) {
    let registers = and(super::REGISTERS, s::APIC_ACCESSES);
    let exit = |kind: u64, offset: u64| Exit::Reason(r::APIC_ACCESS, kind << 12 | offset);
    let tpr = u64::from(content(offset::TPR));
    let cases: [(&str, Program, u64, Exit); 13] = [
        ("byte read", read_byte, 0x80, Exit::Done(tpr & 0xFF)),
        ("second byte read", read_byte, 0x81, Exit::Done(tpr >> 8 & 0xFF)),
        ("last byte read", read_byte, 0x83, Exit::Done(0)),
        ("byte behind read", read_byte, 0x84, exit(0, 0x84)),
        ("byte written", write_byte, 0x80, Exit::Done(5)),
        ("word read", read_word, 0x82, Exit::Done(0)),
        ("word read across the end", read_word, 0x83, exit(0, 0x83)),
        ("read across the end", read, 0x82, exit(0, 0x82)),
        ("written across the end", write, 0x7E, exit(1, 0x7E)),
        ("quadword read", read_quad, 0x80, exit(0, 0x80)),
        ("quadword written", write_quad, 0x80, exit(1, 0x80)),
        ("read beyond the registers", read, 0x480, exit(0, 0x480)),
        ("or", modify, 0x80, Exit::Done(5)),
    ];
    for (name, program, offset, wanted) in cases {
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("task priority, {name}"));
        if !apic.choose(&registers) {
            check.fact("offered", false).end();
            continue;
        }
        fill(apic);
        let exit = apic.guest.execute(program, apic.access + offset);
        check.expect("result", exit, wanted).fact("priority", Hex(apic.get(offset::TPR).into())).end();
    }
}

/// The guest's stack is in the APIC-access page when an interrupt comes.
fn delivery_through_it(apic: &mut Apic) {
    let mut out = Serial;
    let check = Check::new(&mut out, "event delivery to the APIC-access page");
    if !apic.choose(&Controls { pin: pin::EXTERNAL_INTERRUPT, ..and(TPR, s::APIC_ACCESSES) }) {
        check.fact("offered", false).end();
        return;
    }
    apic.guest.start(nothing, 5);
    vmx::write(f::GUEST_RSP, apic.access + 0x100);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | 0x60);
    let exit = apic.guest.run();
    check
        .expect("result", exit, Exit::Reason(r::APIC_ACCESS, 3 << 12 | 0xF8))
        .expect("vectoring", Hex(vmx::read(f::IDT_VECTORING_INFO) & !(1 << 12)), Hex(VALID | 0x60))
        .end();
}
