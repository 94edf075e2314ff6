//! A hypervisor of your own: it runs one guest, which asks for CPUID, and ends. Change it, then `./nvmx run --l2 .` again.
#![no_std]
#![no_main]

use core::arch::global_asm;
use l2_kit::protocol::{Hex, Kind};
use l2_kit::setup::{self, Controls, entry_controls, primary};
use l2_kit::vcpu::Vcpu;
use l2_kit::vmx::{self, reason};
use l2_kit::{BootInfo, Check, fields as f, pages, report, serial::Serial};

l2_kit::entry!(main);

// The guest, L3: it asks for CPUID, says hello with the answer in EBX, and is done.
global_asm!(".global my_guest", "my_guest:", "mov eax, 0x4c33", "cpuid", "mov eax, 1", "vmcall", "ud2");

unsafe extern "C" {
    fn my_guest();
}

/// The answer to the guest's CPUID.
const ANSWER: u64 = 0x2A;

/// The kit prints `@L2 end` when this returns: passed, unless something called `report::fail`.
fn main(_info: &BootInfo) {
    report::record(Kind::Hello, &[("name", &"l2"), ("version", &env!("CARGO_PKG_VERSION"))]);
    if let Err(missing) = setup::enter_vmx() {
        return report::fail(format_args!("{missing}"));
    }
    let mut vcpu = match Vcpu::new(setup::revision()) {
        Ok(vcpu) => vcpu,
        Err(outcome) => return report::fail(format_args!("VMCLEAR or VMPTRLD: {outcome:?}")),
    };
    // HLT exits; the guest is a 64-bit one.
    let wanted = Controls { primary: primary::HLT, entry: entry_controls::IA32E, ..Controls::default() };
    if let Err(missing) = setup::write_controls(&wanted) {
        return report::fail(format_args!("{missing}"));
    }
    setup::write_host_state();
    setup::write_guest_state(pages::identity_tables(pages::Access::Kernel), true);
    vmx::write(f::GUEST_RIP, my_guest as *const () as u64);
    vmx::write(f::GUEST_RSP, pages::take(4096, 4096) + 4096);
    loop {
        if vcpu.run().is_err() {
            let error = vmx::read(f::INSTRUCTION_ERROR);
            return report::fail(format_args!("the VM entry failed with error {error}"));
        }
        let (exit, qualification) = (vmx::read(f::EXIT_REASON), vmx::read(f::EXIT_QUALIFICATION));
        // A record that must be the same on the bare machine and under nvmx.
        Check::new(&mut Serial, "exit").fact("reason", Hex(exit)).fact("qualification", Hex(qualification)).end();
        match exit as u32 {
            reason::CPUID => vcpu.registers.rbx = ANSWER,
            reason::VMCALL if vcpu.registers.rbx == ANSWER => return report::say("Hello from L2: my guest called."),
            other => return report::fail(format_args!("an exit that I do not know: {other:#x}")),
        }
        // After the instruction.
        vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
    }
}
