//! One exit with ever more hypervisors below the guest: the harness boots this under one nvmx, two, three.
//!
//! Mechanism: SDM "VMX Non-Root Operation": VMRESUME, VMPTRLD and VMCLEAR always exit, VMREAD and VMWRITE unless VMCS shadowing
//! serves them. Each hypervisor's handler runs as a guest of the one below, which pays for every such instruction.

use crate::{
    record::{self, Stop, WARM_UP},
    vm::{Vm, advance, answer_cpuid, plain},
};
use core::{arch::asm, ptr::write_volatile};
use l2_kit::{
    Global, apic, cpu,
    ept::rights,
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{exit_controls, pin},
    vmx::{self, reason as r},
};

const EVENTS: u64 = 200;
const WALKS: u64 = 10_000;
const VECTOR: u8 = 0x51;
static INTERRUPTS: Global<u64> = Global::new(0);
static HOLE: Global<u64> = Global::new(0);

pub fn run() -> Result<(), Stop> {
    HOLE.set(pages::take(LARGE, LARGE));
    let mut controls = plain();
    controls.pin |= pin::EXTERNAL_INTERRUPT;
    controls.exit |= exit_controls::ACKNOWLEDGE;
    let mut vm = Vm::with_ept(&controls)?;
    if let Some(ept) = &vm.ept {
        (HOLE.get()..HOLE.get() + LARGE).step_by(PAGE as usize).for_each(|page| ept.unmap(page, PAGE));
    }
    let answer = cpu::cpuid(0, 0);
    let handler = &mut |vm: &mut Vm, reason: u32| {
        match reason {
            r::CPUID => answer_cpuid(vm, answer),
            r::EXTERNAL_INTERRUPT => {
                INTERRUPTS.set(INTERRUPTS.get() + 1);
                apic::eoi();
            }
            r::EPT_VIOLATION => {
                let page = vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1);
                if let Some(ept) = &vm.ept {
                    ept.map(page, PAGE, rights::RWX);
                }
            }
            r::VMCALL => advance(),
            _ => return false,
        }
        true
    };
    vm.row("cpuid", EVENTS, cpuids, handler)?;
    vm.row("interrupt", EVENTS, interrupts, handler)?;
    vm.row("ept_violation", EVENTS, touch, handler)?;
    // It costs the same at every depth, so that it need not be limited.
    vm.run(WALKS, WARM_UP, walk, handler)?;
    record::row("page_walk", "l3", WALKS, &vm.bracket, &[]);
    Ok(())
}

fn cpuids(count: u64) {
    for _ in 0..count {
        cpu::cpuid(0, 0);
        // SAFETY: no instruction; keeps the loop from being thrown away.
        unsafe { asm!("", options(nostack)) };
    }
}

/// Sends itself an interrupt and waits until its hypervisor took it.
fn interrupts(count: u64) {
    // SAFETY: the hypervisor takes all interrupts.
    unsafe { asm!("sti", options(nostack)) };
    for _ in 0..count {
        let before = INTERRUPTS.get();
        apic::send_self(VECTOR);
        while INTERRUPTS.get() == before {
            // SAFETY: the handler changes the count behind the compiler's back.
            unsafe { asm!("pause", options(nostack)) };
        }
    }
    // SAFETY: back to how it was.
    unsafe { asm!("cli", options(nostack)) };
}

/// Makes the CPU walk all tables of a page: INVLPG is the guest's own with EPT.
fn walk(count: u64) {
    let page = pages::address(pages::page());
    for _ in 0..count {
        // SAFETY: a page of this image.
        unsafe {
            asm!("invlpg [{page}]", "mov {value}, [{page}]", page = in(reg) page, value = out(reg) _, options(nostack))
        };
    }
}

/// Touches pages that its hypervisor has not given it yet.
fn touch(count: u64) {
    for _ in 0..count {
        let page = HOLE.get();
        // SAFETY: the page is set aside for this.
        unsafe { write_volatile(page as *mut u64, page) };
        HOLE.set(page + PAGE);
    }
}
