//! One harmless MSR in a tight loop: intercepted, then let through by clearing its bits in the MSR bitmap.
//!
//! Mechanism: SDM "VM-Execution Control Fields", "MSR-Bitmap Address". A bit each for reading and for writing each MSR; the
//! CPU looks at it before it exits. Under nvmx the guest runs by a bitmap merged from nvmx's and its hypervisor's.

use crate::{
    guest::repeat,
    record::{Stop, native},
    vm::{Vm, advance, intercept, plain},
};
use l2_kit::{cpu::CSTAR, vmx::reason as r};

/// IA32_CSTAR: 64-bit code never uses it.
const MSR: u32 = CSTAR;
const EVENTS: u64 = 1000;

pub fn run() -> Result<(), Stop> {
    let mut vm = Vm::with_ept(&plain())?;
    let mut value = 0;
    let mut emulate = |vm: &mut Vm, reason: u32| {
        match reason {
            r::RDMSR => vm.vcpu.registers.set_edx_eax(value),
            r::WRMSR => value = vm.vcpu.registers.edx_eax(),
            _ => return false,
        }
        advance();
        true
    };
    native("rdmsr", EVENTS, read);
    native("wrmsr", EVENTS, write);
    intercept(MSR, true, true);
    vm.row("rdmsr_intercepted", EVENTS, read, &mut emulate)?;
    vm.row("wrmsr_intercepted", EVENTS, write, &mut emulate)?;
    intercept(MSR, false, false);
    vm.row("rdmsr_passed", EVENTS, read, &mut emulate)?;
    vm.row("wrmsr_passed", EVENTS, write, &mut emulate)
}

fn read(count: u64) {
    repeat!(count, "rdmsr", in("ecx") MSR, out("eax") _, out("edx") _);
}

fn write(count: u64) {
    repeat!(count, "wrmsr", in("ecx") MSR, in("eax") 0x1000, in("edx") 0);
}
