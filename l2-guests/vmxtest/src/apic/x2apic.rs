//! RDMSR and WRMSR of the x2APIC's registers (SDM "Virtualizing MSR-Based APIC Accesses"). The CPU's own APIC is in xAPIC
//! mode, where these MSRs do not exist, so what is not virtualized is #GP.

use super::{Apic, DELIVERY, MODES, OPERAND, TPR, and, offset};
use crate::guest::Exit;
use l2_kit::{
    Check, cpu, fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{primary, secondary as s},
    vmx::{self, reason as r},
};

/// What a program returns after #GP.
const FAULT: u64 = 0x4750;
const FIRST: u32 = 0x800;
const LOW: u64 = 0xFFFF_FFFF;

extern "C" fn read(msr: u64) -> u64 {
    cpu::try_rdmsr(msr as u32).unwrap_or(FAULT)
}

extern "C" fn write(msr: u64) -> u64 {
    match cpu::try_wrmsr(msr as u32, OPERAND.get()) {
        Ok(()) => 5,
        Err(_) => FAULT,
    }
}

fn at(msr: u32) -> u64 {
    u64::from(msr - FIRST) << 4
}

/// Both halves that an MSR stands for.
fn content(msr: u32) -> u64 {
    u64::from(msr) << 40 | u64::from(msr) << 4 | 0xA
}

fn fill(apic: &Apic) {
    for msr in FIRST..=0x8FF {
        apic.set(at(msr), content(msr) as u32);
        apic.set(at(msr) + 4, (content(msr) >> 32) as u32);
    }
}

pub fn all(apic: &mut Apic) {
    if cpu::rdmsr(0x1B) & 1 << 10 != 0 {
        Check::new(&mut Serial, "x2APIC").fact("in_x2apic_mode", true).end();
        return;
    }
    reads(apic);
    writes(apic);
    intercepted(apic);
}

fn reads(apic: &mut Apic) {
    for msr in (FIRST..=0x840).chain([0x87F, 0x8FF]) {
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("x2APIC MSR {msr:#x} read"));
        for (name, mode) in &MODES {
            let on = mode.primary & primary::TPR_SHADOW != 0;
            if !apic.choose(&and(*mode, if on { s::X2APIC_MODE } else { 0 })) {
                continue;
            }
            fill(apic);
            let is_virtual = on && (msr == 0x808 || mode.secondary & s::APIC_REGISTERS != 0);
            // With virtual interrupts the entry computes the processor priority.
            let computed = msr == 0x80A && mode.secondary & s::VIRTUAL_INTERRUPTS != 0;
            let virtual_value = if computed { content(msr) & !LOW | content(0x808) & 0xFF } else { content(msr) };
            let wanted = if is_virtual { virtual_value } else { FAULT };
            check = check.expect(name, apic.guest.execute(read, msr.into()), Exit::Done(wanted));
        }
        check.end();
    }
}

fn writes(apic: &mut Apic) {
    let fault = Exit::Done(FAULT);
    let done = Exit::Done(5);
    let ipi = Exit::Reason(r::APIC_WRITE, offset::SELF_IPI);
    // MSR, value, and what it comes to with the TPR shadow alone and with virtual-interrupt delivery.
    let cases: [(&str, u32, u64, Exit, Exit); 15] = [
        ("TPR", 0x808, 0x55, done, done),
        ("TPR 0", 0x808, 0, done, done),
        ("TPR with bit 8", 0x808, 0x100, fault, fault),
        ("TPR with bit 32", 0x808, 1 << 32, fault, fault),
        ("EOI", 0x80B, 0, fault, done),
        ("EOI with a value", 0x80B, 1, fault, fault),
        ("EOI with bit 63", 0x80B, 1 << 63, fault, fault),
        ("self-IPI", 0x83F, 0x61, fault, done),
        ("self-IPI of vector 16", 0x83F, 0x10, fault, done),
        ("self-IPI of vector 15", 0x83F, 0x0F, fault, ipi),
        ("self-IPI with bit 8", 0x83F, 0x161, fault, fault),
        ("ICR", 0x830, 0x4_4061, fault, fault),
        ("SVR", 0x80F, 0x1FF, fault, fault),
        ("ID", 0x802, 0, fault, fault),
        ("a register that does not exist", 0x8FF, 0, fault, fault),
    ];
    for (name, msr, value, tpr, delivery) in cases {
        OPERAND.set(value);
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("x2APIC {name} written"));
        for (key, mode) in &MODES {
            let on = mode.primary & primary::TPR_SHADOW != 0;
            if !apic.choose(&and(*mode, if on { s::X2APIC_MODE } else { 0 })) {
                continue;
            }
            fill(apic);
            let wanted = match on {
                false => fault,
                true if mode.secondary & s::VIRTUAL_INTERRUPTS != 0 => delivery,
                true => tpr,
            };
            check = check.expect(key, apic.guest.execute(write, msr.into()), wanted);
        }
        check.fact("priority", Hex(apic.get(offset::TPR).into())).fact("status", Hex(status())).end();
    }
}

fn status() -> u64 {
    if super::offered(&DELIVERY) { vmx::read(f::GUEST_INTERRUPT_STATUS) } else { 0 }
}

/// The MSR bitmap is asked first.
fn intercepted(apic: &mut Apic) {
    let own = vmx::read(f::MSR_BITMAP);
    let page = pages::page();
    // Reads of low MSRs are the first 8192 bits, writes are at 2048 bytes.
    for bit in [0x808usize, 0x4000 + 0x808] {
        page[bit / 64] |= 1 << (bit % 64);
    }
    let bitmap = pages::address(page);
    for (name, mode) in [("TPR shadow", TPR), ("virtual interrupts", DELIVERY)] {
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("x2APIC TPR intercepted, {name}"));
        if !apic.choose(&and(mode, s::X2APIC_MODE)) {
            check.fact("offered", false).end();
            continue;
        }
        vmx::write(f::MSR_BITMAP, bitmap);
        OPERAND.set(0);
        let (reading, writing) = (apic.guest.execute(read, 0x808), apic.guest.execute(write, 0x808));
        // No bitmap: everything exits.
        let with = vmx::read(f::PRIMARY_CONTROLS);
        vmx::write(f::PRIMARY_CONTROLS, with & !u64::from(primary::MSR_BITMAPS));
        let without = apic.guest.execute(write, 0x80B);
        vmx::write(f::MSR_BITMAP, own);
        check
            .expect("read", reading, Exit::Reason(r::RDMSR, 0))
            .expect("written", writing, Exit::Reason(r::WRMSR, 0))
            .expect("without_bitmap", without, Exit::Reason(r::WRMSR, 0))
            .end();
    }
}
