//! What an exit costs: the instructions that always exit, and RDTSC with and without its control.
//!
//! Mechanism: SDM "VMX Non-Root Operation", "Instructions That Cause VM Exits". The handlers do the least that a hypervisor
//! can do. The emulated processor takes no time for the switch of worlds itself, so instructions alone hide it; the harness
//! adds it by a model, or measures cycles where there is a real processor.

use crate::{
    guest::{call, repeat},
    record::{Stop, native},
    vm::{Vm, advance, answer_cpuid, answer_rdtsc, plain},
};
use core::arch::asm;
use l2_kit::{cpu, setup::primary, vmx::reason as r};

const EVENTS: u64 = 1000;

pub fn run() -> Result<(), Stop> {
    native("rdtsc", EVENTS, rdtsc);
    native("cpuid", EVENTS, cpuid);
    let answer = cpu::cpuid(0, 0);
    let mut emulate = |vm: &mut Vm, reason: u32| {
        match reason {
            r::CPUID => answer_cpuid(vm, answer),
            r::RDTSC => answer_rdtsc(vm),
            r::VMCALL => advance(),
            _ => return false,
        }
        true
    };
    let mut vm = Vm::with_ept(&plain())?;
    vm.row("rdtsc_passed", EVENTS, rdtsc, &mut emulate)?;
    vm.row("cpuid", EVENTS, cpuid, &mut emulate)?;
    vm.row("vmcall", EVENTS, vmcall, &mut emulate)?;
    let mut controls = plain();
    controls.primary |= primary::RDTSC;
    Vm::with_ept(&controls)?.row("rdtsc", EVENTS, rdtsc, &mut emulate)
}

/// The program that does little else: it reads the clock.
fn rdtsc(count: u64) {
    repeat!(count, "rdtsc", out("eax") _, out("edx") _);
}

fn cpuid(count: u64) {
    for _ in 0..count {
        cpu::cpuid(0, 0);
        // SAFETY: no instruction; keeps the loop from being thrown away.
        unsafe { asm!("", options(nostack)) };
    }
}

fn vmcall(count: u64) {
    for _ in 0..count {
        call(0, 0, 0);
    }
}
