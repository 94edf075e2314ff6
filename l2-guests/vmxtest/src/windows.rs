//! Interrupts, NMIs and windows: who gets them, and when a window opens (SDM "VM-Execution Control Fields", "Other Causes of
//! VM Exits").

use crate::{
    guest::{Exit, Guest, Program, nothing},
    injection::noting,
};
use core::arch::{asm, global_asm};
use l2_kit::{
    Check, apic, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, exit_controls, pin, primary, secondary},
    trap, vmx,
    vmx::reason as r,
};

const VALID: u64 = 1 << 31;
const IF: u64 = 0x200;
const VECTOR: u8 = 0x61;
const BLOCKED_BY_STI: u64 = 1;
const BLOCKED_BY_NMI: u64 = 8;

global_asm!(
    ".pushsection .text.vmxtest_windows, \"ax\"",
    // Interrupts become possible after the NOP.
    "vmxtest_sti:",
    "sti",
    "nop",
    "nop",
    "mov eax, 5",
    "ret",
    // NMIs become possible after the IRETQ.
    "vmxtest_iret:",
    "mov eax, ss",
    "mov rcx, rsp",
    "push rax",
    "push rcx",
    "pushfq",
    "mov eax, cs",
    "push rax",
    "lea rax, [rip + 1f]",
    "push rax",
    "iretq",
    "1: mov eax, 5",
    "ret",
    "vmxtest_iret_end:",
    ".popsection",
);

unsafe extern "C" {
    fn vmxtest_sti(_: u64) -> u64;
    fn vmxtest_iret(_: u64) -> u64;
    static vmxtest_iret_end: u8;
}

extern "C" fn sti(argument: u64) -> u64 {
    // SAFETY: assembly above.
    unsafe { vmxtest_sti(argument) }
}

extern "C" fn iret(argument: u64) -> u64 {
    // SAFETY: assembly above.
    unsafe { vmxtest_iret(argument) }
}

/// Interrupts itself and gives the interrupt time to come.
extern "C" fn interrupt_itself(_: u64) -> u64 {
    apic::send_self(VECTOR);
    for _ in 0..10 {
        // SAFETY: no effect.
        unsafe { asm!("nop") };
    }
    5
}

extern "C" fn nmi_itself(_: u64) -> u64 {
    apic::send_self_nmi();
    for _ in 0..10 {
        // SAFETY: no effect.
        unsafe { asm!("nop") };
    }
    5
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    interrupts(&mut guest);
    interrupt_window(&mut guest);
    nmis(&mut guest);
    nmi_window(&mut guest);
    Ok(())
}

/// Runs a program with more bits in control words, and with RFLAGS and interruptibility.
fn with(guest: &mut Guest, controls: &[(Kind, u32)], program: Program, rflags: u64, blocked: u64) -> Exit {
    let old = [Kind::Pin, Kind::Primary, Kind::Exit].map(|k| (k.field(), vmx::read(k.field())));
    for (kind, bits) in controls {
        vmx::write(kind.field(), vmx::read(kind.field()) | u64::from(*bits));
    }
    guest.start(program, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | rflags);
    vmx::write(f::GUEST_INTERRUPTIBILITY, blocked);
    let exit = guest.run();
    for (field, value) in old {
        vmx::write(field, value);
    }
    exit
}

