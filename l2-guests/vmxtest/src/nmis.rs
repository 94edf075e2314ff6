//! NMIs that come to the hypervisor below while its guest cannot take them: they wait, and come once, as soon as they can.
//!
//! An instruction that the hypervisor below emulates by a fault of its own makes it execute an IRET, which unblocks NMIs: a
//! pending one then comes to it. So we keep NMIs blocked, let one be pending, and write 0 to XCR0, which always exits and is
//! always refused. On the bare machine that only traps.

use crate::{
    guest::{Exit, Guest, nothing},
    injection::{Seen, noting},
};
use core::arch::asm;
use l2_kit::{
    Check, Global, apic, caps, cpu, fields as f,
    serial::Serial,
    setup::{Controls, Kind, Missing, VMX_MISC, allowed_one, pin, primary, secondary},
    trap::{self, Frame},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
const IF: u64 = 1 << 9;
const BLOCKED_BY_NMI: u64 = 8;
const INJECTED: u8 = 0x60;
const HALTED: u64 = 1;
const SHUTDOWN: u64 = 2;

/// How the guest is entered while the NMI waits.
#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    pin: u32,
    primary: u32,
    blocked: u64,
    activity: u64,
    inject: u64,
}

const PLAIN: Entry = Entry { name: "its own", pin: 0, primary: 0, blocked: 0, activity: 0, inject: 0 };
const EXITING: Entry = Entry { name: "an exit", pin: pin::NMI, ..PLAIN };
const VIRTUAL: Entry = Entry { name: "an exit, virtual NMIs", pin: pin::NMI | pin::VIRTUAL_NMI, ..PLAIN };
const INTERRUPT: u64 = VALID | INJECTED as u64;

const ENTRIES: [Entry; 16] = [
    PLAIN,
    Entry { name: "its own, blocked", blocked: BLOCKED_BY_NMI, ..PLAIN },
    Entry { name: "its own, behind STI", blocked: 1, ..PLAIN },
    Entry { name: "its own, behind MOV SS", blocked: 2, ..PLAIN },
    Entry { name: "its own, halted", activity: HALTED, ..PLAIN },
    Entry { name: "its own, shut down", activity: SHUTDOWN, ..PLAIN },
    Entry { name: "its own, behind an interrupt", inject: INTERRUPT, ..PLAIN },
    Entry { name: "its own, behind an NMI", inject: VALID | 2 << 8 | 2, ..PLAIN },
    EXITING,
    Entry { name: "an exit, blocked", blocked: BLOCKED_BY_NMI, ..EXITING },
    Entry { name: "an exit, halted", activity: HALTED, ..EXITING },
    Entry { name: "an exit, shut down", activity: SHUTDOWN, ..EXITING },
    Entry { name: "an exit, behind an interrupt", inject: INTERRUPT, ..EXITING },
    VIRTUAL,
    Entry { name: "an exit, virtual NMIs blocked", blocked: BLOCKED_BY_NMI, ..VIRTUAL },
    Entry { name: "an exit, and the NMI window", primary: primary::NMI_WINDOW, blocked: BLOCKED_BY_NMI, ..VIRTUAL },
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    own(&mut guest);
    if !allowed_one(Kind::Pin, pin::VIRTUAL_NMI) || !allowed_one(Kind::Primary, primary::NMI_WINDOW) {
        Check::new(&mut Serial, "NMIs of a guest").fact("offered", false).end();
        return Ok(());
    }
    let shuts_down = caps::get(VMX_MISC) & 1 << 7 != 0;
    for entry in ENTRIES.into_iter().filter(|entry| entry.activity != SHUTDOWN || shuts_down) {
        of_guest(&mut guest, entry);
    }
    Ok(())
}

extern "C" fn nmi_itself(_: u64) -> u64 {
    apic::send_self_nmi();
    for _ in 0..4 {
        core::hint::spin_loop();
    }
    5
}

/// NMIs become blocked for us.
pub fn block(guest: &mut Guest) -> bool {
    let old = vmx::read(f::PIN_CONTROLS);
    vmx::write(f::PIN_CONTROLS, old | u64::from(pin::NMI));
    let blocked = guest.execute(nmi_itself, 5) == Exit::Reason(r::EXCEPTION_OR_NMI, 0);
    vmx::write(f::PIN_CONTROLS, old);
    blocked
}

/// An IRET of ours unblocks NMIs.
pub fn unblock() {
    be_refused(|frame| {
        frame.rip += REFUSED;
        true
    });
    wait();
}

