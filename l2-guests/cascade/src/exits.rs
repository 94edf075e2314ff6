//! One handler for each exit.

use crate::{
    calls,
    events::{EVENTS, TIMER, WARM_UP},
    hypervisor::{Hypervisor, PARTNER},
    measure, observe,
    payload::{INTERRUPTS, MSR_INTERCEPTED, PORT_INTERCEPTED, UD2_LENGTH, VECTOR},
};
use core::fmt;
use l2_kit::{
    apic, cpu, fields as f,
    pages::PAGE,
    protocol::Level,
    report,
    setup::{pin, primary},
    trap,
    vcpu::Registers,
    vmx::{self, Outcome, reason as r},
};

/// What comes after an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The guest goes on
    Resume,
    /// It has done its work
    Done,
}

/// Why a guest cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// VMLAUNCH or VMRESUME failed
    NotEntered(Outcome),
    /// Reason and qualification of an exit that nobody asked for
    Unexpected(u32, u64),
    /// No such call
    BadCall(u64),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::NotEntered(outcome) => write!(f, "the guest could not be entered: {outcome}"),
            Stop::Unexpected(reason, qualification) => {
                write!(f, "unexpected exit: reason {reason:#x}, qualification {qualification:#x}")
            }
            Stop::BadCall(number) => write!(f, "the guest made the unknown call {number}"),
        }
    }
}

/// Handles the exit of the current guest.
///
/// # Errors
/// If the guest cannot go on.
pub fn handle(hypervisor: &mut Hypervisor, reason: u32) -> Result<Next, Stop> {
    let current = hypervisor.current;
    let registers = &mut *hypervisor.guests[current].vcpu.registers;
    match reason {
        r::VMCALL => return call(hypervisor),
        r::CPUID => {
            let [a, b, c, d] = hypervisor.leaves.answer(registers.rax as u32, registers.rcx as u32);
            (registers.rax, registers.rbx) = (a.into(), b.into());
            (registers.rcx, registers.rdx) = (c.into(), d.into());
            advance();
        }
        r::RDMSR if registers.rcx as u32 == MSR_INTERCEPTED => {
            registers.set_edx_eax(hypervisor.virtual_msr);
            advance();
        }
        r::WRMSR if registers.rcx as u32 == MSR_INTERCEPTED => {
            hypervisor.virtual_msr = registers.edx_eax();
            advance();
        }
        r::IO => io(registers)?,
        r::RDTSC => {
            registers.set_edx_eax(cpu::rdtsc());
            advance();
        }
        // The guest asked to wait; it is awake again at once.
        r::HLT => advance(),
        // There is nothing in the caches that the guest may throw away.
        r::INVD => advance(),
        // The guest may have what it has already.
        r::XSETBV if registers.edx_eax() == 1 && registers.rcx as u32 == 0 => advance(),
        r::CR_ACCESS => control_register(hypervisor)?,
        r::EXCEPTION_OR_NMI => exception()?,
        r::EXTERNAL_INTERRUPT => interrupt()?,
        r::EPT_VIOLATION => ept_violation(hypervisor)?,
        r::PREEMPTION_TIMER if hypervisor.timer > 0 => {
            hypervisor.timer -= 1;
            set_timer(hypervisor.timer);
        }
        _ => return Err(unexpected(reason)),
    }
    Ok(Next::Resume)
}

fn unexpected(reason: u32) -> Stop {
    Stop::Unexpected(reason, vmx::read(f::EXIT_QUALIFICATION))
}

/// Skips the instruction that exited.
fn advance() {
    vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
}

/// Qualification: SDM "Exit Qualification for I/O Instructions".
fn io(registers: &mut Registers) -> Result<(), Stop> {
    let qualification = vmx::read(f::EXIT_QUALIFICATION);
    let (port, size, is_in) = ((qualification >> 16) as u16, qualification & 7, qualification & 8 != 0);
    if port != PORT_INTERCEPTED || size != 0 {
        return Err(unexpected(r::IO));
    }
    if is_in {
        registers.rax = registers.rax & !0xFF | u64::from(cpu::in8(port));
    } else {
        cpu::out8(port, registers.rax as u8);
    }
    advance();
    Ok(())
}

/// Qualification: SDM "Exit Qualification for Control-Register Accesses".
fn control_register(hypervisor: &mut Hypervisor) -> Result<(), Stop> {
    let guest = &hypervisor.guests[hypervisor.current];
    let qualification = vmx::read(f::EXIT_QUALIFICATION);
    let value = guest.vcpu.registers.get(qualification >> 8);
    match (qualification & 0xF, qualification >> 4 & 3) {
        (0, 0) => {
            vmx::write(f::GUEST_CR0, value);
            vmx::write(f::CR0_SHADOW, value);
        }
        (3, 0) => {
            vmx::write(f::GUEST_CR3, value);
            // What MOV to CR3 does to the guest's translations
            if guest.vpid != 0 && !vmx::invvpid(1, [guest.vpid.into(), 0]).succeeded() {
                return Err(unexpected(r::CR_ACCESS));
            }
        }
        (4, 0) => {
            vmx::write(f::GUEST_CR4, value | cpu::CR4_VMXE);
            vmx::write(f::CR4_SHADOW, value);
        }
        (8, 0) => hypervisor.virtual_priority = value,
        _ => return Err(unexpected(r::CR_ACCESS)),
    }
    advance();
    Ok(())
}

