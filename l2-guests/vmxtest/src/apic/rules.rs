//! Which combinations of controls an entry accepts (SDM "VM-Execution Control Fields" of the chapter "VM Entries").

use super::{Apic, DELIVERY, POSTED, TPR, and, mode, offered};
use crate::{
    guest::{Exit, nothing},
    vmxon::too_wide,
};
use l2_kit::{
    Check, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, exit_controls, pin, primary, secondary as s},
    vmx::{self, Outcome},
};

const REFUSED: Exit = Exit::Refused(Outcome::FailValid(7));
const DONE: Exit = Exit::Done(5);

/// The controls that the rules connect.
const BITS: [Controls; 8] = [
    mode(primary::TPR_SHADOW, 0),
    mode(0, s::APIC_ACCESSES),
    mode(0, s::X2APIC_MODE),
    mode(0, s::APIC_REGISTERS),
    mode(0, s::VIRTUAL_INTERRUPTS),
    Controls { pin: pin::EXTERNAL_INTERRUPT, ..mode(0, 0) },
    Controls { pin: pin::POSTED_INTERRUPTS, ..mode(0, 0) },
    Controls { exit: exit_controls::ACKNOWLEDGE, ..mode(0, 0) },
];

pub fn all(apic: &mut Apic) {
    combinations(apic);
    addresses(apic);
    threshold(apic);
}

/// Whether the SDM allows this choice of [`BITS`].
fn valid(choice: u32) -> bool {
    let [tpr, accesses, x2apic, registers, delivery, exiting, posted, acknowledge] =
        core::array::from_fn(|i| choice >> i & 1 != 0);
    (tpr || !(x2apic || registers || delivery))
        && !(accesses && x2apic)
        && (!delivery || exiting)
        && (!posted || delivery && acknowledge)
}

/// Each combination, eight to a record.
fn combinations(apic: &mut Apic) {
    for row in 0..32u32 {
        let (mut accepted, mut wanted, mut missing) = (0u64, 0u64, 0u64);
        for column in 0..8 {
            let choice = row * 8 + column;
            let bits = BITS.iter().enumerate().filter(|(i, _)| choice >> i & 1 != 0);
            let controls = bits.fold(mode(0, 0), |all, (_, bit)| Controls {
                pin: all.pin | bit.pin,
                primary: all.primary | bit.primary,
                secondary: all.secondary | bit.secondary,
                exit: all.exit | bit.exit,
                entry: 0,
            });
            if !apic.choose(&controls) {
                missing |= 1 << column;
                continue;
            }
            wanted |= u64::from(valid(choice)) << column;
            match apic.guest.execute(nothing, 5) {
                DONE => accepted |= 1 << column,
                REFUSED => {}
                other => Check::new(&mut Serial, "APIC controls").expect("result", other, DONE).end(),
            }
        }
        Check::new(&mut Serial, format_args!("APIC controls {:#x} and up", row * 8))
            .fact("missing", Hex(missing))
            .expect("accepted", Hex(accepted), Hex(wanted))
            .end();
    }
}

/// Tries to enter with one field changed.
fn attempt(apic: &mut Apic, mode: &Controls, field: u32, value: u64) -> Exit {
    if !apic.choose(mode) {
        return Exit::Done(0);
    }
    let old = vmx::read(field);
    vmx::write(field, value);
    let exit = apic.guest.execute(nothing, 5);
    vmx::write(field, old);
    exit
}

/// Each bit of a field that must be 0.
fn addresses(apic: &mut Apic) {
    let access = mode(0, s::APIC_ACCESSES);
    let wide = too_wide().trailing_zeros();
    let (page, descriptor) = (apic.page, apic.descriptor);
    for (name, mode, field, good, low) in [
        ("virtual-APIC address", TPR, f::VIRTUAL_APIC, page, 12),
        ("APIC-access address", access, f::APIC_ACCESS, apic.access, 12),
        ("posted-interrupt descriptor", POSTED, f::POSTED_INT_DESCRIPTOR, descriptor & !0xFFF, 6),
    ] {
        if !offered(&mode) {
            Check::new(&mut Serial, name).fact("offered", false).end();
            continue;
        }
        let (mut refused, mut wanted) = (0u64, 0u64);
        for bit in (0..12).chain(wide..64) {
            wanted |= u64::from(bit < low || bit >= wide) << bit;
            let exit = attempt(apic, &mode, field, good | 1 << bit);
            refused |= u64::from(exit == REFUSED) << bit;
        }
        Check::new(&mut Serial, name).expect("refused_bits", Hex(refused), Hex(wanted)).end();
        // Unused, it may be anything.
        let exit = attempt(apic, &super::NOTHING, field, u64::MAX);
        Check::new(&mut Serial, format_args!("{name} that nothing uses")).expect("result", exit, DONE).end();
    }
    if offered(&POSTED) {
        let refused = (0..16u64).filter(|bit| attempt(apic, &POSTED, f::POSTED_INT_VECTOR, 1 << bit) == REFUSED);
        let refused = refused.fold(0, |all, bit| all | 1 << bit);
        Check::new(&mut Serial, "notification vector").expect("refused_bits", Hex(refused), Hex(0xFF00)).end();
    }
    if offered(&TPR) {
        // With accesses virtualized only the reserved bits are an error; the rest makes the guest exit.
        let refused =
            (0..32u64).filter(|bit| attempt(apic, &and(TPR, s::APIC_ACCESSES), f::TPR_THRESHOLD, 1 << bit) == REFUSED);
        let refused = refused.fold(0, |all, bit| all | 1 << bit);
        Check::new(&mut Serial, "TPR threshold").expect("refused_bits", Hex(refused), Hex(0xFFFF_FFF0)).end();
    }
    if offered(&DELIVERY) {
        let exit = attempt(apic, &DELIVERY, f::TPR_THRESHOLD, 0xFFFF_FFFF);
        Check::new(&mut Serial, "TPR threshold with virtual interrupts").expect("result", exit, DONE).end();
    }
    // No memory there: reads are all ones.
    let nowhere = 1 << (wide - 1);
    let exit = attempt(apic, &TPR, f::VIRTUAL_APIC, nowhere);
    Check::new(&mut Serial, "virtual-APIC page without memory").expect("result", exit, DONE).end();
}

/// A task priority below the threshold is refused, or with virtualized accesses exits at once.
fn threshold(apic: &mut Apic) {
    for (name, mode, wanted) in [
        ("refused", TPR, REFUSED),
        ("exits", and(TPR, s::APIC_ACCESSES), Exit::Reason(vmx::reason::TPR_BELOW_THRESHOLD, 0)),
    ] {
        for threshold in 0..16u64 {
            let (mut below, mut strange) = (0u64, 0u64);
            for priority in 0..16u32 {
                if !apic.choose(&mode) {
                    continue;
                }
                apic.set(super::offset::TPR, priority << 4 | 0xF);
                apic.threshold(threshold);
                match apic.guest.execute(nothing, 5) {
                    DONE => {}
                    exit if exit == wanted && vmx::read(f::GUEST_RIP) == nothing as *const () as u64 => {
                        below |= 1 << priority;
                    }
                    _ => strange += 1,
                }
            }
            Check::new(&mut Serial, format_args!("entry below TPR threshold {threshold} {name}"))
                .expect("strange", strange, 0)
                .expect("below", Hex(below), Hex((1 << threshold) - 1))
                .end();
        }
    }
}
