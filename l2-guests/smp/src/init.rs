//! INIT and start-up: the state in which a CPU begins, for the first time and after it was used.

use crate::{cpus, guest, machine_checks};
use core::arch::asm;
use l2_kit::{
    Check, apic, cpu, fields as f, log, pages,
    protocol::Hex,
    report,
    serial::Serial,
    setup::Controls,
    smp::{self, STATE},
    vmx,
};

/// Basic exit reason INIT signal.
const INIT_SIGNAL: u64 = 3;
/// Instructions between an INIT and the start-up message that must be taken, and steps of the search.
const MOST_GAP: u32 = 200;
const STEP: usize = 10;
/// Turns between two start-up messages after an INIT: 10 us at 100 MHz are 1,000 instructions.
const HASTE: u32 = 300;

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
        smp::spin_at_offset_0(*id);
        start_one("again from a loop at offset 0", index, *id);
        Check::new(&mut Serial, "start in haste")
            .fact("cpu", index)
            .expect("came", smp::start_in_haste(index, *id, HASTE), true)
            .end();
    }
    gap(ids);
    blocked(ids);
    behind_the_entry(ids);
    let own = cpu::rdmsr(0x1B) >> 8 & 1;
    smp::run_on_all(cpus(), |index| smp::note(index, 0, cpu::rdmsr(0x1B) >> 8 & 1));
    crate::print("again: the CPU that booted", &["bsp"]);
    Check::new(&mut Serial, "again: CPU 0").expect("bsp", own, 1).end();
}

