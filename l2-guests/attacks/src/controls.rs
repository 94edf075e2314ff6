//! Every bit of every control against what is offered, and every field of a VMCS over values at the edges.

use crate::{
    guest::{self, Exit, Extra},
    lab::{Lab, Seen, Told},
};
use l2_kit::{
    caps, fields as f,
    setup::{Kind, pin},
    vmx,
};

/// A guest with these exits at once, before it has executed anything.
const STOPPED: Extra = Extra { pin: pin::PREEMPTION_TIMER, primary: 0, secondary: 0, exit: 0, entry: 0 };

pub fn all(lab: &mut Lab) {
    for kind in [Kind::Pin, Kind::Primary, Kind::Secondary, Kind::Exit, Kind::Entry] {
        lab.attack(format_args!("{kind:?} controls bit by bit"), Told::Answered, |lab| {
            let allowed = kind.allowed_by(caps::own_or_0);
            let mut escaped = false;
            for bit in 0..32 {
                escaped |= flip(lab, kind, 1 << bit, allowed);
            }
            Seen::of("all").escaped_if(escaped)
        });
        lab.attack(format_args!("{kind:?} controls at random"), Told::Answered, |lab| {
            let allowed = kind.allowed_by(caps::own_or_0);
            let mut escaped = false;
            for _ in 0..24 {
                let bits = 1 << lab.random.below(32) | 1 << lab.random.below(32) | 1 << lab.random.below(32);
                escaped |= flip(lab, kind, bits, allowed);
            }
            Seen::of("all").escaped_if(escaped)
        });
    }
    for (name, field) in f::ALL {
        lab.attack(format_args!("field {name}"), Told::Answered, |lab| one_field(lab, *field));
    }
}

/// Enters with bits of a control flipped; true if the entry was not refused although it uses what is not offered.
fn flip(lab: &mut Lab, kind: Kind, bits: u32, allowed: u64) -> bool {
    lab.with(STOPPED);
    let before = vmx::read(kind.field()) as u32;
    // Else these fields hold address 0, and the memory there would be used.
    let page = lab.pages[1];
    for field in [
        f::IO_BITMAP_A,
        f::IO_BITMAP_B,
        f::VIRTUAL_APIC,
        f::APIC_ACCESS,
        f::POSTED_INT_DESCRIPTOR,
        f::PML_ADDR,
        f::EPTP_LIST,
        f::VMREAD_BITMAP,
        f::VMWRITE_BITMAP,
        f::VE_INFORMATION,
    ] {
        let _ = vmx::try_write(field.into(), page);
    }
    let value = before ^ bits;
    vmx::write(kind.field(), value.into());
    vmx::write(f::PREEMPTION_TIMER, 0);
    vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    let exit = lab.execute(guest::nothing, 1);
    if exit == Exit::Reason(vmx::reason::EXTERNAL_INTERRUPT) {
        l2_kit::apic::eoi();
    }
    // A secondary control counts only when they are activated.
    let active = kind != Kind::Secondary || vmx::read(f::PRIMARY_CONTROLS) >> 31 & 1 != 0;
    let offered = value & !((allowed >> 32) as u32) == 0 && !value & allowed as u32 == 0;
    !offered && active && !matches!(exit, Exit::Refused(_))
}

/// Fields whose values take effect in this image, or end its machine by a VMX abort.
const LEFT_ALONE: [u32; 6] = [
    f::EXIT_MSR_STORE_COUNT,
    f::EXIT_MSR_LOAD_COUNT,
    f::EXIT_CONTROLS,
    // What these name is written, whatever it is.
    f::PML_ADDR,
    f::VE_INFORMATION,
    f::EXIT_MSR_STORE_ADDR,
];

/// Values at the edges of a field, each entered with, unless it is the host's.
fn one_field(lab: &mut Lab, field: u32) -> Seen {
    let mut wrong = false;
    let is_host = field & 0x0C00 == 0x0C00;
    for choice in 0..10 {
        lab.with(STOPPED);
        vmx::write(f::PREEMPTION_TIMER, 0);
        vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
        lab.guest.start(guest::nothing, 1);
        let before = vmx::try_read(field.into());
        let value = match choice {
            0 => 0,
            1 => 1,
            2 => !0,
            3 => 1 << 63,
            4 => 1 << 31,
            5 => 0x7FFF_FFFF_FFFF_FFFF,
            6 => before.1 ^ 1 << lab.random.below(64),
            7 => before.1.wrapping_add(1),
            8 => before.1.wrapping_sub(1),
            _ => lab.random.next(),
        };
        // Waiting and shut-down CPUs do not come back by the timer on every machine.
        if field == f::GUEST_ACTIVITY && matches!(value as u32, 2 | 3) {
            continue;
        }
        let written = vmx::try_write(field.into(), value);
        let (read, found) = vmx::try_read(field.into());
        let width = [0xFFFF, !0, 0xFFFF_FFFF, !0][(field >> 13 & 3) as usize];
        wrong |= written.succeeded() && (!read.succeeded() || found != value & width);
        let tried = written.succeeded() && !is_host && !LEFT_ALONE.contains(&field);
        if tried && lab.run() == Exit::Reason(vmx::reason::EXTERNAL_INTERRUPT) {
            l2_kit::apic::eoi();
        }
    }
    Seen::of("all").escaped_if(wrong)
}
