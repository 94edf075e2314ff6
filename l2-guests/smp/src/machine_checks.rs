//! Machine checks of which all CPUs are witnesses, wherever each of them is: the first in instructions that exit, the others in guests
//! that do nothing else.

use crate::{
    cpus,
    guest::{self, Guest},
};
use l2_kit::{
    Check, cpu, descriptors, fields as f, machine_check,
    serial::Serial,
    setup::Controls,
    smp, trap,
    vmx::{self, reason as r},
};

const ROUNDS: u64 = 300;
/// Words: how many ended, how many with another status, what the guest returned, it runs, it is to end.
const CAME: usize = 0;
const OTHER_STATUS: usize = 1;
const DONE: usize = 2;
const READY: usize = 12;
const STOP: usize = 13;
/// Exit information of exception 18.
const EXIT: u64 = 1 << 31 | 3 << 8 | trap::MC as u64;

fn ended(index: usize) {
    if machine_check::end() != machine_check::WITNESS {
        smp::count(index, OTHER_STATUS);
    }
    // Now the next one may come.
    smp::count(index, CAME);
}

/// Counts those of each CPU.
pub fn set_hook() {
    trap::hook(
        trap::MC,
        Some(|_| {
            ended(descriptors::index());
            true
        }),
    );
}

/// On all CPUs.
pub fn all(_: &[u32]) {
    set_hook();
    smp::run_on_all(cpus(), |_| machine_check::take());
    machine_check::raise(0);
    let everywhere = |round| (0..cpus()).all(|index| smp::noted(index, CAME) >= round);
    let offered = smp::until(100_000, || everywhere(1));
    Check::new(&mut Serial, "machine checks for all").fact("offered", offered).end();
    if !offered {
        return;
    }
    (1..cpus()).for_each(|index| {
        smp::give(index, guest_that_exits);
        smp::wait_for_note(index, READY);
    });
    for round in 2..=ROUNDS {
        machine_check::raise(round as u32 * 7);
        let came = smp::until(1_000_000, || {
            cpu::cpuid(1, 0);
            everywhere(round)
        });
        if !came {
            break;
        }
    }
    (1..cpus()).for_each(|index| smp::note(index, STOP, 1));
    (1..cpus()).for_each(smp::wait);
    smp::note(0, DONE, 0x600D);
    crate::print("machine checks for all", &["came", "other_status", "done"]);
}

/// Its machine checks are exits on every other CPU.
fn guest_that_exits(index: usize) {
    if cpu::cr4() & cpu::CR4_VMXE == 0 {
        guest::enter_vmx();
    }
    let guest = Guest::make(index, 0x300 + index as u64, Controls::default());
    vmx::write(f::EXCEPTION_BITMAP, (index as u64 & 1) << trap::MC);
    guest.start(cpuids, index as u64, false);
    let done = loop {
        match guest.run() {
            guest::Exit::Reason(r::CPUID) => guest.skip(),
            guest::Exit::Reason(r::EXCEPTION_OR_NMI) if vmx::read(f::EXIT_INTERRUPTION_INFO) == EXIT => ended(index),
            other => break other.word(),
        }
    };
    smp::note(index, DONE, done);
}

/// Executes CPUID until it is to end: a program.
extern "C" fn cpuids(index: u64) -> u64 {
    smp::note(index as usize, READY, 1);
    while smp::noted(index as usize, STOP) == 0 {
        cpu::cpuid(1, 0);
    }
    0x600D
}

/// One after the other, on a machine with CPUs that are not ours: how many came to us.
pub fn on_this_alone(times: u64) -> u64 {
    set_hook();
    machine_check::take();
    for n in 1..=times {
        machine_check::raise(n as u32);
        smp::until(1000, || {
            cpu::cpuid(1, 0);
            smp::noted(0, CAME) >= n
        });
    }
    smp::noted(0, CAME)
}
