//! Popek and Goldberg's condition, tried out: is each instruction whose answer depends on who really rules the machine one
//! that traps when it is deprivileged?
//!
//! Mechanism: SDM "Protection", "Privilege Levels"; "VMX Non-Root Operation". A kernel believes that it has its own IDT, GDT,
//! LDT, task register, CR0.TS = 1, interrupts off, ring 0, and a CPU without VMX. Each instruction runs in ring 3 and ring 1,
//! where a monitor has put that kernel and keeps its own tables and RFLAGS.IF = 1. What traps, the monitor can answer. What
//! does not is then run in ring 0 with the kernel's own state: if the answers differ, the instruction is a hole. Then with
//! UMIP; then in VMX non-root, where the state is the guest's; then with descriptor-table exiting.

use super::monitor;
use crate::{
    record::{self, Bracket, Stop},
    rings::{self, GDT_LIMIT, IF, KERNEL_LDT, KERNEL_TSS, RING0, RING1, RING3, Ring, STAR},
    vm::{Vm, advance, answer_cpuid, extended_features, plain},
};
use core::arch::global_asm;
use l2_kit::{
    Global,
    cpu::{self, EFER, LSTAR},
    descriptors, fields as f,
    pages::{self, PAGE},
    setup::{Kind, allowed_one, secondary},
    trap::{self, BP},
    vmx::{self, reason as r},
};

