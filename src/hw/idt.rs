//! Exceptions in nvmx itself.
//!
//! nvmx runs with interrupts off. A fault at an instruction of the fixup table continues at its landing; an NMI is noted
//! for the guest it was meant for, and so is a machine check that left nvmx as it was; everything else is a bug, or the end of the
//! machine, and ends in the epitaph.
//!
//! Source: Intel SDM vol. 3A, "Interrupt and Exception Handling", figure "64-Bit IDT Gate Descriptors" and table
//! "Protected-Mode Exceptions and Interrupts".

#[cfg(target_os = "none")]
use core::arch::global_asm;
#[cfg(target_os = "none")]
use core::mem::offset_of;
use core::slice;

use crate::x86::descriptor::interrupt_gate;
use crate::{
    addr::PAGE_SIZE,
    hw::{
        cpu::{self, Arrived, Idt},
        cr,
        epitaph::{Who, epitaph},
        halt::halt,
        machine_check,
        phys::DirectMap,
        serial,
    },
    mm::{FramePool, PhysMem, paging::OutOfFrames},
};

/// Exceptions only: external interrupts are never taken by nvmx.
const VECTORS: usize = 32;
const NMI: u64 = 2;
const MACHINE_CHECK: u64 = 18;
const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// Builds the IDT in a frame of its own.
pub fn build(pool: &mut FramePool, phys: DirectMap) -> Result<Idt, OutOfFrames> {
    let frame = pool.alloc(&phys).ok_or(OutOfFrames)?;
    let base = phys.linear(frame.hpa(), PAGE_SIZE).ok_or(OutOfFrames)? as u64;
    for vector in 0..VECTORS {
        let gate =
            interrupt_gate(cpu::selector::CODE, &raw const exception_stubs as u64 + vector as u64 * 16, ist(vector));
        let at = vector as u64 * 16;
        phys.write_u64(frame.at(at), gate[0]);
        phys.write_u64(frame.at(at + 8), gate[1]);
    }
    Ok(Idt::at(base))
}

/// The stack of its own for what may hit at any moment: double fault, NMI, machine check.
const fn ist(vector: usize) -> u64 {
    match vector {
        8 => 1,
        2 => cpu::NMI_STACK as u64,
        18 => 3,
        _ => 0,
    }
}