/// One start-up message after an INIT, each time a little later: from which gap on it is taken. A processor takes time for an
/// INIT, too, and what comes meanwhile is lost; operating systems wait 10 us at least before the second message.
fn gap(ids: &[u32]) {
    let (index, id) = (1, ids[1]);
    let mut first = 0;
    for gap in (0..=MOST_GAP).step_by(STEP) {
        // Each gap three times: it must always come.
        let good = (0..3).all(|_| {
            smp::start(index, id);
            smp::start_after(index, id, gap)
        });
        first = match (good, first) {
            (true, 0) => gap + 1,
            (true, first) => first,
            (false, _) => 0,
        };
    }
    smp::start(index, id);
    log!("a start-up message behind an INIT comes in time after {first} instructions");
    Check::new(&mut Serial, "start-up behind an INIT").expect("in_time", first != 0, true).end();
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

/// In VMX root operation an INIT waits: for the next guest, which it takes out, or for VMXOFF.
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

/// How L3 is entered while an INIT waits, and whether the entry fails first.
struct Entry {
    name: &'static str,
    fields: &'static [(u32, u64)],
    area: Option<(u32, u64)>,
    fails: Option<u64>,
}

const VALID: u64 = 1 << 31;
const INTERRUPT: u64 = VALID | 0x60;
const PENDING_TRAP_FLAG: u64 = VALID | 7 << 8;
const PLAIN: Entry = Entry { name: "nothing", fields: &[], area: None, fails: None };

const ENTRIES: [Entry; 8] = [
    PLAIN,
    Entry {
        name: "an interrupt",
        fields: &[(f::ENTRY_INTERRUPTION_INFO, INTERRUPT), (f::GUEST_RFLAGS, 0x202)],
        ..PLAIN
    },
    Entry { name: "a pending trap flag", fields: &[(f::ENTRY_INTERRUPTION_INFO, PENDING_TRAP_FLAG)], ..PLAIN },
    Entry { name: "a halted guest", fields: &[(f::GUEST_ACTIVITY, 1)], ..PLAIN },
    Entry { name: "blocking by MOV SS", fields: &[(f::GUEST_INTERRUPTIBILITY, 2)], ..PLAIN },
    Entry { name: "an MSR area", area: Some((cpu::LSTAR, 0x1234)), ..PLAIN },
    Entry { name: "an MSR area that fails", area: Some((cpu::FS_BASE, 0)), fails: Some(FAILED | 34), ..PLAIN },
    Entry { name: "bad guest state", fields: &[(f::GUEST_RFLAGS, 0)], fails: Some(FAILED | 33), ..PLAIN },
];
const FAILED: u64 = 1 << 31;

/// An INIT that waits for an entry is taken after it: state is checked and loaded, and the event delivered; an entry that
/// fails leaves it waiting (SDM "Overview of VM-Entry Operation", the order of steps, "Event Injection").
fn behind_the_entry(ids: &[u32]) {
    /// Words of the CPU: which entry it is at; the number of the first that went wrong, and where.
    const AT: usize = 8;
    const WRONG: usize = 9;
    let (index, id) = (1, ids[1]);
    smp::give(index, |index| {
        guest::enter_vmx();
        let guest = guest::Guest::make(index, 1, Controls::default());
        let area = core::ptr::from_mut(pages::page()).cast::<u64>();
        vmx::write(f::ENTRY_MSR_LOAD_ADDR, area as u64);
        for (number, entry) in (1..).zip(&ENTRIES) {
            guest.start(guest::read_memory, pages::address(pages::page()), false);
            let began = [f::GUEST_RIP, f::GUEST_RSP].map(vmx::read);
            entry.fields.iter().for_each(|(field, value)| vmx::write(*field, *value));
            if let Some((msr, value)) = entry.area {
                // SAFETY: a page of ours.
                unsafe { (area.write_volatile(msr.into()), area.add(1).write_volatile(value)) };
                vmx::write(f::ENTRY_MSR_LOAD_COUNT, 1);
            }
            smp::note(index, AT, number);
            smp::until(u32::MAX, || smp::noted(0, AT) == number);
            let before = cpu::rdmsr(cpu::LSTAR);
            let mut right = true;
            if let Some(reason) = entry.fails {
                guest.run();
                right &= vmx::read(f::EXIT_REASON) == reason;
                vmx::write(f::ENTRY_MSR_LOAD_COUNT, 0);
                vmx::write(f::GUEST_RFLAGS, 2);
            }
            guest.run();
            right &= vmx::read(f::EXIT_REASON) == INIT_SIGNAL && vmx::read(f::EXIT_QUALIFICATION) == 0;
            right &= (vmx::read(f::ENTRY_INTERRUPTION_INFO) | vmx::read(f::IDT_VECTORING_INFO)) & VALID == 0;
            right &= vmx::read(f::EXIT_INTERRUPTION_INFO) & VALID == 0;
            let now = [f::GUEST_RIP, f::GUEST_RSP].map(vmx::read);
            // An interrupt pushed five words on the aligned stack, and the guest is at its handler.
            let delivered = now[0] != began[0] && now[1] == (began[1] & !15) - 40;
            right &= if entry.name == "an interrupt" { delivered } else { now == began };
            let loaded = entry.area.filter(|_| entry.fails.is_none()).map_or(before, |(_, value)| value);
            right &= cpu::rdmsr(cpu::LSTAR) == loaded;
            right &= vmx::read(f::GUEST_ACTIVITY) == u64::from(entry.name == "a halted guest");
            if !right && smp::noted(index, WRONG) == 0 {
                smp::note(index, WRONG, number);
                smp::note(index, WRONG + 1, vmx::read(f::EXIT_REASON));
                smp::note(index, WRONG + 2, now[0]);
            }
            cpu::wrmsr(cpu::LSTAR, 0);
            vmx::write(f::ENTRY_MSR_LOAD_COUNT, 0);
        }
        vmx::vmxoff();
        smp::note(index, AT, u64::MAX);
    });
    for number in 1..=ENTRIES.len() as u64 {
        smp::until(u32::MAX, || smp::noted(index, AT) == number);
        apic::send(id, apic::message::INIT);
        smp::pause(10_000);
        smp::note(0, AT, number);
    }
    smp::until(u32::MAX, || smp::noted(index, AT) == u64::MAX);
    smp::wait(index);
    let wrong = smp::noted(index, WRONG);
    if let Some(entry) = ENTRIES.get((wrong as usize).wrapping_sub(1)) {
        report::fail(format_args!(
            "an INIT that waits for an entry with {}: reason {:#x}, RIP {:#x}",
            entry.name,
            smp::noted(index, WRONG + 1),
            smp::noted(index, WRONG + 2)
        ));
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
    // They hear of them too, and a CPU that does not end one shuts the machine down at the next.
    Check::new(&mut Serial, "machine checks beside parked CPUs")
        .expect("came", machine_checks::on_this_alone(20), 20)
        .end();
}