/// An instruction: its name, its code (which leaves the answer at RDI and ends by INT3), whether that is 64-bit code.
pub struct Instruction(&'static str, unsafe extern "C" fn(), bool);

macro_rules! instructions {
    ($($width:literal $wide:literal $label:ident $name:literal $code:literal)*) => {
        $( global_asm!(concat!($width, "\n", stringify!($label), ":\n", $code, "\nint3\n.code64")); )*
        unsafe extern "C" { $( fn $label(); )* }
        static INSTRUCTIONS: &[Instruction] = &[ $( Instruction($name, $label, $wide), )* ];
    };
}

instructions! {
    ".code64" true lab_sidt "sidt" "sidt [rdi]"
    ".code64" true lab_sgdt "sgdt" "sgdt [rdi]"
    ".code64" true lab_sldt "sldt" "sldt [rdi]"
    ".code64" true lab_str "str" "str [rdi]"
    ".code64" true lab_smsw "smsw" "smsw [rdi]"
    ".code64" true lab_pushf "pushf" "pushfq; pop rax; and eax, 0x200; mov [rdi], rax"
    ".code64" true lab_popf "popf" "pushfq; pop rax; xor rax, 0x200; push rax; popfq; pushfq; pop rcx; xor rcx, rax; and ecx, 0x200; mov [rdi], rcx"
    ".code64" true lab_iret "iret" "mov r8, rsp; mov ecx, ss; mov edx, cs; pushfq; pop rax; xor rax, 0x200; push rcx; push r8; push rax; push rdx; lea rcx, [rip+2f]; push rcx; iretq; 2: pushfq; pop rcx; xor rcx, rax; and ecx, 0x200; mov [rdi], rcx"
    ".code64" true lab_cpuid "cpuid" "mov eax, 1; cpuid; and ecx, 0x20; mov [rdi], rcx"
    ".code64" true lab_lar "lar" "mov ecx, 8; lar rax, rcx; setz [rdi]"
    ".code64" true lab_lsl "lsl" "mov ecx, 8; lsl rax, rcx; setz [rdi]"
    ".code64" true lab_verr "verr" "mov ecx, 16; verr cx; setz [rdi]"
    ".code64" true lab_verw "verw" "mov ecx, 16; verw cx; setz [rdi]"
    ".code64" true lab_mov_cs "mov_from_cs" "mov eax, cs; and eax, 3; mov [rdi], rax"
    ".code32" false lab_push_cs "push_cs" ".byte 0x0E; pop eax; and eax, 3; mov ss:[edi], eax"
    ".code64" true lab_syscall "syscall" "syscall"
    ".code32" false lab_pop_ss "pop_ss" "push 16; .byte 0x17"
    ".code64" true lab_mov_ss "mov_to_ss" "mov eax, 16; mov ss, eax"
    ".code64" true lab_jmp_far "jmp_far" "push 8; lea rcx, [rip+2f]; push rcx; .byte 0x48, 0xFF, 0x2C, 0x24; 2:"
    ".code64" true lab_call_far "call_far" "push 8; lea rcx, [rip+2f]; push rcx; .byte 0x48, 0xFF, 0x1C, 0x24; 2:"
    ".code64" true lab_ret_far "ret_far" "push 8; lea rcx, [rip+2f]; push rcx; .byte 0x48, 0xCB; 2:"
    ".code64" true lab_int "int_n" "int 0x40"
    ".code64" true lab_cli "cli" "cli"
    ".code64" true lab_sti "sti" "sti"
    ".code64" true lab_hlt "hlt" "hlt"
    ".code64" true lab_lgdt "lgdt" "lgdt [rdi]"
    ".code64" true lab_lidt "lidt" "lidt [rdi]"
    ".code64" true lab_lldt "lldt" "xor eax, eax; lldt ax"
    ".code64" true lab_ltr "ltr" "mov eax, 0x60; ltr ax"
    ".code64" true lab_lmsw "lmsw" "mov eax, 1; lmsw ax"
    ".code64" true lab_clts "clts" "clts"
    ".code64" true lab_mov_cr "mov_cr" "mov rax, cr0; mov cr0, rax"
    ".code64" true lab_mov_dr "mov_dr" "mov rax, dr7"
    ".code64" true lab_rdmsr "rdmsr" "mov ecx, 0xC0000082; rdmsr"
    ".code64" true lab_wrmsr "wrmsr" "mov ecx, 0xC0000082; xor eax, eax; xor edx, edx; wrmsr"
    ".code64" true lab_rdtsc "rdtsc" "rdtsc"
    ".code64" true lab_in "in" "in al, 0x80"
    ".code64" true lab_out "out" "out 0x80, al"
    ".code64" true lab_invlpg "invlpg" "invlpg [rdi]"
    ".code64" true lab_invd "invd" "invd"
    ".code64" true lab_wbinvd "wbinvd" "wbinvd"
    ".code64" true lab_swapgs "swapgs" "swapgs"
    ".code64" true lab_sysret "sysret" "sysretq"
}

// Where SYSCALL lands: in the kernel's entry point or the monitor's, each of which says who it is.
global_asm!("lab_landing_kernel: mov qword ptr [rdi], 1; int3", "lab_landing_monitor: mov qword ptr [rdi], 2; int3");
unsafe extern "C" {
    fn lab_landing_kernel();
    fn lab_landing_monitor();
}

const CR0_TS: u64 = 1 << 3;
const CR4_UMIP: u64 = 1 << 11;
/// Exits of the descriptor-table instructions: SDM "VMX Basic Exit Reasons".
const GDTR_IDTR: u32 = 46;
const LDTR_TR: u32 = 47;

/// The answers of all instructions in one place: the vector of the trap (0: none) and what was stored.
type Answers = [(u8, [u64; 2]); INSTRUCTIONS.len()];
static ANSWERS: Global<Answers> = Global::new([(0, [0; 2]); INSTRUCTIONS.len()]);
/// Which instruction runs, for whoever counts exits.
static NOW: Global<usize> = Global::new(0);
/// The instructions that did not trap.
static UNTRAPPED: Global<[bool; INSTRUCTIONS.len()]> = Global::new([false; INSTRUCTIONS.len()]);

fn run_one(index: usize, ring: Ring, rflags: u64) {
    let Instruction(_, code, wide) = INSTRUCTIONS[index];
    NOW.set(index);
    // The kit's pages never come back; one holds every answer.
    static AT: Global<u64> = Global::new(0);
    if AT.get() == 0 {
        AT.set(pages::take(PAGE, PAGE));
    }
    let at = AT.get() as *mut [u64; 2];
    // SAFETY: the page is set aside for this.
    unsafe { at.write([0; 2]) };
    let trap = rings::run(ring, wide, code as *const () as u64, at as u64, rflags);
    // SAFETY: as above.
    let stored = unsafe { at.read_volatile() };
    let mut answers = ANSWERS.get();
    answers[index] = (if trap.vector == BP { 0 } else { trap.vector }, stored);
    ANSWERS.set(answers);
}

fn deprivileged(ring: Ring) -> Answers {
    (0..INSTRUCTIONS.len()).for_each(|index| run_one(index, ring, IF));
    ANSWERS.get()
}

/// In ring 0, interrupts off; the rest of the kernel's state is there already.
fn as_kernel(_: u64) {
    let untrapped = UNTRAPPED.get();
    (0..INSTRUCTIONS.len()).filter(|index| untrapped[*index]).for_each(|index| run_one(index, RING0, 0));
}

pub fn run() -> Result<(), Stop> {
    let (monitor, kernel, idt) = (rings::gdt(), rings::gdt(), rings::idt());
    cpu::wrmsr(EFER, cpu::rdmsr(EFER) | 1);
    cpu::wrmsr(0xC000_0081, STAR);
    cpu::wrmsr(LSTAR, lab_landing_monitor as *const () as u64);
    // With CR4.TSD the clock is the monitor's too.
    cpu::set_cr4(cpu::cr4() | cpu::CR4_TSD);
    rings::load_gdt(monitor, GDT_LIMIT);
    let (ring3, ring1) = (deprivileged(RING3), deprivileged(RING1));
    let umip = if extended_features().1 & 1 << 2 != 0 {
        cpu::set_cr4(cpu::cr4() | CR4_UMIP);
        let answers = deprivileged(RING1);
        cpu::set_cr4(cpu::cr4() & !CR4_UMIP);
        Some(answers)
    } else {
        record::missing("UMIP");
        None
    };
    // The truth, as the kernel would have it if it ruled the machine.
    UNTRAPPED.set(core::array::from_fn(|i| ring1[i].0 == 0));
    rings::load_gdt(kernel, GDT_LIMIT);
    rings::load_idt(idt);
    rings::load_tr_ldtr(KERNEL_TSS, KERNEL_LDT);
    cpu::wrmsr(LSTAR, lab_landing_kernel as *const () as u64);
    cpu::set_cr0(cpu::cr0() | CR0_TS);
    as_kernel(0);
    cpu::set_cr0(cpu::cr0() & !CR0_TS);
    cpu::set_cr4(cpu::cr4() & !cpu::CR4_TSD);
    rings::restore();
    let mut truth = ANSWERS.get();
    let cpuid = INSTRUCTIONS.iter().position(|i| i.0 == "cpuid").unwrap_or(0);
    // No CPU can be loaded with another CPUID: the kernel was promised one without VMX.
    truth[cpuid].1 = [0; 2];
    let (guest, guest_exits) = in_guest(kernel, idt, 0)?;
    let tables = allowed_one(Kind::Secondary, secondary::DESCRIPTOR_TABLES);
    let exiting = if tables { Some(in_guest(kernel, idt, secondary::DESCRIPTOR_TABLES)?) } else { None };
    if exiting.is_none() {
        record::missing("descriptor-table exiting");
    }
    for (i, Instruction(name, ..)) in INSTRUCTIONS.iter().enumerate() {
        let untrapped = ring1[i].0 == 0;
        let wrong = |answers: &Answers| u64::from(untrapped && answers[i].1 != truth[i].1);
        let facts = [
            ("ring3_trap", u64::from(ring3[i].0)),
            ("ring1_trap", u64::from(ring1[i].0)),
            ("ring1_wrong", wrong(&ring1)),
            ("umip_trap", umip.as_ref().map_or(u64::from(ring1[i].0), |a| u64::from(a[i].0))),
            ("guest_exits", guest_exits[i]),
            ("guest_wrong", wrong(&guest)),
            ("tables_exits", exiting.as_ref().map_or(0, |(_, exits)| exits[i])),
        ];
        record::row(name, "native", 1, &Bracket::new(), &facts);
    }
    monitor::run(kernel, monitor)
}

type Exits = [u64; INSTRUCTIONS.len()];

/// The instructions that did not trap, in a guest with the kernel's state: answers and exits.
fn in_guest(gdt: u64, idt: u64, more: u32) -> Result<(Answers, Exits), Stop> {
    let mut controls = plain();
    controls.secondary |= more;
    let mut vm = Vm::with_ept(&controls)?;
    for (field, value) in [
        (f::GUEST_GDTR_BASE, gdt),
        (f::GUEST_GDTR_LIMIT, GDT_LIMIT.into()),
        (f::GUEST_IDTR_BASE, idt),
        (f::GUEST_TR, KERNEL_TSS.into()),
        (f::GUEST_LDTR, KERNEL_LDT.into()),
        (f::GUEST_LDTR_AR, 0x82),
        (f::GUEST_LDTR_BASE, gdt),
        (f::GUEST_LDTR_LIMIT, descriptors::TSS_LIMIT.into()),
        (f::GUEST_CR0, cpu::cr0() | CR0_TS),
    ] {
        vmx::write(field, value);
    }
    let mut exits = [0; INSTRUCTIONS.len()];
    vm.run(1, 0, as_kernel, &mut |vm, reason| {
        exits[NOW.get()] += 1;
        match reason {
            r::CPUID => answer_cpuid(vm, [0; 4]),
            GDTR_IDTR | LDTR_TR => store(vm, reason, gdt, idt),
            _ => return false,
        }
        true
    })?;
    Ok((ANSWERS.get(), exits))
}

/// Answers SIDT, SGDT, SLDT or STR: all of them store at RDI here. Instruction information: SDM "Format of the VM-Exit
/// Instruction-Information Field as Used for LIDT, LGDT, SIDT, or SGDT" and "... LLDT, LTR, SLDT, and STR".
fn store(vm: &mut Vm, reason: u32, gdt: u64, idt: u64) {
    let which = vmx::read(f::EXIT_INSTRUCTION_INFO) >> 28 & 3;
    let at = vm.vcpu.registers.rdi;
    let (base, limit) = match (reason, which) {
        (GDTR_IDTR, 0) => (Some(gdt), GDT_LIMIT),
        (GDTR_IDTR, _) => (Some(idt), trap::IDT_LIMIT),
        (_, 0) => (None, KERNEL_LDT),
        _ => (None, KERNEL_TSS),
    };
    // SAFETY: the guest's buffer, in memory that is mapped one to one.
    unsafe {
        (at as *mut u16).write_unaligned(limit);
        if let Some(base) = base {
            ((at + 2) as *mut u64).write_unaligned(base);
        }
    }
    advance();
}
