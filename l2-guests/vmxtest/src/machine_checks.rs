//! Machine checks of which this CPU is a witness, at each moment around the exits of a guest: each comes once, to us, to the guest, or as
//! an exit, with the status that the processor wrote. Which of us it hits depends on the machine below, and so is not in the records.

use crate::guest::{Exit, Guest, nothing};
use core::sync::atomic::{AtomicU32, Ordering};
use l2_kit::{
    Check, cpu, fields as f, machine_check,
    serial::Serial,
    setup::{Controls, Missing, secondary},
    trap,
    vmx::{self, reason as r},
};

/// More instructions than an exit to us and back takes under a hypervisor.
const MOMENTS: u32 = 1000;
/// As often as we try before we say that none comes.
const TURNS: u32 = 400;
const INJECTED: u8 = 0x60;
const IF: u64 = 1 << 9;
const VALID: u64 = 1 << 31;
/// Exit information of exception 18.
const EXIT: u64 = VALID | 3 << 8 | trap::MC as u64;

/// Machine checks that ended, those with another status than a witness has, and interrupts: they change between any two instructions.
static CAME: AtomicU32 = AtomicU32::new(0);
static OTHER_STATUS: AtomicU32 = AtomicU32::new(0);
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

fn ended() {
    CAME.fetch_add(1, Ordering::Relaxed);
    if machine_check::end() != machine_check::WITNESS {
        OTHER_STATUS.fetch_add(1, Ordering::Relaxed);
    }
}

fn came() -> u32 {
    CAME.load(Ordering::Relaxed)
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    machine_check::take();
    let before = [
        trap::hook(
            trap::MC,
            Some(|_| {
                ended();
                true
            }),
        ),
        trap::hook(
            INJECTED,
            Some(|_| {
                INTERRUPTS.fetch_add(1, Ordering::Relaxed);
                true
            }),
        ),
    ];
    machine_check::raise(0);
    Check::new(&mut Serial, "machine checks").fact("offered", came() == 1).end();
    let done = if came() == 1 { with_guests() } else { Ok(()) };
    trap::hook(trap::MC, before[0]);
    trap::hook(INJECTED, before[1]);
    done
}

fn with_guests() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    sweep("our own instructions that exit", || {
        for _ in 0..TURNS {
            if came() != 0 {
                break;
            }
            cpu::cpuid(1, 0);
        }
        true
    });
    for exits in [true, false] {
        vmx::write(f::EXCEPTION_BITMAP, u64::from(exits) << trap::MC);
        let to = if exits { "that exits" } else { "that takes them" };
        sweep(format_args!("exits of a guest {to}"), || {
            guest.start(cpuids, 0);
            until_done(&mut guest, exits)
        });
        sweep(format_args!("interrupts injected into a guest {to}"), || {
            let mut entries = 0;
            while came() == 0 && entries < TURNS {
                guest.start(nothing, 5);
                vmx::write(f::GUEST_RFLAGS, 2 | IF);
                vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | u64::from(INJECTED));
                entries += 1;
                if !until_done(&mut guest, exits) {
                    return false;
                }
            }
            INTERRUPTS.load(Ordering::Relaxed) == entries
        });
    }
    Ok(())
}

/// One at each moment, while `run` runs; it says whether all else was as it should be.
fn sweep(name: impl core::fmt::Display, mut run: impl FnMut() -> bool) {
    let (mut once, mut good, mut other_status) = (0, 0, 0);
    for moment in 1..=MOMENTS {
        [&CAME, &OTHER_STATUS, &INTERRUPTS].iter().for_each(|count| count.store(0, Ordering::Relaxed));
        machine_check::raise(moment);
        good += u32::from(run());
        once += u32::from(came() == 1);
        other_status += OTHER_STATUS.load(Ordering::Relaxed);
    }
    Check::new(&mut Serial, format_args!("machine checks around {name}"))
        .expect("once", once, MOMENTS)
        .expect("good", good, MOMENTS)
        .expect("other_status", other_status, 0)
        .end();
}

/// Executes CPUID until the machine check has come: a program.
extern "C" fn cpuids(_: u64) -> u64 {
    for _ in 0..TURNS {
        if came() != 0 {
            break;
        }
        cpu::cpuid(1, 0);
    }
    5
}

/// Runs the guest until its program is over: a machine check in it is an exit only if we asked for that.
fn until_done(guest: &mut Guest, exits: bool) -> bool {
    loop {
        match guest.run() {
            Exit::Done(value) => return value == 5,
            Exit::Reason(r::CPUID, _) => vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + 2),
            Exit::Reason(r::EXCEPTION_OR_NMI, _) if exits && vmx::read(f::EXIT_INTERRUPTION_INFO) == EXIT => ended(),
            _ => return false,
        }
    }
}
