//! Instructions that exit because a control says so, or always: reason, qualification, length, instruction information
//! (SDM "Instructions That Cause VM Exits", "Basic VM-Exit Information", "Information for VM Exits Due to Instruction
//! Execution").

use crate::guest::{Exit, Guest, Program};
use core::arch::global_asm;
use l2_kit::{
    Check, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{
        self, Controls, Kind, Missing, primary as p,
        secondary::{self, self as s},
    },
    trap, vmx,
};

/// What makes an instruction exit.
#[derive(Clone, Copy)]
enum Cause {
    /// It always does
    Always,
    /// A bit of a control word
    Control(Kind, u32),
    /// CR0 and CR4 bits that are the hypervisor's: all
    Masks,
}

/// What is recorded besides reason and length.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Info {
    /// Nothing
    None,
    /// The instruction information; the argument is a mask of its defined bits
    Instruction(u64),
    /// The linear address of a string operand
    Linear,
}

use Cause::{Always, Control, Masks};
use Info::{Instruction, Linear, None as Nothing};

/// One instruction.
struct Case {
    name: &'static str,
    cause: Cause,
    reason: u32,
    length: u64,
    info: Info,
}

/// Each program has 32 bytes.
const STRIDE: u64 = 32;
/// The guest's RDI: memory that exists; other registers are 0 but these.
const RSI: u64 = 0x1000;

macro_rules! cases {
    ($($name:literal $text:literal $cause:expr, $reason:literal $length:literal $info:expr;)*) => {
        const CASES: &[Case] = &[
            $( Case { name: $name, cause: $cause, reason: $reason, length: $length, info: $info }, )*
        ];
        global_asm!(
            ".pushsection .text.vmxtest_exits, \"ax\"",
            ".balign 32",
            "vmxtest_exits:",
            $( ".balign 32", $text, "mov eax, 5", "ret", )*
            ".popsection",
        );
    };
}

/// Defined bits of the instruction information (SDM tables "Format of the VM-Exit Instruction-Information Field as Used
/// for ..."), for memory operands with a base and without an index: address size, segment, no index, base.
const POINTER: u64 = 0x0FC3_8380;
/// ... and the instruction's identity
const TABLE_ACCESS: u64 = POINTER | 3 << 28;
/// ... and a second register
const DESCRIPTOR: u64 = POINTER | 0xF << 28;
/// A register, that it is one, and a second register
const TWO_REGISTERS: u64 = 0xF000_0478;
/// A register, that it is one, and the instruction's identity
const SELECTOR_REGISTER: u64 = 0x3000_0478;
/// A register and the operand size
const REGISTER_ONLY: u64 = 0x0000_1878;

