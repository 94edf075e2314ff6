//! INIT and start-up: the state in which a CPU begins, for the first time and after it was used.

use crate::{cpus, guest};
use core::arch::asm;
use l2_kit::{
    Check, apic, cpu, fields as f, identity, pages,
    protocol::Hex,
    report,
    serial::Serial,
    setup::Controls,
    smp::{self, STATE},
    vmx,
};

/// Basic exit reason INIT signal.
const INIT_SIGNAL: u64 = 3;

/// Starts all CPUs; whether all came.
pub fn start(ids: &[u32]) -> bool {
    let mut all = true;
    for (index, id) in ids.iter().enumerate().skip(1) {
        all &= start_one("start", index, *id);
    }
    all
}

/// Starts a CPU and prints the state in which it began.
fn start_one(name: &str, index: usize, id: u32) -> bool {
    let came = smp::start(index, id);
    let mut out = Serial;
    let mut check = Check::new(&mut out, name).fact("cpu", index).expect("came", came, true);
    // EDX holds the signature of the CPU, for which Bochs leaves 0.
    for (word, key) in STATE.iter().enumerate().filter(|(_, key)| !matches!(**key, "" | "edx")) {
        let limit = key.ends_with("dtr") || matches!(*key, "cs" | "ds" | "es" | "ss" | "fs" | "gs");
        check = check.fact(key, Hex(u64::from(smp::state(word) & if limit { 0xFFFF } else { u32::MAX })));
    }
    check.end();
    came
}

/// INIT takes CPUs out of whatever they do, and they begin as fresh ones.
pub fn again(ids: &[u32]) {
    // VMX operation blocks INIT.
    smp::run_on_all(cpus(), |_| {
        if cpu::cr4() & cpu::CR4_VMXE != 0 {
            vmx::vmxoff();
            cpu::set_cr4(cpu::cr4() & !cpu::CR4_VMXE);
        }
    });
    for (index, id) in ids.iter().enumerate().skip(1) {
        smp::give(index, dirty_and_spin);
        smp::wait_for_note(index, 0);
        start_one("again from a loop", index, *id);
        smp::clear_notes();
        smp::give(index, halt);
        smp::wait_for_note(index, 0);
        smp::pause(1000);
        start_one("again from halt", index, *id);
        smp::clear_notes();
    }
    if identity::Slot::find() == identity::Slot::Nvmx {
        blocked(ids);
    }
    let own = cpu::rdmsr(0x1B) >> 8 & 1;
    smp::run_on_all(cpus(), |index| smp::note(index, 0, cpu::rdmsr(0x1B) >> 8 & 1));
    crate::print("again: the CPU that booted", &["bsp"]);
    Check::new(&mut Serial, "again: CPU 0").expect("bsp", own, 1).end();
}

fn dirty_and_spin(index: usize) {
    // SAFETY: DR7 stays off.
    unsafe { asm!("mov dr0, {0}", "mov dr1, {0}", in(reg) 0x1234_5678u64) };
    smp::note(index, 0, 1);
    loop {
        core::hint::spin_loop();
    }
}

fn halt(index: usize) {
    smp::note(index, 0, 1);
    cpu::halt();
}

/// In VMX root operation an INIT waits: for the next guest, which it takes out, or for VMXOFF. Bochs itself forgets such an
/// INIT, so there is nothing to compare with.
fn blocked(ids: &[u32]) {
    let (index, id) = (1, ids[1]);
    smp::give(index, |index| {
        guest::enter_vmx();
        let guest = guest::Guest::make(index, 1, Controls::default());
        smp::note(index, 0, 1);
        smp::wait_for_note(0, 0);
        guest.start(guest::read_memory, pages::address(pages::page()), false);
        smp::note(index, 1, guest.run().word());
        smp::note(index, 2, vmx::read(f::EXIT_REASON));
        smp::note(index, 3, guest.run().word());
        smp::note(index, 4, 1);
        // Until here the second INIT waits.
        smp::wait_for_note(0, 1);
        smp::note(index, 5, 1);
        vmx::vmxoff();
        smp::note(index, 6, 1);
    });
    smp::wait_for_note(index, 0);
    apic::send(id, apic::message::INIT);
    smp::pause(10_000);
    smp::note(0, 0, 1);
    smp::wait_for_note(index, 4);
    if smp::noted(index, 2) != INIT_SIGNAL {
        report::fail(format_args!(
            "an INIT in VMX root operation does not take out the next guest: {:#x}",
            smp::noted(index, 1)
        ));
    }
    if smp::noted(index, 3) != 0 {
        report::fail(format_args!("the guest does not go on after an INIT: {:#x}", smp::noted(index, 3)));
    }
    apic::send(id, apic::message::INIT);
    smp::pause(10_000);
    smp::note(0, 1, 1);
    smp::wait_for_note(index, 5);
    smp::pause(100_000);
    if smp::noted(index, 6) != 0 {
        report::fail(format_args!("an INIT in VMX root operation does not wait for VMXOFF"));
    }
    if !smp::start(index, id) {
        report::fail(format_args!("the CPU that an INIT reset after VMXOFF does not start"));
    }
    smp::clear_notes();
}

/// INIT to the CPU that booted: it comes back through firmware. Then the end.
pub fn restart_first() -> ! {
    smp::restart_first(|index| {
        let mut out = Serial;
        let mut check = Check::new(&mut out, "the CPU that booted again").fact("cpu", index);
        for (word, key) in
            STATE.iter().enumerate().filter(|(_, key)| matches!(**key, "cr0" | "cr3" | "cr4" | "efer" | "dr7"))
        {
            check = check.fact(key, Hex(u64::from(smp::state(word))));
        }
        check.fact("bsp", cpu::rdmsr(0x1B) >> 8 & 1).end();
        crate::end()
    })
}

/// With `parked`: the other CPUs must not come.
pub fn parked(ids: &[u32]) {
    let mut came = 0;
    for (index, id) in ids.iter().enumerate().skip(1) {
        came += u32::from(smp::start(index, *id));
    }
    Check::new(&mut Serial, "parked CPUs").expect("came", came, 0).fact("listed", ids.len()).end();
}
