//! Events that cannot be injected (SDM "VM-Entry Control Fields": event injection).

use super::{
    BAD_GUEST,
    Change::{self, On, Set},
    attempt,
};
use crate::guest::{self, Exit, Guest};
use l2_kit::{
    Check, caps, fields as f,
    serial::Serial,
    setup::{self, Kind, pin},
    vmx::{self, Outcome, reason as r},
};

const VALID: u64 = 1 << 31;
const DELIVER_ERROR: u64 = 1 << 11;
const EXTERNAL: u64 = 0 << 8;
const NMI: u64 = 2 << 8;
const HARDWARE: u64 = 3 << 8;
const SOFTWARE: u64 = 4 << 8;

/// Bit of IA32_VMX_BASIC: hardware exceptions may be injected with and without error code, whatever their vector.
const ANY_ERROR_CODE: u64 = 1 << 56;

/// All of it.
pub fn all(guest: &mut Guest) {
    let bad = Exit::Refused(Outcome::FailValid(7));
    let info = |value| (f::ENTRY_INTERRUPTION_INFO, Set(VALID | value));
    let error = |value| (f::ENTRY_EXCEPTION_ERROR, Set(value));
    let length = |value| (f::ENTRY_INSTRUCTION_LENGTH, Set(value));
    attempt(guest, "inject the reserved type 1", &[info(1 << 8)], bad);
    attempt(guest, "inject an NMI with vector 3", &[info(NMI | 3)], bad);
    attempt(guest, "inject the exception 32", &[info(HARDWARE | 32)], bad);
    let ud = [info(HARDWARE | DELIVER_ERROR | 6), error(0)];
    let np = [info(HARDWARE | 11)];
    if caps::own_or_0(setup::VMX_BASIC) & ANY_ERROR_CODE == 0 {
        attempt(guest, "inject #UD with an error code", &ud, bad);
        attempt(guest, "inject #NP without an error code", &np, bad);
    } else {
        pushes(guest, "inject #UD with an error code", &ud, 6);
        pushes(guest, "inject #NP without an error code", &np, 5);
    }
    attempt(
        guest,
        "inject #GP with an error code of 17 bits",
        &[info(HARDWARE | DELIVER_ERROR | 13), error(0x10000)],
        bad,
    );
    attempt(guest, "inject an interrupt with an error code", &[info(EXTERNAL | DELIVER_ERROR | 0x60), error(0)], bad);
    attempt(guest, "inject with bit 12", &[info(HARDWARE | 1 << 12 | 6)], bad);
    attempt(guest, "inject with bit 30", &[info(HARDWARE | 1 << 30 | 6)], bad);
    let waiting = (f::GUEST_ACTIVITY, Set(1 << 8));
    attempt(guest, "a reserved activity state", &[waiting], BAD_GUEST);
    attempt(guest, "inject with bit 12 into a reserved activity state", &[info(HARDWARE | 1 << 12 | 6), waiting], bad);
    attempt(guest, "inject INT with a length of 16", &[info(SOFTWARE | 0x60), length(16)], bad);
    attempt(guest, "inject an interrupt without IF", &[info(EXTERNAL | 0x60)], BAD_GUEST);
    let interrupts = (f::GUEST_RFLAGS, On(0x200));
    attempt(
        guest,
        "inject an interrupt while blocked by STI",
        &[info(EXTERNAL | 0x60), interrupts, (f::GUEST_INTERRUPTIBILITY, Set(1))],
        BAD_GUEST,
    );
    attempt(
        guest,
        "inject an interrupt while blocked by MOV SS",
        &[info(EXTERNAL | 0x60), interrupts, (f::GUEST_INTERRUPTIBILITY, Set(2))],
        BAD_GUEST,
    );
    // The SDM lets a CPU name the reason by the qualification 3 or give none.
    guest.start(guest::nothing, 5);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | NMI | 2);
    vmx::write(f::GUEST_INTERRUPTIBILITY, 2);
    let got = guest.run();
    vmx::write(f::ENTRY_INTERRUPTION_INFO, 0);
    vmx::write(f::GUEST_INTERRUPTIBILITY, 0);
    let refused = got == Exit::Failed(33, 3) || got == BAD_GUEST;
    Check::new(&mut Serial, "inject an NMI while blocked by MOV SS")
        .fact("result", got)
        .expect("refused", refused, true)
        .end();
}

/// Injects, and looks at the stack before the handler's first instruction: so many words of eight bytes must lie there.
fn pushes(guest: &mut Guest, name: &str, changes: &[(u32, Change)], wanted: u64) {
    if !setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        Check::new(&mut Serial, name).fact("offered", false).end();
        return;
    }
    guest.start(guest::nothing, 5);
    let top = vmx::read(f::GUEST_RSP) & !15;
    let timer = [(f::PIN_CONTROLS, On(pin::PREEMPTION_TIMER.into())), (f::PREEMPTION_TIMER, Set(0))];
    let old = [f::PIN_CONTROLS, f::ENTRY_INTERRUPTION_INFO].map(|field| (field, vmx::read(field)));
    for (field, change) in changes.iter().chain(&timer) {
        vmx::write(*field, change.of(vmx::read(*field)));
    }
    let exit = guest.run();
    let pushed = (top - vmx::read(f::GUEST_RSP)) / 8;
    old.iter().for_each(|(field, value)| vmx::write(*field, *value));
    Check::new(&mut Serial, name)
        .expect("result", exit, Exit::Reason(r::PREEMPTION_TIMER, 0))
        .expect("pushed", pushed, wanted)
        .end();
}
