//! Exits that watch: what a hypervisor can forbid its guest's kernel, what that costs while nothing happens, and a rootkit
//! that is found out.
//!
//! Mechanism: SDM "EPT Violations" (rights of a page: code that cannot be written, an IDT that cannot be written, code that
//! can be executed and not read), "Guest/Host Masks and Read Shadows for CR0 and CR4", "MSR-Bitmap Address".

use crate::{
    guest::repeat,
    record::{self, Stop, WARM_UP},
    rings,
    store::{emulate, store},
    vm::{Vm, advance, extended_features, intercept, plain},
};
use core::{arch::asm, ptr::read_volatile};
use l2_kit::{
    Global, caps,
    cpu::{self, LSTAR},
    ept::rights,
    fields as f,
    pages::{self, PAGE},
    setup, trap,
    vmx::{self, reason as r},
};

const EVENTS: u64 = 1000;
const CR0_WP: u64 = 1 << 16;
const CR4_PGE: u64 = 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const RET: u8 = 0xC3;

/// The guest's code page, its execute-only page (code with a secret in it), its IDT.
static CODE: Global<u64> = Global::new(0);
static SECRET: Global<u64> = Global::new(0);
static IDT: Global<u64> = Global::new(0);

/// What the hypervisor was alarmed by, a bit each.
mod alarm {
    pub const CODE: u64 = 1 << 0;
    pub const IDT: u64 = 1 << 1;
    pub const SECRET: u64 = 1 << 2;
    pub const CR4: u64 = 1 << 3;
    pub const CR0: u64 = 1 << 4;
    pub const MSR: u64 = 1 << 5;
}

pub fn run() -> Result<(), Stop> {
    IDT.set(rings::idt());
    for page in [&CODE, &SECRET] {
        page.set(pages::take(PAGE, PAGE));
        // SAFETY: fresh memory.
        unsafe { (page.get() as *mut u8).write(RET) };
    }
    trap::hook(trap::BP, Some(|_| true));
    let result = open_and_guarded();
    trap::hook(trap::BP, None);
    result
}

/// A name, and what tampers so many times.
type Attack = (&'static str, fn(u64));

fn open_and_guarded() -> Result<(), Stop> {
    let mut open = Vm::with_ept(&plain())?;
    state();
    open.row("ordinary_open", EVENTS, ordinary, &mut |_, _| false)?;
    open.run(1, 0, rootkit, &mut |_, _| false)?;
    record::row("rootkit_open", "l3", 1, &open.bracket, &[("alarms", 0), ("harm", harm())]);
    repair();

    let mut vm = Vm::with_ept(&plain())?;
    state();
    guard(&vm);
    vm.row("ordinary_guarded", EVENTS, ordinary, &mut |_, _| false)?;
    let attacks: [Attack; 6] = [
        ("patch_code", patch_code),
        ("patch_idt", patch_idt),
        ("read_secret", read_secret),
        ("clear_smep", clear_smep),
        ("clear_wp", clear_wp),
        ("write_lstar", write_lstar),
    ];
    if !has_smep() {
        record::missing("CR4.SMEP");
    }
    for (name, attack) in attacks.into_iter().filter(|(name, _)| *name != "clear_smep" || has_smep()) {
        let mut alarms = 0;
        let count = record::events(EVENTS);
        vm.run(count, WARM_UP, attack, &mut |vm, reason| watch(vm, reason, &mut alarms))?;
        record::row(name, "l3", count, &vm.bracket, &[("alarms", alarms), ("harm", harm())]);
    }
    let mut alarms = 0;
    vm.run(1, 0, rootkit, &mut |vm, reason| watch(vm, reason, &mut alarms))?;
    record::row("rootkit_guarded", "l3", 1, &vm.bracket, &[("alarms", alarms), ("harm", harm())]);
    Ok(())
}

/// The guest's IDT and control registers.
fn state() {
    vmx::write(f::GUEST_IDTR_BASE, IDT.get());
    vmx::write(f::GUEST_CR0, vmx::read(f::GUEST_CR0) | CR0_WP);
    if has_smep() {
        vmx::write(f::GUEST_CR4, vmx::read(f::GUEST_CR4) | CR4_SMEP);
    }
}

fn has_smep() -> bool {
    extended_features().0 & 1 << 7 != 0
}

fn guard(vm: &Vm) {
    let execute_only = caps::get(setup::VMX_EPT_VPID_CAP) & 1 != 0;
    if let Some(ept) = &vm.ept {
        ept.map(CODE.get(), PAGE, rights::R | rights::X);
        ept.map(IDT.get(), PAGE, rights::R);
        if execute_only {
            ept.map(SECRET.get(), PAGE, rights::X);
        } else {
            record::missing("execute-only pages");
        }
    }
    // A write exits if it changes one of these bits; other bits stay the guest's.
    vmx::write(f::CR0_MASK, CR0_WP);
    vmx::write(f::CR0_SHADOW, CR0_WP);
    vmx::write(f::CR4_MASK, CR4_SMEP);
    vmx::write(f::CR4_SHADOW, vmx::read(f::GUEST_CR4));
    intercept(LSTAR, false, true);
}

/// The hypervisor refuses what exits and skips it.
fn watch(vm: &mut Vm, reason: u32, alarms: &mut u64) -> bool {
    *alarms |= match reason {
        r::EPT_VIOLATION => {
            let page = vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1);
            if page == SECRET.get() {
                // MOV RAX, [RDI]
                vm.vcpu.registers.rax = 0;
                vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + 3);
                alarm::SECRET
            } else {
                let Some(_) = emulate(vm) else { return false };
                if page == CODE.get() { alarm::CODE } else { alarm::IDT }
            }
        }
        r::CR_ACCESS => {
            let cr4 = vmx::read(f::EXIT_QUALIFICATION) & 0xF == 4;
            advance();
            if cr4 { alarm::CR4 } else { alarm::CR0 }
        }
        r::WRMSR => {
            advance();
            alarm::MSR
        }
        _ => return false,
    };
    true
}

