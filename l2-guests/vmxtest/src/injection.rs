//! Events that the hypervisor injects and the guest takes (SDM "Event Injection", "Information for VM Exits That Occur
//! During Event Delivery").

use crate::guest::{Exit, Guest, nothing};
use l2_kit::{
    Check, Global,
    ept::rights,
    fields as f,
    pages::{self, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{Controls, Missing, secondary},
    trap::{self, Frame},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
const ERROR: u64 = 1 << 11;
const INTERRUPT: u64 = 0 << 8;
const NMI: u64 = 2 << 8;
const HARDWARE: u64 = 3 << 8;
const SOFTWARE_INTERRUPT: u64 = 4 << 8;
const PRIVILEGED: u64 = 5 << 8;
const SOFTWARE_EXCEPTION: u64 = 6 << 8;
/// The vector that stands for a device.
const VECTOR: u8 = 0x60;
const IF: u64 = 0x200;

/// What the guest's handler saw.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// How often it was called
    pub count: u64,
    /// Vector
    pub vector: u64,
    /// Error code
    pub error: u64,
    /// Where the guest was
    pub rip: u64,
}

static SEEN: Global<Seen> = Global::new(Seen { count: 0, vector: 0, error: 0, rip: 0 });

/// What was noted so far.
pub fn seen() -> Seen {
    SEEN.get()
}

fn note(frame: &mut Frame) -> bool {
    let count = SEEN.get().count + 1;
    SEEN.set(Seen { count, vector: frame.vector, error: frame.error, rip: frame.rip });
    true
}

/// Runs with the image's handler for a vector replaced by one that takes a note; returns the note.
pub fn noting<T>(vector: u8, run: impl FnOnce() -> T) -> (T, Seen) {
    SEEN.set(Seen::default());
    let before = trap::hook(vector, Some(note));
    let value = run();
    trap::hook(vector, before);
    (value, SEEN.get())
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    injected(&mut guest);
    halted(&mut guest);
    vectoring(&mut guest);
    chains(&mut guest);
    Ok(())
}

core::arch::global_asm!(
    ".pushsection .text.vmxtest_slide, \"ax\"",
    "vmxtest_slide:",
    ".fill 16, 1, 0x90",
    "mov eax, 5",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    /// Can be entered after any of its first bytes.
    safe fn vmxtest_slide(_: u64) -> u64;
}

extern "C" fn slide(argument: u64) -> u64 {
    vmxtest_slide(argument)
}

/// Where the guest is when an instruction of some length at its start has been executed.
fn start_plus(length: u64) -> u64 {
    vmxtest_slide as *const () as u64 + length
}

fn injected(guest: &mut Guest) {
    let cases: [(&str, u64, u64, u64, u64); 9] = [
        ("an interrupt", INTERRUPT | u64::from(VECTOR), 0, 0, IF),
        ("an NMI", NMI | 2, 0, 0, 0),
        ("#DE", HARDWARE, 0, 0, 0),
        ("#UD", HARDWARE | 6, 0, 0, 0),
        ("#GP", HARDWARE | ERROR | 13, 0x18, 0, 0),
        ("#PF", HARDWARE | ERROR | 14, 2, 0, 0),
        ("INT", SOFTWARE_INTERRUPT | u64::from(VECTOR), 0, 2, 0),
        ("INT3", SOFTWARE_EXCEPTION | 3, 0, 1, 0),
        ("INT1", PRIVILEGED | 1, 0, 1, 0),
    ];
    for (name, info, error, length, rflags) in cases {
        guest.start(slide, 5);
        vmx::write(f::GUEST_RIP, start_plus(0));
        vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | info);
        vmx::write(f::ENTRY_EXCEPTION_ERROR, error);
        vmx::write(f::ENTRY_INSTRUCTION_LENGTH, length);
        vmx::write(f::GUEST_RFLAGS, 2 | rflags);
        let (exit, seen) = noting(info as u8, || guest.run());
        Check::new(&mut Serial, format_args!("inject {name}"))
            .expect("result", exit, Exit::Done(5))
            .expect("count", seen.count, 1)
            .expect("vector", seen.vector, info & 0xFF)
            .expect("error", seen.error, error)
            .expect("rip", Hex(seen.rip), Hex(start_plus(length)))
            .expect("valid_after", vmx::read(f::ENTRY_INTERRUPTION_INFO) & VALID, 0)
            .end();
    }
}

