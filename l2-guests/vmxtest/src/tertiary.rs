//! Tertiary processor-based controls: a guest that sees a shadow of IA32_SPEC_CTRL (SDM "Tertiary Processor-Based VM-Execution
//! Controls", "Changes to Instruction Behavior in VMX Non-Root Operation"); and a guest that is shut down.

use crate::{
    entries::{
        Change::{On, Set},
        try_with,
    },
    guest::{Exit, Guest, nothing},
};
use core::sync::atomic::{AtomicU64, Ordering};
use l2_kit::{
    Check, caps, cpu, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, VMX_MISC, exit_controls as exit, pin, primary, secondary},
    vmx::{self, Outcome, reason as r},
};

/// IA32_VMX_PROCBASED_CTLS3: the tertiary controls that may be 1.
pub const PROCBASED_CTLS3: u32 = 0x492;
/// Tertiary control "virtualize IA32_SPEC_CTRL".
pub const VIRTUALIZE_SPEC_CTRL: u64 = 1 << 7;
const FEATURE_CONTROL: u32 = 0x3A;
const SPEC_CTRL: u32 = 0x48;
const IBRS: u64 = 1 << 0;
const STIBP: u64 = 1 << 1;
const SSBD: u64 = 1 << 2;
const SHUTDOWN: u64 = 2;
const VALID: u64 = 1 << 31;

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let active = setup::allowed_one(Kind::Primary, primary::TERTIARY);
    if active {
        reserved(&mut guest);
    }
    if active && caps::get(PROCBASED_CTLS3) & VIRTUALIZE_SPEC_CTRL != 0 {
        spec_ctrl(&mut guest);
    } else {
        Check::new(&mut Serial, "virtualized IA32_SPEC_CTRL").fact("offered", false).end();
    }
    if caps::get(VMX_MISC) & 1 << 7 != 0 && setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        shut_down(&mut guest);
    } else {
        Check::new(&mut Serial, "shutdown").fact("offered", false).end();
    }
    Ok(())
}

/// What the MSR does not allow cannot be set, and counts only if the word is activated.
fn reserved(guest: &mut Guest) {
    let refused = Exit::Refused(Outcome::FailValid(7));
    let allowed = caps::get(PROCBASED_CTLS3);
    for bit in [0, 1, 4, 5, 12, 40, 63].into_iter().filter(|bit| allowed >> bit & 1 == 0) {
        let word = (f::TERTIARY_CONTROLS, Set(1 << bit));
        let used = try_with(guest, &[(f::PRIMARY_CONTROLS, On(primary::TERTIARY.into())), word]).0;
        let unused = try_with(guest, &[word]).0;
        Check::new(&mut Serial, format_args!("tertiary control {bit}"))
            .expect("result", used, refused)
            .expect("unused", unused, Exit::Done(5))
            .end();
    }
}

static SEEN: [AtomicU64; 3] = [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];

extern "C" fn read_and_write(value: u64) -> u64 {
    SEEN[0].store(cpu::rdmsr(SPEC_CTRL), Ordering::Relaxed);
    cpu::rdmsr(FEATURE_CONTROL);
    SEEN[1].store(cpu::rdmsr(SPEC_CTRL), Ordering::Relaxed);
    cpu::wrmsr(SPEC_CTRL, value);
    cpu::rdmsr(FEATURE_CONTROL);
    SEEN[2].store(cpu::rdmsr(SPEC_CTRL), Ordering::Relaxed);
    5
}

