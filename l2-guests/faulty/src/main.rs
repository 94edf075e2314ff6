//! faulty: a guest that goes wrong in the way that its command line names, so that what is below it can show how it copes.
#![no_std]
#![no_main]

use core::{arch::asm, ptr};
use l2_kit::{
    BootInfo, cpu,
    descriptors::TablePointer,
    identity, log, machine_check,
    protocol::{Hex, Kind},
    report, serial,
};

mod outer;

l2_kit::entry!(main);

/// Goes wrong, given the value of its option.
type Fault = fn(&str);

const FAULTS: [(&str, Fault); 7] = [
    ("triple-fault", triple_fault),
    ("touch", touch),
    ("outer", outer::reach),
    ("machine-check", in_an_exit),
    ("spin", spin),
    ("halt", halt),
    ("panic", panic),
];

fn main(info: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"faulty"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    let chosen = FAULTS.iter().find_map(|(name, fault)| Some((name, fault, info.option(name)?)));
    match chosen {
        Some((name, fault, value)) => {
            log!("now: {name} {value}");
            // What the machine does next may cut the line.
            serial::drain();
            fault(value);
        }
        None => report::fail(format_args!(
            "`{}` names no fault; there are triple-fault, touch=ADDRESS, outer, machine-check=fatal|disabled, spin, halt, panic",
            info.command_line
        )),
    }
}

/// An exception without an IDT, then without an IDT again, then again.
fn triple_fault(_: &str) {
    let nothing = TablePointer { limit: 0, base: 0 };
    // SAFETY: meant to end the machine.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const nothing, options(noreturn)) };
}

/// Reads and writes eight bytes at a physical address, and leaves them as they were if the machine lets it.
fn touch(address: &str) {
    let digits = address.trim_start_matches("0x");
    match u64::from_str_radix(digits, 16) {
        Ok(address) if address % 8 == 0 && address != 0 => {
            let place = ptr::with_exposed_provenance_mut::<u64>(address as usize);
            // SAFETY: meant to find out what happens; the value stays the same.
            let found = unsafe { ptr::read_volatile(place) };
            log!("read {found:#x}");
            // SAFETY: as above.
            unsafe { ptr::write_volatile(place, found) };
            report::record(Kind::Check, &[("name", &"touched"), ("address", &Hex(address))]);
        }
        _ => report::fail(format_args!("`{address}` is no address (hexadecimal, a multiple of 8, not 0)")),
    }
}

/// A machine check so soon that it hits whoever handles our CPUID: one that is the end, or one while ours are disabled.
fn in_an_exit(kind: &str) {
    const SOON: u32 = 40;
    match kind {
        "fatal" => machine_check::raise_fatal(SOON),
        "disabled" => machine_check::raise(SOON),
        _ => return report::fail(format_args!("`{kind}` is neither fatal nor disabled")),
    }
    cpu::cpuid(1, 0);
}

/// Never ends, takes no interrupt, does not halt.
fn spin(_: &str) {
    loop {
        core::hint::spin_loop();
    }
}

/// Waits for an interrupt that cannot come.
fn halt(_: &str) {
    cpu::halt()
}

fn panic(_: &str) {
    panic!("as the command line asked");
}