/// What the stubs leave on the stack, lowest address first.
#[repr(C)]
struct TrapFrame {
    /// R15 … RAX: nothing reads them by name.
    registers: [u64; 15],
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

// Each stub brings the stack to one shape: exceptions without an error code push a zero. Vectors with one: #DF, #TS, #NP,
// #SS, #GP, #PF, #AC, #CP, #VC, #SX. Stubs are 16 bytes apart.
#[cfg(target_os = "none")]
global_asm!(
    ".balign 16",
    "exception_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    ".balign 16",
    ".if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp exception_common",
    ".set vector, vector + 1",
    ".endr",
    // What `exception_common` pushes, the other way round.
    ".macro pop_registers",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    ".endm",
    "exception_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rdi, rsp",
    "cld",
    "call {handler}",
    "pop_registers",
    "add rsp, 16",
    "iretq",
    // RDI: a frame. Back to where it came from without IRET, with RFLAGS and RIP on the stack that was in use.
    "exception_return_on_stack:",
    "mov rcx, [rdi + {rsp}]",
    "mov rax, [rdi + {rip}]",
    "mov [rcx - 8], rax",
    "mov rax, [rdi + {rflags}]",
    "mov [rcx - 16], rax",
    "lea rax, [rcx - 16]",
    "mov [rdi + {rsp}], rax",
    "mov rsp, rdi",
    "pop_registers",
    "mov rsp, [rsp + {rsp} - {vector}]",
    "popfq",
    "ret",
    ".pushsection .rodata.entry_window, \"a\", @progbits",
    ".balign 8",
    // The window in which an NMI or a machine check must not be overlooked: between the last look at what arrived and the VM
    // entry, in `vmenter`.
    "entry_window:",
    ".quad nvmx_entry_window_start, nvmx_entry_window_end, nvmx_entry_window_bail",
    ".popsection",
    vectors = const VECTORS,
    handler = sym exception,
    vector = const offset_of!(TrapFrame, vector),
    rip = const offset_of!(TrapFrame, rip),
    rflags = const offset_of!(TrapFrame, rflags),
    rsp = const offset_of!(TrapFrame, rsp),
);

unsafe extern "C" {
    static exception_stubs: u8;
    static entry_window: [u64; 3];
    static fixup_start: [u64; 2];
    static fixup_end: [u64; 2];
    fn exception_return_on_stack(frame: &mut TrapFrame) -> !;
}

/// Where to continue after a fault at `rip`, if that is an instruction that may fault.
fn fixup(rip: u64) -> Option<u64> {
    let (start, end) = (&raw const fixup_start, &raw const fixup_end);
    // SAFETY: the linker script puts whole pairs between the two labels, in read-only memory.
    let table = unsafe { slice::from_raw_parts(start, (end as usize - start as usize) / 16) };
    table.iter().find(|pair| pair[0] == rip).map(|pair| pair[1])
}

#[cfg_attr(not(target_os = "none"), allow(dead_code))]
extern "C" fn exception(frame: &mut TrapFrame) {
    match frame.vector {
        NMI => arrived(frame, Arrived::NMI),
        MACHINE_CHECK => machine_check(frame),
        INVALID_OPCODE | GENERAL_PROTECTION | PAGE_FAULT => match fixup(frame.rip) {
            Some(landing) => frame.rip = landing,
            None => unexpected(frame),
        },
        _ => unexpected(frame),
    }
}

/// The NMI or machine check was meant for the guest: the run loop passes it on. One that arrives after the run loop's last look
/// restarts that look.
fn arrived(frame: &mut TrapFrame, what: Arrived) {
    cpu::this().note_arrived(what);
    // SAFETY: a constant table, defined above.
    let [start, end, bail] = unsafe { entry_window };
    if (start..end).contains(&frame.rip) {
        frame.rip = bail;
    }
}

/// One that left nvmx as it was is the guest's ([ADR 0032](../../docs/adr/0032-machine-checks-in-nvmx.md)).
fn machine_check(frame: &mut TrapFrame) {
    if !machine_check::leaves_nvmx_alone() {
        serial::dying();
        machine_check::tell_banks();
        unexpected(frame);
    }
    let this = cpu::this();
    if this.is_parked() {
        // It goes on here: with the next machine check this stack begins anew.
        machine_check::end();
        halt();
    }
    arrived(frame, Arrived::MACHINE_CHECK);
    if this.nmi_stack().contains(&frame.rsp) {
        // IRET would let the next NMI in, onto the stack of the one that is being handled.
        // SAFETY: 1. `frame` is what the stub left, and nothing on this stack is needed any more. 2. Nothing lies below RSP of the
        // handler of NMIs: the target has no red zone.
        unsafe { exception_return_on_stack(frame) }
    }
}

#[cold]
fn unexpected(frame: &TrapFrame) -> ! {
    serial::dying();
    let name = usize::try_from(frame.vector).ok().and_then(|v| NAMES.get(v)).copied().unwrap_or("exception");
    let (rip, rsp, error) = (frame.rip, frame.rsp, frame.error_code);
    log::error!(
        "{name} in nvmx: error code {error:#x}, cs {:#x}, rflags {:#x}, rsp {rsp:#x}, ss {:#x}, cr2 {:#x}, registers r15..rax {:x?}",
        frame.cs,
        frame.rflags,
        frame.ss,
        cr::cr2(),
        frame.registers,
    );
    match frame.vector {
        MACHINE_CHECK => epitaph(
            Who::Nvmx,
            format_args!("rip {rip:#x}"),
            format_args!("{name}, MCG_STATUS {:#x}", machine_check::status().bits()),
        ),
        PAGE_FAULT => epitaph(
            Who::Nvmx,
            format_args!("rip {rip:#x}"),
            format_args!("{name}, error code {error:#x}, address {:#x}", cr::cr2()),
        ),
        _ => epitaph(Who::Nvmx, format_args!("rip {rip:#x}"), format_args!("{name}, error code {error:#x}")),
    }
}

const NAMES: [&str; VECTORS] = [
    "#DE",
    "#DB",
    "NMI",
    "#BP",
    "#OF",
    "#BR",
    "#UD",
    "#NM",
    "#DF",
    "vector 9",
    "#TS",
    "#NP",
    "#SS",
    "#GP",
    "#PF",
    "vector 15",
    "#MF",
    "#AC",
    "#MC",
    "#XM",
    "#VE",
    "#CP",
    "vector 22",
    "vector 23",
    "vector 24",
    "vector 25",
    "vector 26",
    "vector 27",
    "vector 28",
    "#VC",
    "#SX",
    "vector 31",
];
