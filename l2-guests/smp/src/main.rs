//! smp: a guest hypervisor on all CPUs of the machine at once, as `check` records: what an INIT leaves, messages between
//! CPUs and writes that wake them, a guest on each CPU, VMCSs that migrate, invalidations, events that reach a CPU while its
//! guest runs, exceptions of a guest that is interrupted, messages to all at once.
//!
//! CPU 0 prints for all, in the order of CPUs, so that the records of two machines can be compared.
#![no_std]
#![no_main]

mod broadcast;
mod events;
mod exceptions;
mod fields;
mod guest;
mod guests;
mod init;
mod machine_checks;
mod memory;
mod messages;
mod migrate;
mod mwait;

use core::sync::atomic::{AtomicUsize, Ordering};
use l2_kit::{
    BootInfo, Check, apic, cpu, identity, log,
    protocol::{Hex, Kind},
    report,
    serial::Serial,
    smp,
};

l2_kit::entry!(main);

/// How many CPUs there are.
static CPUS: AtomicUsize = AtomicUsize::new(1);

/// How many CPUs there are.
pub fn cpus() -> usize {
    CPUS.load(Ordering::Relaxed)
}

/// Gets the APIC ids of the CPUs.
type Part = fn(&[u32]);

/// The parts, in order; `part=NAME,NAME` on the command line chooses some beside the start.
const PARTS: [(&str, Part); 11] = [
    ("messages", messages::all),
    ("mwait", mwait::all),
    ("guests", guests::all),
    ("migrate", migrate::all),
    ("fields", fields::all),
    ("memory", memory::all),
    ("events", events::all),
    ("exceptions", exceptions::all),
    ("machine_checks", machine_checks::all),
    ("broadcast", broadcast::all),
    ("init", init::again),
];

fn main(info: &BootInfo) {
    let ids = smp::find();
    CPUS.store(ids.len(), Ordering::Relaxed);
    report::record(
        Kind::Hello,
        &[
            ("name", &"smp"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
            ("cpus", &ids.len()),
        ],
    );
    if !info.knows(&["part", "parked"]) {
        return;
    }
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        report::fail(format_args!("this CPU lacks VMX"));
        return;
    }
    apic::init();
    if info.option("parked").is_some() {
        return init::parked(&ids);
    }
    if ids.len() < 2 {
        report::fail(format_args!("there is only one CPU"));
        return;
    }
    if !init::start(&ids) {
        return;
    }
    let chosen = info.option("part");
    let is_chosen = |name: &str| chosen.is_none_or(|names| names.split(',').any(|chosen| chosen == name));
    for (name, part) in PARTS.into_iter().filter(|(name, _)| is_chosen(name)) {
        log!("part {name}");
        smp::clear_notes();
        part(&ids);
    }
    if is_chosen("init") { init::restart_first() } else { end() }
}

/// The last word is another CPU's: it ends the machine.
fn end() -> ! {
    smp::give(cpus() - 1, |_| report::end());
    cpu::halt()
}

/// Prints what each CPU left, a record a CPU, as facts of these names.
pub fn print(name: &str, keys: &[&str]) {
    for index in 0..cpus() {
        let mut out = Serial;
        let mut check = Check::new(&mut out, name).fact("cpu", index);
        for (word, key) in keys.iter().enumerate() {
            check = check.fact(key, Hex(smp::noted(index, word)));
        }
        check.end();
    }
    smp::clear_notes();
}