/// Takes what is pending in our own IDT.
fn take_own() {
    // SAFETY: the handlers return.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

fn interrupts(guest: &mut Guest) {
    let exiting = (Kind::Pin, pin::EXTERNAL_INTERRUPT);
    let acknowledge = (Kind::Exit, exit_controls::ACKNOWLEDGE);
    for (name, controls, rflags) in [
        ("exits, interrupts on", &[exiting][..], IF),
        ("exits, interrupts off", &[exiting], 0),
        ("exits acknowledged, interrupts on", &[exiting, acknowledge], IF),
        ("exits acknowledged, interrupts off", &[exiting, acknowledge], 0),
    ] {
        let exit = with(guest, controls, interrupt_itself, rflags, 0);
        let info = vmx::read(f::EXIT_INTERRUPTION_INFO);
        let acknowledged = controls.len() == 2;
        let ((), seen) = noting(VECTOR, take_own);
        apic::eoi();
        let rest = guest.run();
        Check::new(&mut Serial, format_args!("an interrupt {name}"))
            .expect("result", exit, Exit::Reason(r::EXTERNAL_INTERRUPT, 0))
            .expect(
                "info",
                Hex(if info & VALID != 0 { info } else { 0 }),
                Hex(if acknowledged { VALID | u64::from(VECTOR) } else { 0 }),
            )
            .expect("taken_by_us", seen.count, u64::from(!acknowledged))
            .expect("rest", rest, Exit::Done(5))
            .end();
    }
    // It is the guest's own if it does not exit.
    let (exit, seen) = noting(VECTOR, || with(guest, &[], interrupt_itself, IF, 0));
    apic::eoi();
    Check::new(&mut Serial, "an interrupt for the guest itself")
        .expect("result", exit, Exit::Done(5))
        .expect("taken_by_guest", seen.count, 1)
        .end();
    // It waits if the guest has interrupts off, and is ours afterwards.
    let (exit, early) = noting(VECTOR, || with(guest, &[], interrupt_itself, 0, 0));
    let ((), late) = noting(VECTOR, take_own);
    apic::eoi();
    Check::new(&mut Serial, "an interrupt that the guest does not take")
        .expect("result", exit, Exit::Done(5))
        .expect("taken_by_guest", early.count, 0)
        .expect("taken_by_us", late.count, 1)
        .end();
}

fn interrupt_window(guest: &mut Guest) {
    let window = [(Kind::Primary, primary::INTERRUPT_WINDOW)];
    let start = vmxtest_sti as *const () as u64;
    let wrapper = |program: Program| program as *const () as u64;
    let exit = with(guest, &window, nothing, IF, 0);
    Check::new(&mut Serial, "interrupt window, open")
        .expect("result", exit, Exit::Reason(r::INTERRUPT_WINDOW, 0))
        .expect("rip", Hex(vmx::read(f::GUEST_RIP)), Hex(wrapper(nothing)))
        .end();
    let exit = with(guest, &window, sti, 0, 0);
    Check::new(&mut Serial, "interrupt window behind STI")
        .expect("result", exit, Exit::Reason(r::INTERRUPT_WINDOW, 0))
        .expect("rip", Hex(vmx::read(f::GUEST_RIP)), Hex(start + 2))
        .fact("interruptibility", Hex(vmx::read(f::GUEST_INTERRUPTIBILITY)))
        .end();
    let exit = with(guest, &window, nothing, IF, BLOCKED_BY_STI);
    Check::new(&mut Serial, "interrupt window, blocked by STI")
        .expect("result", exit, Exit::Reason(r::INTERRUPT_WINDOW, 0))
        .expect("moved", vmx::read(f::GUEST_RIP) > wrapper(nothing), true)
        .end();
    let exit = with(guest, &window, nothing, 0, 0);
    Check::new(&mut Serial, "interrupt window, closed").expect("result", exit, Exit::Done(5)).end();
}

fn nmis(guest: &mut Guest) {
    let exiting = [(Kind::Pin, pin::NMI)];
    let exit = with(guest, &exiting, nmi_itself, 0, 0);
    let info = vmx::read(f::EXIT_INTERRUPTION_INFO);
    // An NMI that exits blocks further ones until our next IRET: a trap of our own has one.
    let ((), seen) = noting(trap::BP, || {
        // SAFETY: the handler returns.
        unsafe { asm!("int3") }
    });
    let rest = guest.run();
    Check::new(&mut Serial, "an NMI exits")
        .expect("result", exit, Exit::Reason(r::EXCEPTION_OR_NMI, 0))
        .expect("info", Hex(info & !(1 << 12)), Hex(VALID | 2 << 8 | 2))
        .expect("traps", seen.count, 1)
        .expect("rest", rest, Exit::Done(5))
        .end();
    let (exit, seen) = noting(trap::NMI, || with(guest, &[], nmi_itself, 0, 0));
    Check::new(&mut Serial, "an NMI for the guest itself")
        .expect("result", exit, Exit::Done(5))
        .expect("taken_by_guest", seen.count, 1)
        .end();
}

fn nmi_window(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Pin, pin::VIRTUAL_NMI) {
        Check::new(&mut Serial, "NMI window").fact("offered", false).end();
        return;
    }
    let window = [(Kind::Pin, pin::NMI | pin::VIRTUAL_NMI), (Kind::Primary, primary::NMI_WINDOW)];
    let exit = with(guest, &window, nothing, 0, 0);
    Check::new(&mut Serial, "NMI window, open")
        .expect("result", exit, Exit::Reason(r::NMI_WINDOW, 0))
        .expect("rip", Hex(vmx::read(f::GUEST_RIP)), Hex(nothing as *const () as u64))
        .end();
    let exit = with(guest, &window, iret, 0, BLOCKED_BY_NMI);
    let rip = vmx::read(f::GUEST_RIP);
    let behind = rip > vmxtest_iret as *const () as u64 && rip < &raw const vmxtest_iret_end as u64;
    Check::new(&mut Serial, "NMI window behind IRET")
        .expect("result", exit, Exit::Reason(r::NMI_WINDOW, 0))
        .expect("behind", behind, true)
        .expect("interruptibility", vmx::read(f::GUEST_INTERRUPTIBILITY), 0)
        .end();
    let exit = with(guest, &window, nothing, 0, BLOCKED_BY_NMI);
    Check::new(&mut Serial, "NMI window, closed")
        .expect("result", exit, Exit::Done(5))
        .expect("interruptibility", vmx::read(f::GUEST_INTERRUPTIBILITY), BLOCKED_BY_NMI)
        .end();
    // An injected virtual NMI closes the window until the handler's IRET.
    let (exit, seen) = noting(trap::NMI, || {
        vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | 2 << 8 | 2);
        with(guest, &window, nothing, 0, 0)
    });
    Check::new(&mut Serial, "NMI window behind an injected NMI")
        .expect("result", exit, Exit::Reason(r::NMI_WINDOW, 0))
        .expect("taken_by_guest", seen.count, 1)
        .expect("rip", Hex(vmx::read(f::GUEST_RIP)), Hex(nothing as *const () as u64))
        .end();
}