/// The guest reads the shadow; its write leaves the bits of the mask as they are. The MSR itself is not switched.
fn spec_ctrl(guest: &mut Guest) {
    let before = cpu::rdmsr(SPEC_CTRL);
    let old = vmx::read(f::PRIMARY_CONTROLS);
    for (mask, shadow, written) in [(0, 0, STIBP), (IBRS, 0, STIBP | SSBD), (IBRS | SSBD, SSBD, 0), (!0, STIBP, SSBD)] {
        cpu::wrmsr(SPEC_CTRL, IBRS);
        vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::TERTIARY));
        vmx::write(f::TERTIARY_CONTROLS, VIRTUALIZE_SPEC_CTRL);
        vmx::write(f::SPEC_CTRL_MASK, mask);
        vmx::write(f::SPEC_CTRL_SHADOW, shadow);
        let result = guest.execute(read_and_write, written);
        let own = cpu::rdmsr(SPEC_CTRL);
        vmx::write(f::PRIMARY_CONTROLS, old);
        let unused = guest.execute(read_and_write, IBRS);
        let [first, again, later] = SEEN.each_ref().map(|seen| seen.load(Ordering::Relaxed));
        let mut out = Serial;
        Check::new(&mut out, format_args!("IA32_SPEC_CTRL under mask {mask:#x}"))
            .expect("result", result, Exit::Done(5))
            .expect("own", Hex(own), Hex(IBRS & mask | written & !mask))
            // The SDM has the write change it; Bochs leaves it.
            .fact("shadow", Hex(vmx::read(f::SPEC_CTRL_SHADOW)))
            .expect("unused", unused, Exit::Done(5))
            .expect("unused_sees", Hex(first), Hex(own))
            .expect("unused_sees_again", Hex(again), Hex(own))
            .expect("unused_sees_what_it_wrote", Hex(later), Hex(IBRS))
            .end();
        cpu::wrmsr(SPEC_CTRL, IBRS);
        vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::TERTIARY));
        vmx::write(f::SPEC_CTRL_SHADOW, shadow);
        guest.execute(read_and_write, written);
        vmx::write(f::PRIMARY_CONTROLS, old);
        let [first, again, _] = SEEN.each_ref().map(|seen| Hex(seen.load(Ordering::Relaxed)));
        Check::new(&mut out, format_args!("shadow of IA32_SPEC_CTRL under mask {mask:#x}"))
            .expect("seen", first, Hex(shadow))
            .expect("seen_again", again, Hex(shadow))
            .end();
    }
    cpu::wrmsr(SPEC_CTRL, before);
}

/// In shutdown only the timer, an NMI or a machine check does something; the exit says that the guest was in it.
fn shut_down(guest: &mut Guest) {
    let old = [f::PIN_CONTROLS, f::EXIT_CONTROLS].map(|field| (field, vmx::read(field)));
    let saves = setup::allowed_one(Kind::Exit, exit::SAVE_TIMER);
    vmx::write(f::PIN_CONTROLS, old[0].1 | u64::from(pin::PREEMPTION_TIMER));
    for (name, activity) in [("active", 0), ("shutdown", SHUTDOWN)] {
        guest.start(nothing, 5);
        vmx::write(f::GUEST_ACTIVITY, activity);
        vmx::write(f::PREEMPTION_TIMER, if activity == 0 { 0 } else { 1000 });
        let exit = guest.run();
        Check::new(&mut Serial, format_args!("{name} until the timer"))
            .expect("result", exit, Exit::Reason(r::PREEMPTION_TIMER, 0))
            .expect("activity", vmx::read(f::GUEST_ACTIVITY), activity)
            .fact("saves", saves)
            .end();
    }
    for (field, value) in old {
        vmx::write(field, value);
    }
    for (name, event, blocking, wanted) in [
        ("shutdown with #GP", VALID | 3 << 8 | 1 << 11 | 13, 0, Exit::Failed(33, 0)),
        ("shutdown with an interrupt", VALID | 0x60, 0, Exit::Failed(33, 0)),
        ("shutdown behind STI", 0, 1, Exit::Failed(33, 0)),
    ] {
        let changes = [
            (f::GUEST_ACTIVITY, Set(SHUTDOWN)),
            (f::ENTRY_INTERRUPTION_INFO, Set(event)),
            (f::GUEST_INTERRUPTIBILITY, Set(blocking)),
            (f::GUEST_RFLAGS, On(1 << 9)),
        ];
        let got = try_with(guest, &changes).0;
        Check::new(&mut Serial, name).expect("result", got, wanted).end();
    }
}
