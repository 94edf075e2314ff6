//! A guest in the HLT state: what wakes it, and what is saved of an exit that does (SDM "Other Causes of VM Exits", "Activity
//! State", "Architectural State Before a VM Exit").

use crate::{
    guest::{Exit, Guest, Program, nothing},
    injection::noting,
};
use core::arch::{asm, global_asm};
use l2_kit::{
    Check, apic, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, exit_controls, pin, primary, secondary},
    vmx,
    vmx::reason as r,
};

const IF: u64 = 0x200;
const VECTOR: u8 = 0x61;
const HALTED: u64 = 1;
/// Ticks of the local APIC's timer until a guest is long halted, under nvmx under KVM too: a sleeping processor does not mind.
const SOON: u32 = 1_000_000;

global_asm!(
    ".pushsection .text.vmxtest_halted, \"ax\"",
    "vmxtest_hlt:",
    "hlt",
    "vmxtest_hlt_end:",
    "mov eax, 5",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn vmxtest_hlt(_: u64) -> u64;
    static vmxtest_hlt_end: u8;
}

extern "C" fn halt(argument: u64) -> u64 {
    // SAFETY: assembly above.
    unsafe { vmxtest_hlt(argument) }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let external = (Kind::Pin, pin::EXTERNAL_INTERRUPT);
    let acknowledge = (Kind::Exit, exit_controls::ACKNOWLEDGE);
    for (name, controls) in [("exits", &[external][..]), ("exits acknowledged", &[external, acknowledge])] {
        for rflags in [0, IF] {
            entered(&mut guest, name, controls, rflags);
            halts(&mut guest, name, controls, rflags);
        }
    }
    taken(&mut guest);
    windows(&mut guest);
    Ok(())
}

/// Runs with more bits in control words.
fn with(guest: &mut Guest, controls: &[(Kind, u32)], run: impl FnOnce(&mut Guest) -> Exit) -> Exit {
    let old = [Kind::Pin, Kind::Primary, Kind::Exit].map(|k| (k.field(), vmx::read(k.field())));
    for (kind, bits) in controls {
        vmx::write(kind.field(), vmx::read(kind.field()) | u64::from(*bits));
    }
    let exit = run(guest);
    for (field, value) in old {
        vmx::write(field, value);
    }
    exit
}

fn start(guest: &mut Guest, program: Program, rflags: u64, activity: u64) {
    guest.start(program, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | rflags);
    vmx::write(f::GUEST_ACTIVITY, activity);
}

/// Takes what is pending in our own IDT; whether it was there.
fn take_own() -> u64 {
    // SAFETY: the handlers return.
    let ((), seen) = noting(VECTOR, || unsafe { asm!("sti", "nop", "nop", "cli") });
    apic::eoi();
    seen.count
}

/// An interrupt waits for a guest that is entered halted.
fn entered(guest: &mut Guest, name: &str, controls: &[(Kind, u32)], rflags: u64) {
    apic::send_self(VECTOR);
    let exit = with(guest, controls, |guest| {
        start(guest, nothing, rflags, HALTED);
        guest.run()
    });
    report(
        format_args!("halted at entry, interrupt {name}, RFLAGS {rflags:#x}"),
        exit,
        controls,
        nothing as *const () as u64,
    );
}

/// An interrupt comes while the guest sleeps in its own HLT.
fn halts(guest: &mut Guest, name: &str, controls: &[(Kind, u32)], rflags: u64) {
    let exit = with(guest, controls, |guest| {
        apic::start_timer(VECTOR, SOON);
        start(guest, halt, rflags, 0);
        guest.run()
    });
    report(
        format_args!("halted by HLT, interrupt {name}, RFLAGS {rflags:#x}"),
        exit,
        controls,
        &raw const vmxtest_hlt_end as u64,
    );
}

fn report(name: core::fmt::Arguments<'_>, exit: Exit, controls: &[(Kind, u32)], rip: u64) {
    let (activity, at) = (vmx::read(f::GUEST_ACTIVITY), vmx::read(f::GUEST_RIP));
    let own = take_own();
    Check::new(&mut Serial, name)
        .expect("result", exit, Exit::Reason(r::EXTERNAL_INTERRUPT, 0))
        .expect("activity", activity, HALTED)
        .expect("rip", Hex(at), Hex(rip))
        .expect("taken_by_us", own, u64::from(controls.len() == 1))
        .end();
}

/// The guest's own interrupt wakes it, if RFLAGS.IF lets it in.
fn taken(guest: &mut Guest) {
    let (exit, seen) = noting(VECTOR, || {
        apic::start_timer(VECTOR, SOON);
        start(guest, halt, IF, 0);
        guest.run()
    });
    apic::eoi();
    Check::new(&mut Serial, "halted by HLT, its own interrupt")
        .expect("result", exit, Exit::Done(5))
        .expect("taken_by_guest", seen.count, 1)
        .end();
    if !setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        return;
    }
    let (exit, seen) = noting(VECTOR, || {
        apic::send_self(VECTOR);
        with(guest, &[(Kind::Pin, pin::PREEMPTION_TIMER)], |guest| {
            vmx::write(f::PREEMPTION_TIMER, 1000);
            start(guest, nothing, 0, HALTED);
            guest.run()
        })
    });
    let activity = vmx::read(f::GUEST_ACTIVITY);
    let own = take_own();
    Check::new(&mut Serial, "halted with interrupts off, its own interrupt")
        .expect("result", exit, Exit::Reason(r::PREEMPTION_TIMER, 0))
        .expect("activity", activity, HALTED)
        .expect("taken_by_guest", seen.count, 0)
        .expect("taken_by_us", own, 1)
        .end();
}

fn windows(guest: &mut Guest) {
    let interrupt = [(Kind::Primary, primary::INTERRUPT_WINDOW)];
    let nmi = [(Kind::Pin, pin::NMI | pin::VIRTUAL_NMI), (Kind::Primary, primary::NMI_WINDOW)];
    for (name, controls, rflags, reason) in
        [("interrupt", &interrupt[..], IF, r::INTERRUPT_WINDOW), ("NMI", &nmi, 0, r::NMI_WINDOW)]
    {
        if !controls.iter().all(|(kind, bits)| setup::allowed_one(*kind, *bits)) {
            Check::new(&mut Serial, format_args!("halted, {name} window")).fact("offered", false).end();
            continue;
        }
        for (how, program, activity) in [("at entry", nothing as Program, HALTED), ("by HLT", halt, 0)] {
            let exit = with(guest, controls, |guest| {
                start(guest, program, rflags, activity);
                guest.run()
            });
            let saved = vmx::read(f::GUEST_ACTIVITY);
            Check::new(&mut Serial, format_args!("halted {how}, {name} window"))
                .expect("result", exit, Exit::Reason(reason, 0))
                // A window that is open at the entry exits before the HLT.
                .expect("activity", saved, activity)
                .end();
        }
    }
}
