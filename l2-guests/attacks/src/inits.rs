//! INITs, start-up messages and NMIs at any moment, to one CPU and to all others, whatever they do: nothing of it reaches the
//! hypervisor below, and each CPU can be started afterwards and runs a guest.

use crate::{
    guest::{self, Exit, Extra, Guest},
    lab::{Lab, Seen, Told},
    liveness::unblock_nmis,
};
use core::{
    arch::asm,
    cell::UnsafeCell,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use l2_kit::{
    apic::{self, message},
    arrayvec::ArrayVec,
    cpu, fields as f, log, report,
    setup::{self, Kind, pin, primary},
    smp::{self, MAX_CPUS},
    trap,
    vmx::{self, reason as r},
};

/// Messages of a try.
const MESSAGES: u64 = 24;
/// Destination shorthand: all others
const OTHERS: u32 = 3 << 18;
/// Where CPUs spin that a storm has started: conventional memory that nothing of ours uses.
const SPIN: u64 = 0x7_1000;
const JMP_SELF: [u8; 2] = [0xEB, 0xFE];
/// Basic exit reason
const INIT_SIGNAL: u32 = 3;

/// The storm is over.
static STOP: AtomicBool = AtomicBool::new(false);
/// INITs that took a guest out.
static TAKEN_OUT: AtomicU64 = AtomicU64::new(0);

/// What a CPU needs, made once: no storm may hit it while it allocates.
struct Own {
    guest: Guest,
    vmxon: u64,
    spare: u64,
}

struct Owned([UnsafeCell<Option<Own>>; MAX_CPUS]);
// SAFETY: each CPU uses its own place only.
unsafe impl Sync for Owned {}
static OWNED: Owned = Owned([const { UnsafeCell::new(None) }; MAX_CPUS]);

/// Its name, and the job of a CPU in it.
type State = (&'static str, smp::Job);

/// What a CPU does while messages come, until [`STOP`].
const STATES: &[State] = &[
    ("a loop", |_| until_stopped(|| ())),
    // SAFETY: an INIT ends it, or the machine's end.
    ("HLT", |_| until_stopped(|| unsafe { asm!("hlt", options(nomem, nostack)) })),
    ("VMXON and VMXOFF", |index| until_stopped(|| in_vmx(index, |_| ()))),
    ("VMX instructions", |index| {
        in_vmx(index, |own| {
            until_stopped(|| {
                let _ = vmx::vmptrld(own.spare);
                let _ = vmx::try_write(f::GUEST_RSP.into(), 5);
                let _ = vmx::invept(2, [0, 0]);
                let _ = vmx::vmclear(own.spare);
            });
        })
    }),
    ("a guest that waits", |index| in_guest(index, 0, |own, _| _ = own.guest.execute(spin, 0))),
    ("a guest that exits", |index| {
        in_guest(index, 0, |own, began| {
            if !began {
                own.guest.start(leave, 0);
            }
            if own.guest.run() == Exit::Reason(r::CPUID) {
                own.guest.skip();
            }
        })
    }),
    ("a guest that sleeps", |index| {
        in_guest(index, 0, |own, _| {
            own.guest.start(spin, 0);
            vmx::write(f::GUEST_ACTIVITY, 1);
            own.guest.run();
        })
    }),
    ("a stepped guest", |index| {
        in_guest(index, primary::TRAP_FLAG, |own, began| {
            if !began {
                own.guest.start(spin, 0);
            }
            own.guest.run();
        })
    }),
    ("entries", |index| in_guest(index, 0, |own, _| _ = own.guest.execute(guest::nothing, 1))),
    ("entries that fail", |index| {
        in_guest(index, 0, |own, _| {
            own.guest.start(guest::nothing, 1);
            vmx::write(f::GUEST_RFLAGS, 0);
            own.guest.run();
        })
    }),
    ("entries with events", |index| {
        in_guest(index, 0, |own, _| {
            own.guest.start(guest::nothing, 1);
            // The event cannot be delivered.
            vmx::write(f::GUEST_IDTR_LIMIT, 0);
            vmx::write(f::ENTRY_INTERRUPTION_INFO, 1 << 31 | 3 << 8 | 6);
            own.guest.run();
        })
    }),
];

pub fn all(lab: &mut Lab) {
    if crate::cpus() < 2 {
        return;
    }
    let ids = smp::find();
    // VMX operation blocks INIT.
    if crate::ENTERED.replace(false) {
        smp::run_on(1, |_| leave_vmx());
    }
    for (index, id) in ids.iter().enumerate().skip(1) {
        if !smp::start(index, *id) {
            report::fail(format_args!("CPU {index} does not start"));
            return;
        }
        smp::run_on(index, make);
    }
    // SAFETY: see `SPIN`.
    unsafe { (SPIN as *mut [u8; 2]).write_volatile(JMP_SELF) };
    let hook = trap::hook(trap::NMI, Some(|_| true));
    for (state, job) in STATES {
        let control = if *state == "a stepped guest" { primary::TRAP_FLAG } else { 0 };
        if !setup::allowed_one(Kind::Primary, control) {
            continue;
        }
        for (messages, kinds) in [("INITs", 8), ("INITs and NMIs", 12)] {
            lab.attack(format_args!("{messages} while others are in {state}"), Told::Answered, |lab| {
                storm(lab, &ids, *job, kinds)
            });
        }
    }
    trap::hook(trap::NMI, hook);
    log!("{} guests were taken out by INIT", TAKEN_OUT.load(Ordering::Relaxed));
}

/// Messages at random, of the first `kinds` kinds, while this CPU runs a guest of its own; then all come back.
fn storm(lab: &mut Lab, ids: &ArrayVec<u32, MAX_CPUS>, job: fn(usize), kinds: u64) -> Seen {
    let startup = message::startup((SPIN >> 12) as u8);
    STOP.store(false, Ordering::Release);
    (1..ids.len()).for_each(|index| smp::give(index, job));
    for _ in 0..MESSAGES {
        smp::pause(lab.random.below(4000) as u32);
        let all = lab.random.one_in(4);
        let id = ids[1 + lab.random.below(ids.len() as u64 - 1) as usize];
        let send = |message: u32| if all { apic::send(0, message | OTHERS) } else { apic::send(id, message) };
        let messages: &[u32] = match lab.random.below(kinds) {
            0..3 => &[message::INIT],
            3 => &[startup],
            4 => &[message::INIT, startup],
            5 => &[message::INIT, message::INIT],
            6 => &[message::INIT, startup, message::INIT],
            7 => &[startup, message::INIT, startup, startup],
            8 => &[message::NMI],
            9 => &[message::NMI, message::NMI, message::NMI],
            10 => &[message::NMI, message::INIT, message::NMI, startup, message::NMI],
            _ => &[message::INIT, message::NMI],
        };
        messages.iter().for_each(|message| send(*message));
        if lab.random.one_in(3) && lab.execute(guest::nothing, 9) != Exit::Done(9) {
            return Seen::of("a guest of CPU 0 does not run").escaped_if(true);
        }
    }
    STOP.store(true, Ordering::Release);
    // This wakes a CPU that sleeps, or takes it out of its guest.
    (1..ids.len()).for_each(|index| apic::send(ids[index], message::INIT));
    smp::pause(20_000);
    let mut back = 0;
    for (index, id) in ids.iter().enumerate().skip(1) {
        // A CPU in VMX operation takes the INIT only once it has left it; a hypervisor below may still report entries that fail.
        if (0..40).any(|_| smp::start(index, *id)) {
            smp::clear_notes();
            smp::run_on(index, |index| {
                in_vmx(index, |own| {
                    let good = own.guest.fresh(Extra::default()).is_ok()
                        && own.guest.execute(guest::nothing, 7) == Exit::Done(7);
                    smp::note(index, 0, u64::from(good));
                })
            });
            back += smp::noted(index, 0);
        }
    }
    let all = ids.len() as u64 - 1;
    if back != all {
        report::fail(format_args!("{back} of {all} CPUs come back and run a guest"));
    }
    Seen::of(back)
}

/// Makes what this CPU needs.
fn make(index: usize) {
    let made = setup::enter_vmx().and_then(|vmxon| {
        let guest = Guest::new(16 + index as u64)?;
        Ok(Own { guest, vmxon, spare: setup::region() })
    });
    match made {
        // SAFETY: see `Owned`.
        Ok(own) => unsafe { *OWNED.0[index].get() = Some(own) },
        Err(missing) => report::die(format_args!("CPU {index}: {missing}")),
    }
    leave_vmx();
}

fn leave_vmx() {
    let _ = vmx::vmxoff();
    cpu::set_cr4(cpu::cr4() & !cpu::CR4_VMXE);
}

fn until_stopped(mut f: impl FnMut()) {
    while !STOP.load(Ordering::Acquire) {
        f();
    }
}

/// In VMX operation, for as long as `f` takes.
fn in_vmx(index: usize, f: impl FnOnce(&mut Own)) {
    const OSFXSR: u64 = 1 << 9;
    // SAFETY: see `Owned`.
    let Some(own) = (unsafe { &mut *OWNED.0[index].get() }) else { return };
    cpu::set_cr4(cpu::cr4() | cpu::CR4_VMXE | OSFXSR);
    for region in [own.vmxon, own.spare] {
        // SAFETY: regions of this CPU, which has left VMX operation.
        unsafe { (region as *mut u64).write_volatile(setup::revision().into()) };
    }
    if vmx::vmxon(own.vmxon).succeeded() {
        f(own);
    }
    leave_vmx();
}

/// With a guest, until the storm is over; `f` enters it, and is told whether it has before.
fn in_guest(index: usize, controls: u32, mut f: impl FnMut(&mut Own, bool)) {
    in_vmx(index, |own| {
        if own.guest.fresh(Extra { pin: pin::NMI, primary: controls, ..Extra::default() }).is_err() {
            return;
        }
        let mut began = false;
        until_stopped(|| {
            f(own, began);
            began = true;
            match vmx::read(f::EXIT_REASON) as u32 {
                INIT_SIGNAL => _ = TAKEN_OUT.fetch_add(1, Ordering::Relaxed),
                r::EXCEPTION_OR_NMI => unblock_nmis(),
                _ => {}
            }
        });
    });
}

/// Waits for the end of the storm: a program.
extern "C" fn spin(_: u64) -> u64 {
    until_stopped(core::hint::spin_loop);
    1
}

/// Leaves by CPUID again and again: a program.
extern "C" fn leave(_: u64) -> u64 {
    until_stopped(|| _ = cpu::cpuid(0, 0));
    1
}
