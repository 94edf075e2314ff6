//! Events that reach a CPU while its guest runs: interrupts and NMIs from another CPU, its own timer, INIT.

use crate::{
    cpus,
    guest::{self, Guest, spin},
    messages::{INTERRUPTS, NMIS, VECTOR, set_hooks},
};
use core::arch::asm;
use l2_kit::{
    apic, cpu, fields as f, pages,
    setup::{Controls, exit_controls, pin},
    smp, vmx,
};

/// The word at which guests spin, per CPU: a note that CPU 0 sets.
const GATE: usize = 13;
/// The guest runs.
const READY: usize = 12;

/// On every CPU but the first, which sends.
pub fn all(ids: &[u32]) {
    set_hooks();
    smp::run_on_all(cpus(), |_| {
        if cpu::cr4() & cpu::CR4_VMXE == 0 {
            guest::enter_vmx();
        }
    });
    for (name, job, message) in [
        ("an interrupt takes the guest out", taken_out as smp::Job, apic::message::interrupt(VECTOR)),
        ("an interrupt is acknowledged by the exit", acknowledged, apic::message::interrupt(VECTOR)),
        ("an interrupt goes to the guest", to_the_guest, apic::message::interrupt(VECTOR)),
        ("an NMI takes the guest out", nmi_taken_out, apic::message::NMI),
        ("an NMI goes to the guest", to_the_guest, apic::message::NMI),
        ("an INIT takes the guest out", init, apic::message::INIT),
    ] {
        for (index, id) in ids.iter().enumerate().skip(1) {
            smp::give(index, job);
            smp::wait_for_note(index, READY);
            smp::pause(2000);
            apic::send(*id, message);
            smp::pause(20_000);
            smp::note(index, GATE, 1);
            smp::wait(index);
            smp::note(index, 2, smp::noted(index, INTERRUPTS));
            smp::note(index, 3, smp::noted(index, NMIS));
        }
        crate::print(name, &["exit", "info", "interrupts", "nmis", "went_on"]);
    }
    (1..cpus()).for_each(|index| smp::run_on(index, timer));
    crate::print("a timer takes the guest out", &["exit", "vector"]);
}

/// A guest that spins at its gate, entered: what ended that is left.
fn enter(index: usize, controls: Controls) -> &'static mut Guest {
    let guest = Guest::make(index, 0x200 + index as u64, controls);
    guest.start(gate, index as u64, true);
    smp::note(index, 0, guest.run().word());
    smp::note(index, 1, vmx::read(f::EXIT_INTERRUPTION_INFO));
    guest
}

/// The program: waits for CPU 0.
extern "C" fn gate(index: u64) -> u64 {
    // From here on nothing is touched that was not touched before: no exit disturbs.
    smp::note(index as usize, READY, 1);
    while smp::noted(index as usize, GATE) == 0 {
        core::hint::spin_loop();
    }
    0x600D
}

/// Takes what is pending, as the hypervisor.
fn take_interrupt() {
    // SAFETY: the hook returns.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

fn taken_out(index: usize) {
    let guest = enter(index, Controls { pin: pin::EXTERNAL_INTERRUPT, ..Default::default() });
    // The exit does not say which interrupt it was.
    smp::note(index, 1, 0);
    take_interrupt();
    smp::note(index, 4, guest.run().word());
}

fn acknowledged(index: usize) {
    let exit = exit_controls::ACKNOWLEDGE;
    let guest = enter(index, Controls { pin: pin::EXTERNAL_INTERRUPT, exit, ..Default::default() });
    apic::eoi();
    smp::note(index, 4, guest.run().word());
}

fn to_the_guest(index: usize) {
    enter(index, Controls::default());
    smp::note(index, 1, 0);
}

fn nmi_taken_out(index: usize) {
    let guest = enter(index, Controls { pin: pin::NMI, ..Default::default() });
    // NMIs are blocked since the exit: an IRET ends that, in the hook of one's own NMI.
    // SAFETY: a far return of its own kind: the frame is complete.
    unsafe {
        asm!(
            "mov {t}, rsp", "push {ss}", "push {t}", "pushfq", "push {cs}", "lea {t}, [rip + 2f]", "push {t}", "iretq", "2:",
            t = out(reg) _, ss = in(reg) 0x10u64, cs = in(reg) 0x08u64,
        );
    }
    smp::note(index, 4, guest.run().word());
}

fn init(index: usize) {
    let guest = enter(index, Controls::default());
    smp::note(index, 1, 0);
    smp::note(index, 4, guest.run().word());
}

fn timer(index: usize) {
    let exit = exit_controls::ACKNOWLEDGE;
    let guest = Guest::make(index, 0x200, Controls { pin: pin::EXTERNAL_INTERRUPT, exit, ..Default::default() });
    let never = pages::address(pages::page());
    guest.start(spin, never, true);
    apic::start_timer(VECTOR, 20_000);
    smp::note(index, 0, guest.run().word());
    smp::note(index, 1, vmx::read(f::EXIT_INTERRUPTION_INFO));
    apic::eoi();
}