/// What an honest kernel does with all of them: calls, a trap through the IDT, a read of the MSR, bits that nobody guards.
fn ordinary(count: u64) {
    for _ in 0..count {
        for page in [CODE.get(), SECRET.get()] {
            // SAFETY: a page with RET.
            unsafe { asm!("call {}", in(reg) page) };
        }
        // SAFETY: the image has a handler.
        unsafe { asm!("int3", options(nostack)) };
        cpu::rdmsr(LSTAR);
        cpu::set_cr4(cpu::cr4() ^ CR4_PGE);
    }
}

fn patch_code(count: u64) {
    (0..count).for_each(|_| store(CODE.get(), u64::from(RET) | 0x9090_9090 << 8));
}

fn patch_idt(count: u64) {
    (0..count).for_each(|_| store(IDT.get(), 0xBAD));
}

fn read_secret(count: u64) {
    repeat!(count, "mov rax, [rdi]", in("rdi") SECRET.get(), out("rax") _);
}

fn clear_smep(count: u64) {
    (0..count).for_each(|_| cpu::set_cr4(cpu::cr4() & !CR4_SMEP));
}

fn clear_wp(count: u64) {
    (0..count).for_each(|_| cpu::set_cr0(cpu::cr0() & !CR0_WP));
}

fn write_lstar(count: u64) {
    (0..count).for_each(|_| cpu::wrmsr(LSTAR, 0xBAD));
}

/// It hides in code, hooks an interrupt and the system call, turns two protections off, and reads what it must not.
fn rootkit(_: u64) {
    for step in [patch_code, patch_idt, clear_smep, clear_wp, write_lstar, read_secret] {
        step(1);
    }
}

/// How many of its changes to memory are there.
fn harm() -> u64 {
    // SAFETY: pages of this image.
    let changed = |page: u64, honest: u64| unsafe { read_volatile(page as *const u64) } != honest;
    // SAFETY: as above.
    let gate = unsafe { read_volatile(trap::idt_base() as *const u64) };
    u64::from(changed(CODE.get(), RET.into())) + u64::from(changed(IDT.get(), gate))
}

fn repair() {
    // SAFETY: pages of this image.
    unsafe {
        (CODE.get() as *mut u64).write_volatile(RET.into());
        (IDT.get() as *mut u64).write_volatile(read_volatile(trap::idt_base() as *const u64));
    }
    cpu::wrmsr(LSTAR, 0);
}