/// The guest's undefined instruction is skipped.
fn exception() -> Result<(), Stop> {
    let info = vmx::read(f::EXIT_INTERRUPTION_INFO);
    if info & 0x7FF != 3 << 8 | u64::from(trap::UD) {
        return Err(Stop::Unexpected(r::EXCEPTION_OR_NMI, info));
    }
    vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + UD2_LENGTH);
    Ok(())
}

/// The CPU has acknowledged the interrupt for us: its vector is in the exit information.
fn interrupt() -> Result<(), Stop> {
    let info = vmx::read(f::EXIT_INTERRUPTION_INFO);
    if info & 0xFF != u64::from(VECTOR) {
        return Err(Stop::Unexpected(r::EXTERNAL_INTERRUPT, info));
    }
    INTERRUPTS.set(INTERRUPTS.get() + 1);
    apic::eoi();
    Ok(())
}

/// The guest gets the page that it misses.
fn ept_violation(hypervisor: &mut Hypervisor) -> Result<(), Stop> {
    let address = vmx::read(f::GUEST_PHYSICAL_ADDRESS);
    if !hypervisor.holes.contains(&address) {
        return Err(Stop::Unexpected(r::EPT_VIOLATION, address));
    }
    hypervisor.guests[hypervisor.current].ept.map(address & !(PAGE - 1), PAGE, l2_kit::ept::rights::RWX);
    Ok(())
}

/// The timer fires at once while it has to fire; else so late that it never does.
fn set_timer(left: u64) {
    vmx::write(f::PREEMPTION_TIMER, if left > 0 { 0 } else { u64::from(u32::MAX) });
}

fn call(hypervisor: &mut Hypervisor) -> Result<Next, Stop> {
    let registers = &hypervisor.guests[hypervisor.current].vcpu.registers;
    let (number, b, c) = (registers.rax, registers.rbx, registers.rcx);
    match number {
        calls::NOTHING => {}
        calls::END => hypervisor.bracket.stop(hypervisor.exits),
        calls::SAY => say(b, c),
        calls::INVEPT => {
            let pointer = hypervisor.guests[hypervisor.current].ept.pointer();
            if !vmx::invept(1, [pointer, 0]).succeeded() {
                return Err(unexpected(r::VMCALL));
            }
        }
        calls::YIELD => {
            advance();
            hypervisor.switch_to(PARTNER - hypervisor.current);
            return Ok(Next::Resume);
        }
        calls::PREPARE => prepare(hypervisor, b as usize, c == 0),
        calls::BEGIN => {
            advance();
            begin(hypervisor, b as usize);
            return Ok(Next::Resume);
        }
        calls::HOST_WRITES => host_writes(),
        calls::CONTROL_WRITES => control_writes(),
        calls::DONE => return Ok(Next::Done),
        _ => return Err(Stop::BadCall(number)),
    }
    if number == calls::END {
        measure::print(&mut hypervisor.bracket, b as usize);
    }
    advance();
    Ok(Next::Resume)
}

fn arm_timer(hypervisor: &mut Hypervisor, event: usize, count: u64) {
    if EVENTS[event].name == TIMER {
        hypervisor.timer = count;
        set_timer(count);
    }
}

fn prepare(hypervisor: &mut Hypervisor, event: usize, first: bool) {
    hypervisor.observed = first.then_some(event);
    if EVENTS[event].name == TIMER {
        vmx::write(f::PIN_CONTROLS, vmx::read(f::PIN_CONTROLS) | u64::from(pin::PREEMPTION_TIMER));
    }
    arm_timer(hypervisor, event, WARM_UP);
}

fn begin(hypervisor: &mut Hypervisor, event: usize) {
    if hypervisor.observed.take().is_some() {
        observe::no_exit(event);
    }
    arm_timer(hypervisor, event, EVENTS[event].count());
    hypervisor.exits = 0;
    hypervisor.bracket.start();
}

/// What a hypervisor with threads of its own writes before an entry: stack pointer, page tables, bases of segments. All
/// come back at the second call, and nothing here uses what changes in between.
fn host_writes() {
    const PWT: u64 = 1 << 3;
    const APART: u64 = 0x1000;
    let stack = vmx::read(f::HOST_RSP);
    vmx::write(f::HOST_RSP, stack ^ APART);
    vmx::write(f::HOST_RSP, stack);
    for (field, bit) in [(f::HOST_FS_BASE, APART), (f::HOST_GS_BASE, APART), (f::HOST_CR3, PWT)] {
        vmx::write(field, vmx::read(field) ^ bit);
    }
}

/// What a hypervisor writes that opens windows and follows its guest's exceptions and time: a primary control, the
/// exception bitmap, the TSC offset. The guest has neither INVLPG nor INT3.
fn control_writes() {
    let bits = [(f::PRIMARY_CONTROLS, primary::INVLPG), (f::EXCEPTION_BITMAP, 1 << trap::BP), (f::TSC_OFFSET, 1)];
    for (field, bit) in bits {
        vmx::write(field, vmx::read(field) ^ u64::from(bit));
    }
}

/// Prints the guest's text in its name.
fn say(address: u64, length: u64) {
    let level = report::speak_as(Level::L3);
    match guest_text(address, length) {
        Some(text) => report::say(text),
        None => report::fail(format_args!("the guest's text at {address:#x} is no text")),
    }
    report::speak_as(level);
}

/// The guest's memory is ours, one to one below 4 GiB.
fn guest_text(address: u64, length: u64) -> Option<&'static str> {
    if address == 0 || length > 256 || address.checked_add(length)? > 1 << 32 {
        return None;
    }
    // SAFETY: mapped memory that the guest does not change while it is stopped.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, length as usize) };
    core::str::from_utf8(bytes).ok()
}
