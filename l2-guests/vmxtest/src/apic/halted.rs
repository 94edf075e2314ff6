//! Virtual interrupts for a guest in the HLT state (SDM "Recognition and Delivery of Virtual Interrupts", "Posted-Interrupt
//! Processing").

use super::{
    Apic, DELIVERY, POSTED,
    interrupts::{End, IF, request, taking},
    posted::{self, NOTIFICATION},
};
use crate::guest::{Exit, nothing};
use l2_kit::{
    Check, apic as local_apic, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, pin},
    vmx::{self, reason as r},
};

const HALTED: u64 = 1;

pub fn all(apic: &mut Apic) {
    let timer = setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER);
    for (name, mode) in [("virtual", &DELIVERY), ("posted", &POSTED)] {
        for (on, rflags) in [("on", IF), ("off", 0)] {
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("halted, {name} interrupt, interrupts {on}"));
            if !timer || !apic.choose(&Controls { pin: mode.pin | pin::PREEMPTION_TIMER, ..*mode }) {
                check.fact("offered", false).end();
                continue;
            }
            vmx::write(f::PREEMPTION_TIMER, 10_000);
            if name == "virtual" {
                request(apic, &[0x41]);
            } else {
                posted::post(apic, &[0x41]);
                local_apic::send_self(NOTIFICATION);
            }
            apic.guest.start(nothing, 5);
            vmx::write(f::GUEST_RFLAGS, 2 | rflags);
            vmx::write(f::GUEST_ACTIVITY, HALTED);
            let (exit, taken) = taking(End::None, || apic.guest.run());
            let wakes = rflags != 0;
            check
                .expect("result", exit, if wakes { Exit::Done(5) } else { Exit::Reason(r::PREEMPTION_TIMER, 0) })
                .expect("taken", Hex(taken), Hex(if wakes { 0x41 } else { 0 }))
                .expect("activity", vmx::read(f::GUEST_ACTIVITY), if wakes { 0 } else { HALTED })
                .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(if wakes { 0x4100 } else { 0x41 }))
                .end();
        }
    }
}