/// NMIs become blocked for us, and one is pending.
fn block_and_send(guest: &mut Guest) -> bool {
    let blocked = block(guest);
    apic::send_self_nmi();
    blocked
}

static COUNT: Global<[u64; 2]> = Global::new([0; 2]);

/// Length of XSETBV
const REFUSED: u64 = 3;

/// Executes the XSETBV; its handler is called in between, with NMIs still blocked.
fn be_refused(handler: trap::Hook) {
    let before = trap::hook(trap::GP, Some(handler));
    let cr4 = cpu::cr4();
    cpu::set_cr4(cr4 | cpu::CR4_OSXSAVE);
    // SAFETY: the handler skips it.
    unsafe { asm!("xsetbv", in("ecx") 0, in("eax") 0, in("edx") 0) };
    cpu::set_cr4(cr4);
    trap::hook(trap::GP, before);
}

/// Time for an NMI to come, without any exit.
pub fn wait() {
    for _ in 0..100 {
        // SAFETY: no effect.
        unsafe { asm!("nop") };
    }
}

/// After the IRET of our own handler the NMI comes, without another exit.
fn own(guest: &mut Guest) {
    let ready = block_and_send(guest);
    let ((), seen) = noting(trap::NMI, || {
        be_refused(|frame| {
            frame.rip += REFUSED;
            wait();
            COUNT.set([crate::injection::seen().count, 0]);
            true
        });
        wait();
        COUNT.set([COUNT.get()[0], crate::injection::seen().count]);
    });
    let [blocked, behind] = COUNT.get();
    Check::new(&mut Serial, "an NMI waits for the IRET")
        .expect("ready", ready, true)
        .expect("while_blocked", blocked, 0)
        .expect("behind_iret", behind, 1)
        .expect("count", seen.count, 1)
        .end();
}

/// What the guest is entered with in the handler of our trap, and what came of it.
#[derive(Clone, Copy)]
struct Run {
    entry: Entry,
    guest: usize,
    exit: Exit,
    info: u64,
    blocked: u64,
    taken_by_guest: u64,
}

static RUN: Global<Run> =
    Global::new(Run { entry: PLAIN, guest: 0, exit: Exit::Done(0), info: 0, blocked: 0, taken_by_guest: 0 });

fn enter(frame: &mut Frame) -> bool {
    frame.rip += REFUSED;
    let mut run = RUN.get();
    // SAFETY: `of_guest` keeps the guest there, and does not touch it while the instruction traps.
    let guest = unsafe { &mut *(run.guest as *mut Guest) };
    guest.start(nothing, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::GUEST_INTERRUPTIBILITY, run.entry.blocked);
    vmx::write(f::GUEST_ACTIVITY, run.entry.activity);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, run.entry.inject);
    run.exit = guest.run();
    run.info = vmx::read(f::EXIT_INTERRUPTION_INFO);
    run.blocked = vmx::read(f::GUEST_INTERRUPTIBILITY);
    run.taken_by_guest = crate::injection::seen().count;
    RUN.set(run);
    true
}

/// The NMI waits while a guest is entered: it is the guest's, or an exit, or ours later, as the controls say.
fn of_guest(guest: &mut Guest, entry: Entry) {
    let old = [f::PIN_CONTROLS, f::PRIMARY_CONTROLS].map(|field| (field, vmx::read(field)));
    let ready = block_and_send(guest);
    vmx::write(f::PIN_CONTROLS, old[0].1 | u64::from(entry.pin));
    vmx::write(f::PRIMARY_CONTROLS, old[1].1 | u64::from(entry.primary));
    RUN.set(Run { entry, guest: core::ptr::from_mut(guest) as usize, ..RUN.get() });
    let interrupts = trap::hook(INJECTED, Some(|_| true));
    let ((), Seen { count, .. }) = noting(trap::NMI, || {
        be_refused(enter);
        wait();
    });
    trap::hook(INJECTED, interrupts);
    for (field, value) in old {
        vmx::write(field, value);
    }
    let Run { exit, info, blocked, taken_by_guest, .. } = RUN.get();
    let by_nmi = exit == Exit::Reason(r::EXCEPTION_OR_NMI, 0);
    let injected = u64::from(entry.inject >> 8 & 7 == 2);
    Check::new(&mut Serial, format_args!("an NMI waits for a guest: {}", entry.name))
        .expect("ready", ready, true)
        .fact("result", exit)
        .fact("exit_by_nmi", by_nmi && info & 0x7FF == 2 << 8 | 2)
        .fact("blocked", blocked)
        .fact("taken_by_guest", taken_by_guest)
        .expect("taken", count + u64::from(by_nmi), 1 + injected)
        .end();
}