cases! {
    "cpuid" "cpuid" Always, 10 2 Nothing;
    "invd" "invd" Always, 13 2 Nothing;
    "vmcall" "vmcall" Always, 18 3 Nothing;
    "vmclear" "vmclear [rdi + 0x12]" Always, 19 5 Instruction(POINTER);
    "vmlaunch" "vmlaunch" Always, 20 3 Nothing;
    "vmptrld" "vmptrld [rdi - 0x12]" Always, 21 4 Instruction(POINTER);
    "vmptrst" "vmptrst fs:[rdi + 0x12345678]" Always, 22 8 Instruction(POINTER);
    "vmread" "vmread rcx, rsi" Always, 23 3 Instruction(TWO_REGISTERS);
    "vmread to memory" "vmread [rdi], rsi" Always, 23 3 Instruction(DESCRIPTOR);
    "vmresume" "vmresume" Always, 24 3 Nothing;
    "vmwrite" "vmwrite r9, r10" Always, 25 4 Instruction(TWO_REGISTERS);
    "vmxoff" "vmxoff" Always, 26 3 Nothing;
    "vmxon" "vmxon [edi]" Always, 27 5 Instruction(POINTER);
    "invept" "invept rsi, [rdi]" Always, 50 5 Instruction(DESCRIPTOR);
    "invvpid" "invvpid r12, [rdi + 8]" Always, 53 7 Instruction(DESCRIPTOR);
    "hlt" "hlt" Control(Kind::Primary, p::HLT), 12 1 Nothing;
    "invlpg" "invlpg [rdi]" Control(Kind::Primary, p::INVLPG), 14 3 Nothing;
    "rdpmc" "rdpmc" Control(Kind::Primary, p::RDPMC), 15 2 Nothing;
    "rdtsc" "rdtsc" Control(Kind::Primary, p::RDTSC), 16 2 Nothing;
    "mwait" "mwait" Control(Kind::Primary, p::MWAIT), 36 3 Nothing;
    "monitor" "mov rax, rdi\nmonitor" Control(Kind::Primary, p::MONITOR), 39 3 Nothing;
    "pause" "pause" Control(Kind::Primary, p::PAUSE), 40 2 Nothing;
    "mov to cr3" "mov rax, cr3\nmov cr3, rax" Control(Kind::Primary, p::CR3_LOAD), 28 3 Nothing;
    "mov from cr3" "mov r9, cr3" Control(Kind::Primary, p::CR3_STORE), 28 4 Nothing;
    "mov to cr8" "mov cr8, rsi" Control(Kind::Primary, p::CR8_LOAD), 28 4 Nothing;
    "mov from cr8" "mov rdx, cr8" Control(Kind::Primary, p::CR8_STORE), 28 4 Nothing;
    "mov to cr0" "mov rcx, cr0\nxor ecx, 8\nmov cr0, rcx" Masks, 28 3 Nothing;
    "mov to cr4" "mov rbx, cr4\nxor ebx, 4\nmov cr4, rbx" Masks, 28 3 Nothing;
    "clts" "clts" Masks, 28 2 Nothing;
    "lmsw" "smsw ax\nxor al, 8\nlmsw ax" Masks, 28 3 Nothing;
    "mov to dr7" "mov dr7, rsi" Control(Kind::Primary, p::MOV_DR), 29 3 Nothing;
    "mov from dr0" "mov r11, dr0" Control(Kind::Primary, p::MOV_DR), 29 4 Nothing;
    "in al, 0x80" "in al, 0x80" Control(Kind::Primary, p::UNCONDITIONAL_IO), 30 2 Nothing;
    "in eax, dx" "mov edx, 0x84\nin eax, dx" Control(Kind::Primary, p::UNCONDITIONAL_IO), 30 1 Nothing;
    "out 0x80, ax" "out 0x80, ax" Control(Kind::Primary, p::UNCONDITIONAL_IO), 30 3 Nothing;
    "outsb" "mov rsi, rdi\nmov edx, 0x80\noutsb" Control(Kind::Primary, p::UNCONDITIONAL_IO), 30 1 Linear;
    "rep insw" "mov ecx, 2\nmov edx, 0x80\nrep insw" Control(Kind::Primary, p::UNCONDITIONAL_IO), 30 3 Linear;
    "wbinvd" "wbinvd" Control(Kind::Secondary, s::WBINVD), 54 2 Nothing;
    "rdtscp" "rdtscp" Control(Kind::Primary, p::RDTSC), 51 3 Nothing;
    "sgdt" "sgdt [rdi + 0x20]" Control(Kind::Secondary, s::DESCRIPTOR_TABLES), 46 4 Instruction(TABLE_ACCESS);
    "lidt" "lidt [rdi]" Control(Kind::Secondary, s::DESCRIPTOR_TABLES), 46 3 Instruction(TABLE_ACCESS);
    "str" "str ecx" Control(Kind::Secondary, s::DESCRIPTOR_TABLES), 47 3 Instruction(SELECTOR_REGISTER);
    "lldt" "lldt si" Control(Kind::Secondary, s::DESCRIPTOR_TABLES), 47 3 Instruction(SELECTOR_REGISTER);
    "rdrand" "rdrand r10" Control(Kind::Secondary, s::RDRAND), 57 4 Instruction(REGISTER_ONLY);
    "rdseed" "rdseed ecx" Control(Kind::Secondary, s::RDSEED), 61 3 Instruction(REGISTER_ONLY);
    "rdmsr" "mov ecx, 0x174\nrdmsr" Control(Kind::Primary, 0), 31 2 Nothing;
    "wrmsr" "mov ecx, 0x174\nwrmsr" Control(Kind::Primary, 0), 32 2 Nothing;
}

unsafe extern "C" {
    static vmxtest_exits: u8;
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let rdtscp = if setup::allowed_one(Kind::Secondary, s::RDTSCP) { s::RDTSCP } else { 0 };
    let mut guest = Guest::new(Controls { secondary: secondary::EPT | rdtscp, ..Controls::default() })?;
    let first = &raw const vmxtest_exits as u64;
    for (number, case) in (0u64..).zip(CASES) {
        one(&mut guest, first + number * STRIDE, case, rdtscp != 0);
    }
    user_waits(&mut guest);
    Ok(())
}

