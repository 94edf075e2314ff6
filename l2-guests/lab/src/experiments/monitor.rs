//! A trap-and-emulate monitor, and a tiny kernel that it runs in ring 1.
//!
//! Mechanism: what a virtual machine monitor did before VMX. The kernel was written for ring 0. Each privileged instruction
//! raises #GP in ring 1; the monitor emulates it on the kernel's virtual state and skips it. The kernel checks
//! things that a kernel relies on and writes down what it found. As a guest of VMX all of them hold.

use crate::{
    record::{self, Bracket, Stop},
    rings::{self, GDT_LIMIT, RING0, RING1, Ring},
    vm::{Vm, advance, extended_features, plain},
};
use core::arch::global_asm;
use l2_kit::{
    Global, cpu,
    descriptors::TablePointer,
    fields as f,
    pages::{self, PAGE},
    setup::primary,
    trap::{self, Frame, GP},
    vmx::{self, reason as r},
};

// RDI: 64 bytes. [0]: IDTR of its own to load, [16]: IDTR as read back, [32]: ring, [40]: IF after CLI.
global_asm!(
    "lab_kernel:",
    "lidt [rdi]",
    "sidt [rdi+16]",
    "mov eax, cs; and eax, 3; mov [rdi+32], rax",
    "cli",
    "pushfq; pop rax; and eax, 0x200; mov [rdi+40], rax",
    "sti",
    // A critical section: interrupts off, then as they were, which was on. Then it waits for one.
    "pushfq; cli; popfq",
    "hlt",
    "int3",
);
unsafe extern "C" {
    fn lab_kernel();
}

const CR4_UMIP: u64 = 1 << 11;

/// The kernel's virtual state, as its monitor keeps it.
#[derive(Clone, Copy, Default)]
struct Virtual {
    idt: u64,
    interrupts: bool,
    emulated: u64,
}
static KERNEL: Global<Virtual> = Global::new(Virtual { idt: 0, interrupts: false, emulated: 0 });

/// #GP of the kernel: the monitor decodes the instruction and does what it would have done.
fn emulate(frame: &mut Frame) -> bool {
    if frame.cs & 3 != 1 {
        return false;
    }
    let mut kernel = KERNEL.get();
    // SAFETY: the kernel's code and memory are mapped one to one.
    let code = unsafe { *(frame.rip as *const [u8; 4]) };
    let at = |displacement: u64| (frame.rdi + displacement) as *mut TablePointer;
    frame.rip += match code {
        [0xFA, ..] => {
            kernel.interrupts = false;
            1
        }
        [0xFB, ..] => {
            kernel.interrupts = true;
            1
        }
        // LIDT [rdi]
        [0x0F, 0x01, 0x1F, _] => {
            // SAFETY: as above.
            kernel.idt = unsafe { at(0).read_unaligned() }.base;
            3
        }
        // SIDT [rdi+d8]: arrives only with UMIP
        [0x0F, 0x01, 0x4F, d] => {
            // SAFETY: as above.
            unsafe { at(d.into()).write_unaligned(TablePointer { limit: trap::IDT_LIMIT, base: kernel.idt }) };
            4
        }
        // HLT: the kernel waits for an interrupt, if it has them on.
        [0xF4, ..] => 1,
        _ => return false,
    };
    kernel.emulated += 1;
    KERNEL.set(kernel);
    true
}

/// What the kernel found out, as facts: 1 if it is as in ring 0.
fn judge(name: &str, area: u64, own_idt: u64, wakes_up: bool, traps: u64) {
    // SAFETY: the area is a page of our own.
    let words = unsafe { *(area as *const [u64; 8]) };
    // SAFETY: as above.
    let found = unsafe { ((area + 16) as *const TablePointer).read_unaligned() }.base;
    let facts = [
        ("own_idt", u64::from(found == own_idt)),
        ("in_ring_0", u64::from(words[4] == 0)),
        ("cli_shows", u64::from(words[5] == 0)),
        ("wakes_up", u64::from(wakes_up)),
        ("traps", traps),
    ];
    record::row(name, "native", 1, &Bracket::new(), &facts);
}

fn area(own_idt: u64) -> u64 {
    let area = pages::take(PAGE, PAGE);
    // SAFETY: fresh memory.
    unsafe { (area as *mut TablePointer).write_unaligned(TablePointer { limit: trap::IDT_LIMIT, base: own_idt }) };
    area
}

/// In ring 1 the real IF is on, since the monitor wants to hear of interrupts.
fn boot(name: &str, ring: Ring) {
    let own_idt = rings::idt();
    let area = area(own_idt);
    KERNEL.set(Virtual::default());
    trap::hook(GP, Some(emulate));
    rings::run(ring, true, lab_kernel as *const () as u64, area, if ring.code & 3 == 0 { 0 } else { rings::IF });
    trap::hook(GP, None);
    judge(name, area, own_idt, KERNEL.get().interrupts, KERNEL.get().emulated);
}

static AREA: Global<u64> = Global::new(0);

/// Boots the kernel in ring 1 without and with UMIP, and as a guest of VMX.
pub fn run(kernel_gdt: u64, monitor_gdt: u64) -> Result<(), Stop> {
    rings::load_gdt(monitor_gdt, GDT_LIMIT);
    boot("kernel_ring1", RING1);
    if extended_features().1 & 1 << 2 != 0 {
        cpu::set_cr4(cpu::cr4() | CR4_UMIP);
        boot("kernel_umip", RING1);
        cpu::set_cr4(cpu::cr4() & !CR4_UMIP);
    }
    rings::restore();
    let mut controls = plain();
    controls.primary |= primary::HLT;
    let mut vm = Vm::with_ept(&controls)?;
    vmx::write(f::GUEST_GDTR_BASE, kernel_gdt);
    vmx::write(f::GUEST_GDTR_LIMIT, GDT_LIMIT.into());
    let own_idt = rings::idt();
    AREA.set(area(own_idt));
    let program = |_| {
        rings::run(RING0, true, lab_kernel as *const () as u64, AREA.get(), 0);
    };
    let mut interrupts = false;
    vm.run(1, 0, program, &mut |_, reason| {
        interrupts = vmx::read(f::GUEST_RFLAGS) & rings::IF != 0;
        advance();
        reason == r::HLT
    })?;
    judge("kernel_guest", AREA.get(), own_idt, interrupts, 0);
    Ok(())
}
