//! System calls: in a guest no exit; under ring compression two detours through the monitor; and beside them the hypercall.
//!
//! Mechanism: SDM "Fast System Calls in 64-Bit Mode". SYSCALL always goes to ring 0, SYSRET raises #GP outside of it: a kernel
//! in ring 1 gets each system call of its programs from the monitor and needs the monitor to go back. In VMX non-root
//! operation the guest has a ring 0 of its own, and neither instruction causes a VM exit.

use crate::{
    guest::call,
    record::{Stop, native},
    rings::{self, GDT_LIMIT, RING1, RING3, STAR},
    vm::{Vm, advance, plain},
};
use core::arch::global_asm;
use l2_kit::{
    Global,
    cpu::{self, EFER, LSTAR},
    fields as f,
    trap::{self, Frame, GP},
    vmx::{self, reason as r},
};

const EVENTS: u64 = 1000;
const SYSCALL_MASK: u32 = 0xC000_0084;

// The program in ring 3: RDI system calls, then INT3.
global_asm!("lab_user: 1: syscall; dec rdi; jnz 1b; int3");
// A kernel in ring 0: it goes back at once.
global_asm!("lab_kernel_entry: sysretq");
// The monitor in ring 0: it passes the call on to the kernel in ring 1. RSP is still the program's: in ring 1 it is good enough
// for a kernel that needs no stack.
global_asm!(
    "lab_monitor_entry:",
    "mov r8, rsp",
    "push {data}; push r8; push 2; push {code}; lea rax, [rip + lab_kernel_entry]; push rax",
    "iretq",
    data = const RING1.data, code = const RING1.code,
);
unsafe extern "C" {
    fn lab_user();
    fn lab_kernel_entry();
    fn lab_monitor_entry();
}

static GDT: Global<u64> = Global::new(0);

/// Ring 3 makes `count` system calls to the entry point at `entry`.
fn system_calls(count: u64, entry: u64) {
    cpu::wrmsr(EFER, cpu::rdmsr(EFER) | 1);
    cpu::wrmsr(0xC000_0081, STAR);
    cpu::wrmsr(SYSCALL_MASK, rings::IF);
    cpu::wrmsr(LSTAR, entry);
    rings::load_gdt(GDT.get(), GDT_LIMIT);
    rings::run(RING3, true, lab_user as *const () as u64, count, 0);
}

fn plain_calls(count: u64) {
    system_calls(count, lab_kernel_entry as *const () as u64);
}

fn compressed_calls(count: u64) {
    trap::hook(GP, Some(emulate_sysret));
    system_calls(count, lab_monitor_entry as *const () as u64);
    trap::hook(GP, None);
}

/// SYSRET of a kernel in ring 1, by its monitor. RCX is the kernel's, as SYSCALL left it.
fn emulate_sysret(frame: &mut Frame) -> bool {
    // SAFETY: the kernel's code is mapped one to one.
    let code = unsafe { *(frame.rip as *const [u8; 3]) };
    if frame.cs & 3 != 1 || code != [0x48, 0x0F, 0x07] {
        return false;
    }
    (frame.rip, frame.cs, frame.ss) = (frame.rcx, RING3.code.into(), RING3.data.into());
    true
}

pub fn run() -> Result<(), Stop> {
    GDT.set(rings::gdt());
    native("nothing", 1, |_| plain_calls(1));
    native("syscall", EVENTS, plain_calls);
    native("syscall_ring1", EVENTS, compressed_calls);
    rings::restore();
    let mut vm = Vm::with_ept(&plain())?;
    vmx::write(f::GUEST_GDTR_BASE, GDT.get());
    vmx::write(f::GUEST_GDTR_LIMIT, GDT_LIMIT.into());
    let handler = &mut |_: &mut Vm, reason| {
        advance();
        reason == r::VMCALL
    };
    vm.row("nothing", 1, |_| plain_calls(1), handler)?;
    vm.row("syscall", EVENTS, plain_calls, handler)?;
    vm.row("hypercall", EVENTS, hypercalls, handler)
}

fn hypercalls(count: u64) {
    for _ in 0..count {
        call(0, 0, 0);
    }
}