/// An injected interrupt wakes a guest that is entered halted.
fn halted(guest: &mut Guest) {
    guest.start(nothing, 5);
    vmx::write(f::GUEST_ACTIVITY, 1);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | INTERRUPT | u64::from(VECTOR));
    let (exit, seen) = noting(VECTOR, || guest.run());
    Check::new(&mut Serial, "inject an interrupt into a halted guest")
        .expect("result", exit, Exit::Done(5))
        .expect("count", seen.count, 1)
        .expect("activity", vmx::read(f::GUEST_ACTIVITY), 0)
        .end();
}

extern "C" fn software_interrupt(_: u64) -> u64 {
    // SAFETY: the handler returns.
    unsafe { core::arch::asm!("int 0x60") };
    5
}

extern "C" fn undefined(_: u64) -> u64 {
    // SAFETY: the handler skips it.
    unsafe { core::arch::asm!("ud2") };
    5
}

fn skip_two(frame: &mut Frame) -> bool {
    frame.rip += 2;
    note(frame)
}

/// Without a usable IDT, delivery of one event raises the next, up to the triple fault. Each link can exit, and the exit names
/// the event whose delivery it interrupted.
fn chains(guest: &mut Guest) {
    let limit = vmx::read(f::GUEST_IDTR_LIMIT);
    vmx::write(f::GUEST_IDTR_LIMIT, 0);
    for (event, info, length) in [
        ("an interrupt", INTERRUPT | u64::from(VECTOR), 0),
        ("an NMI", NMI | 2, 0),
        ("#DE", HARDWARE, 0),
        ("#UD", HARDWARE | 6, 0),
        ("#GP", HARDWARE | ERROR | 13, 0),
        ("#PF", HARDWARE | ERROR | 14, 0),
        ("#DF", HARDWARE | ERROR | 8, 0),
        ("INT", SOFTWARE_INTERRUPT | u64::from(VECTOR), 2),
        ("INT3", SOFTWARE_EXCEPTION | 3, 1),
        ("INT1", PRIVILEGED | 1, 1),
    ] {
        for (how, bitmap) in [("nothing", 0u64), ("#GP", 1 << trap::GP), ("#DF", 1 << trap::DF)] {
            vmx::write(f::EXCEPTION_BITMAP, bitmap);
            guest.start(slide, 5);
            vmx::write(f::GUEST_RIP, start_plus(0));
            vmx::write(f::GUEST_RFLAGS, 2 | IF);
            vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | info);
            vmx::write(f::ENTRY_EXCEPTION_ERROR, 0);
            vmx::write(f::ENTRY_INSTRUCTION_LENGTH, length);
            let exit = guest.run();
            // Bit 12 is undefined; so is all without bit 31.
            let valid = |value: u64| if value & VALID != 0 { value & !(1 << 12) } else { 0 };
            let vectoring = valid(vmx::read(f::IDT_VECTORING_INFO));
            let raised = valid(vmx::read(f::EXIT_INTERRUPTION_INFO));
            let code = if vectoring & ERROR != 0 { vmx::read(f::IDT_VECTORING_ERROR) } else { 0 };
            Check::new(&mut Serial, format_args!("{event} without an IDT, exits by {how}"))
                .fact("result", exit)
                .fact("info", Hex(raised))
                .fact("vectoring", Hex(vectoring))
                .fact("error", code)
                .fact("rip", vmx::read(f::GUEST_RIP).wrapping_sub(start_plus(0)))
                .fact("blocked", vmx::read(f::GUEST_INTERRUPTIBILITY))
                .end();
        }
    }
    vmx::write(f::EXCEPTION_BITMAP, 0);
    vmx::write(f::GUEST_IDTR_LIMIT, limit);
}