/// TPAUSE, UMWAIT and UMONITOR are undefined without their control; with it the first two exit if RDTSC does, which tells time
/// as well.
fn user_waits(guest: &mut Guest) {
    const EXECUTED: Exit = Exit::Done(0);
    const UNDEFINED: Exit = Exit::Done(trap::UD as u64);
    macro_rules! program {
        ($name:ident $text:literal) => {
            extern "C" fn $name(at: u64) -> u64 {
                // SAFETY: a wait whose deadline is over, or a monitored line of our own.
                let run = || unsafe {
                    core::arch::asm!($text, in("rdi") at, in("ecx") 0, in("eax") 0, in("edx") 0, options(nostack))
                };
                trap::catch(run).map_or_else(|trap| trap.vector.into(), |()| 0)
            }
        };
    }
    program!(tpause "tpause ecx");
    program!(umwait "umwait ecx");
    program!(umonitor "umonitor rdi");
    if !setup::allowed_one(Kind::Secondary, s::USER_WAIT) {
        Check::new(&mut Serial, "user wait and pause").fact("offered", false).end();
        return;
    }
    let [old_primary, old_secondary] = [f::PRIMARY_CONTROLS, f::SECONDARY_CONTROLS].map(vmx::read);
    let page = l2_kit::pages::address(l2_kit::pages::page());
    for (name, program, reason) in
        [("tpause", tpause as Program, Some(68)), ("umwait", umwait, Some(67)), ("umonitor", umonitor, None)]
    {
        let exits = reason.map_or(EXECUTED, |reason| Exit::Reason(reason, 0));
        for (how, wait, rdtsc, wanted) in [
            ("not allowed", 0, 0, UNDEFINED),
            ("not allowed, RDTSC exits", 0, p::RDTSC, UNDEFINED),
            ("allowed", s::USER_WAIT, 0, EXECUTED),
            ("allowed, RDTSC exits", s::USER_WAIT, p::RDTSC, exits),
        ] {
            vmx::write(f::PRIMARY_CONTROLS, old_primary | u64::from(rdtsc));
            vmx::write(f::SECONDARY_CONTROLS, old_secondary | u64::from(wait));
            let exit = guest.execute(program, page);
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("{name} {how}")).expect("result", exit, wanted);
            match exit {
                Exit::Reason(..) => check.expect("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH), 4).end(),
                _ => check.end(),
            }
        }
    }
    vmx::write(f::PRIMARY_CONTROLS, old_primary);
    vmx::write(f::SECONDARY_CONTROLS, old_secondary);
}

fn one(guest: &mut Guest, code: u64, case: &Case, rdtscp: bool) {
    let offered = match case.cause {
        Control(kind, bits) => setup::allowed_one(kind, bits) && (case.name != "rdtscp" || rdtscp),
        Always | Masks => true,
    };
    if !offered {
        Check::new(&mut Serial, format_args!("exit of {}", case.name)).fact("offered", false).end();
        return;
    }
    let old = [Kind::Primary.field(), Kind::Secondary.field(), f::CR0_MASK, f::CR4_MASK, f::CR0_SHADOW, f::CR4_SHADOW]
        .map(|field| (field, vmx::read(field)));
    match case.cause {
        Always => {}
        // No bit means: MSR bitmaps off.
        Control(kind, 0) => vmx::write(kind.field(), vmx::read(kind.field()) & !u64::from(p::MSR_BITMAPS)),
        Control(kind, bits) => vmx::write(kind.field(), vmx::read(kind.field()) | u64::from(bits)),
        Masks => {
            for (mask, shadow, flip) in [(f::CR0_MASK, f::CR0_SHADOW, 8), (f::CR4_MASK, f::CR4_SHADOW, 4)] {
                vmx::write(mask, u64::MAX);
                // CLTS exits only if the guest believes that TS is set; the others write something else than they read.
                vmx::write(shadow, vmx::read(if mask == f::CR0_MASK { f::GUEST_CR0 } else { f::GUEST_CR4 }) ^ flip);
            }
        }
    }
    // SAFETY: a program is code that returns.
    let program: Program = unsafe { core::mem::transmute(code) };
    *guest.vcpu.registers = l2_kit::vcpu::Registers::default();
    guest.vcpu.registers.rsi = RSI;
    guest.start(program, l2_kit::pages::address(l2_kit::pages::page()));
    let exit = guest.run();
    print(case, exit);
    for (field, value) in old {
        vmx::write(field, value);
    }
}

/// With a register operand there is no displacement, and what the qualification holds instead is undefined.
fn has_displacement(case: &Case) -> bool {
    const REGISTER_OPERAND: u64 = 1 << 10;
    !matches!(case.info, Instruction(_)) || vmx::read(f::EXIT_INSTRUCTION_INFO) & REGISTER_OPERAND == 0
}

fn print(case: &Case, exit: Exit) {
    let (reason, qualification) = match exit {
        Exit::Reason(reason, qualification) => (reason, qualification),
        // The program's own VMCALL has another register.
        other => {
            Check::new(&mut Serial, format_args!("exit of {}", case.name))
                .expect("result", other, Exit::Reason(case.reason, 0))
                .end();
            return;
        }
    };
    let mut out = Serial;
    let check = Check::new(&mut out, format_args!("exit of {}", case.name))
        .expect("reason", reason, case.reason)
        .fact("qualification", Hex(if has_displacement(case) { qualification } else { 0 }))
        .expect("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH), case.length);
    match case.info {
        Nothing => check.end(),
        Instruction(mask) => check.fact("info", Hex(vmx::read(f::EXIT_INSTRUCTION_INFO) & mask)).end(),
        Linear => check.fact("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS))).end(),
    }
}
