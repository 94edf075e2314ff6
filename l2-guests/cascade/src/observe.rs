//! What the hypervisor sees of an exit: facts that must not depend on what is below it.

use crate::{
    events::{EVENTS, HandledBy},
    hypervisor::Hypervisor,
};
use core::arch::asm;
use l2_kit::{
    Check, Global, cpu,
    descriptors::{KERNEL_CODE, KERNEL_DATA, TSS, TablePointer},
    fields as f,
    protocol::Hex,
    serial::Serial,
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
/// Bits 9 to 11 of an EPT violation's qualification are undefined without advanced information (IA32_VMX_EPT_VPID_CAP).
const ADVANCED: u64 = 7 << 9;
/// RFLAGS without the arithmetic flags, which our own code changes.
const SYSTEM_FLAGS: u64 = !0x8D5;

static OWN_STATE_SEEN: Global<bool> = Global::new(false);

/// Prints the exit of the event under observation, which then is over. Calls that only serve the measurement don't count.
pub fn exit(hypervisor: &mut Hypervisor, reason: u32) {
    let Some(event) = hypervisor.observed else { return };
    let name = EVENTS[event].name;
    let call = hypervisor.guests[hypervisor.current].vcpu.registers.rax;
    if reason == r::VMCALL && crate::calls::is_service(call) {
        return;
    }
    hypervisor.observed = None;
    own_state();
    let field = |field| Hex(vmx::read(field));
    let qualification = vmx::read(f::EXIT_QUALIFICATION) & if reason == r::EPT_VIOLATION { !ADVANCED } else { !0 };
    let valid = |field, value| if vmx::read(field) & VALID != 0 { Hex(vmx::read(value)) } else { Hex(0) };
    let mut out = Serial;
    let mut check = Check::new(&mut out, format_args!("exit {name}"))
        .fact("reason", reason)
        .fact("qualification", Hex(qualification))
        .fact("interruption", valid(f::EXIT_INTERRUPTION_INFO, f::EXIT_INTERRUPTION_INFO))
        .fact("vectoring", valid(f::IDT_VECTORING_INFO, f::IDT_VECTORING_INFO));
    // Asynchronous exits say nothing about an instruction.
    match reason {
        r::EXTERNAL_INTERRUPT | r::PREEMPTION_TIMER => {}
        r::EPT_VIOLATION => {
            check = check
                .fact("physical", field(f::GUEST_PHYSICAL_ADDRESS))
                .fact("linear", field(f::GUEST_LINEAR_ADDRESS))
                .fact("rip", field(f::GUEST_RIP));
        }
        // The length is undefined for a fault.
        r::EXCEPTION_OR_NMI => check = check.fact("rip", field(f::GUEST_RIP)),
        _ => check = check.fact("length", field(f::EXIT_INSTRUCTION_LENGTH)).fact("rip", field(f::GUEST_RIP)),
    }
    check
        .fact("rflags", Hex(vmx::read(f::GUEST_RFLAGS) & SYSTEM_FLAGS))
        .fact("cr0", field(f::GUEST_CR0))
        .fact("cr3", field(f::GUEST_CR3))
        .fact("cr4", field(f::GUEST_CR4))
        .fact("cs", field(f::GUEST_CS_AR))
        .fact("ss", field(f::GUEST_SS_AR))
        .fact("tr", field(f::GUEST_TR_AR))
        .fact("interruptibility", field(f::GUEST_INTERRUPTIBILITY))
        .fact("activity", field(f::GUEST_ACTIVITY))
        .fact("pending_debug", field(f::GUEST_PENDING_DEBUG))
        .end();
}

/// Says of an event that it raised no exit to us during the warm-up; wrong for those that we handle.
pub fn no_exit(event: usize) {
    let event = &EVENTS[event];
    Check::new(&mut Serial, format_args!("exit {}", event.name))
        .expect("seen", false, event.handled_by == HandledBy::L2)
        .end();
}

/// How many exits a bracket had.
pub fn exits(name: &str, handled_by: HandledBy, count: u64, seen: u64) {
    let wanted = if handled_by == HandledBy::L2 { count } else { 0 };
    Check::new(&mut Serial, format_args!("exits {name}")).expect("seen", seen, wanted).end();
}

/// Our own state after the first exit: what the CPU loaded from the host area.
fn own_state() {
    if OWN_STATE_SEEN.replace(true) {
        return;
    }
    let (mut gdt, mut idt) = (TablePointer::default(), TablePointer::default());
    let (cs, ss, tr, rflags): (u64, u64, u64, u64);
    // SAFETY: reads only.
    unsafe {
        asm!("sgdt [{}]", "sidt [{}]", in(reg) &raw mut gdt, in(reg) &raw mut idt, options(nostack));
        asm!("mov {}, cs", "mov {}, ss", "str {}", out(reg) cs, out(reg) ss, out(reg) tr, options(nostack));
        asm!("pushfq", "pop {}", out(reg) rflags);
    }
    Check::new(&mut Serial, "own state")
        .expect("cs", cs, KERNEL_CODE.into())
        .expect("ss", ss, KERNEL_DATA.into())
        .expect("tr", tr, TSS.into())
        .fact("cs_rights", Hex(rights(KERNEL_CODE)))
        .fact("ss_rights", Hex(rights(KERNEL_DATA)))
        .fact("tr_rights", Hex(rights(TSS)))
        .expect("gdt_limit", gdt.limit, 0xFFFF)
        .expect("idt_limit", idt.limit, 0xFFFF)
        .fact("cr0", Hex(cpu::cr0()))
        .fact("cr3", Hex(cpu::cr3()))
        .fact("cr4", Hex(cpu::cr4()))
        .fact("efer", Hex(cpu::rdmsr(cpu::EFER)))
        .expect("dr7", Hex(cpu::dr7()), Hex(0x400))
        .fact("debugctl", Hex(cpu::rdmsr(cpu::DEBUGCTL)))
        .expect("rflags", Hex(rflags & SYSTEM_FLAGS), Hex(2))
        .end();
}

/// LAR.
fn rights(selector: u16) -> u64 {
    let rights;
    // SAFETY: reads only.
    unsafe { asm!("lar {0:e}, {1:e}", inout(reg) 0u64 => rights, in(reg) u32::from(selector), options(nostack)) };
    rights
}