/// A page like this hypervisor's IDT, for the guest alone: its address.
pub fn copy_of_idt() -> u64 {
    let idt = pages::page();
    let source = trap::idt_base() as *const [u64; 512];
    // SAFETY: the IDT has 4096 bytes and does not change.
    *idt = unsafe { *source };
    pages::address(idt)
}

/// The guest's IDT is missing, so delivery exits; then it is there, and the event is delivered once more.
fn vectoring(guest: &mut Guest) {
    let Some(ept) = guest.ept else { return };
    let idt = copy_of_idt();
    let own = vmx::read(f::GUEST_IDTR_BASE);
    vmx::write(f::GUEST_IDTR_BASE, idt);
    trap::hook(trap::UD, Some(skip_two));
    let cases: [(&str, crate::guest::Program, u64, u64, u64); 9] = [
        ("an interrupt", nothing, VALID | INTERRUPT | u64::from(VECTOR), 0, IF),
        ("an NMI", nothing, VALID | NMI | 2, 0, 0),
        ("#GP", nothing, VALID | HARDWARE | ERROR | 13, 0x28, 0),
        ("#PF", nothing, VALID | HARDWARE | ERROR | 14, 2, 0),
        ("#DE", nothing, VALID | HARDWARE, 0, 0),
        ("INT", slide, VALID | SOFTWARE_INTERRUPT | u64::from(VECTOR), 0, 0),
        ("INT3", slide, VALID | SOFTWARE_EXCEPTION | 3, 0, 0),
        ("INT of its own", software_interrupt, SOFTWARE_INTERRUPT | u64::from(VECTOR), 0, 0),
        ("#UD of its own", undefined, HARDWARE | 6, 0, 0),
    ];
    for (name, program, info, error, rflags) in cases {
        ept.unmap(idt, PAGE);
        let _ = vmx::invept(1, [ept.pointer(), 0]);
        guest.start(program, 5);
        if info & VALID != 0 {
            vmx::write(f::ENTRY_INTERRUPTION_INFO, info);
            vmx::write(f::ENTRY_EXCEPTION_ERROR, error);
            if info >> 8 & 7 >= SOFTWARE_INTERRUPT >> 8 {
                vmx::write(f::GUEST_RIP, start_plus(0));
                vmx::write(f::ENTRY_INSTRUCTION_LENGTH, if info as u8 == trap::BP { 1 } else { 2 });
            }
        }
        vmx::write(f::GUEST_RFLAGS, 2 | rflags);
        let exit = guest.run();
        let reason = match exit {
            Exit::Reason(reason, _) => reason,
            _ => 0,
        };
        let vectoring = vmx::read(f::IDT_VECTORING_INFO);
        // Bit 12 is undefined.
        let vectoring = if vectoring & VALID != 0 { vectoring & !(1 << 12) } else { 0 };
        let code = if vectoring & ERROR != 0 { vmx::read(f::IDT_VECTORING_ERROR) } else { 0 };
        let length = vmx::read(f::EXIT_INSTRUCTION_LENGTH);
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("delivery of {name} exits"))
            .expect("reason", reason, r::EPT_VIOLATION)
            .expect("vectoring", Hex(vectoring), Hex(VALID | info))
            .expect("error", code, error)
            .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1)), Hex(idt));
        if info >> 8 & 7 == SOFTWARE_INTERRUPT >> 8 {
            check = check.expect("length", length, 2);
            vmx::write(f::ENTRY_INSTRUCTION_LENGTH, length);
        }
        check.end();
        ept.map(idt, PAGE, rights::RWX);
        vmx::write(f::ENTRY_INTERRUPTION_INFO, vectoring);
        vmx::write(f::ENTRY_EXCEPTION_ERROR, code);
        let vector = info as u8;
        let (exit, seen) = if vector == trap::UD { (guest.run(), SEEN.get()) } else { noting(vector, || guest.run()) };
        Check::new(&mut Serial, format_args!("delivery of {name} again"))
            .expect("result", exit, Exit::Done(5))
            .expect("vector", seen.vector, info & 0xFF)
            .expect("error", seen.error, error)
            .end();
    }
    trap::hook(trap::UD, None);
    vmx::write(f::GUEST_IDTR_BASE, own);
}
