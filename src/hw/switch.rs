//! The one way into a guest and back.
//!
//! HOST_RSP points just behind [`GuestRegs::gpr`], so that the exit path pushes the guest's registers straight into the
//! struct, in the processor's register order, and needs no scratch register. It is one constant per CPU.
//!
//! No FPU, vector, debug or CR2 state is touched here: the image has no SSE, so the guest's values just stay in the CPU.

use super::cpu::PerCpu;
use super::processor::Entered;
use super::regs::GuestRegs;
use core::{
    arch::{asm, global_asm},
    mem::offset_of,
    sync::atomic::{AtomicPtr, Ordering},
};

unsafe extern "C" {
    fn nvmx_vmexit();
    fn nvmx_vmexit_untimed();
    fn nvmx_vmexit_traced();
    fn nvmx_vmenter();
    fn nvmx_vmenter_untimed();
}

/// The way in and the way out.
static ENTER: AtomicPtr<()> = AtomicPtr::new(nvmx_vmenter as *mut ());
static EXIT: AtomicPtr<()> = AtomicPtr::new(nvmx_vmexit as *mut ());

/// Where VM exits land.
pub fn exit_path() -> u64 {
    EXIT.load(Ordering::Relaxed) as u64
}

/// Neither way books time from now on.
pub fn without_clock() {
    ENTER.store(nvmx_vmenter_untimed as *mut (), Ordering::Relaxed);
    EXIT.store(nvmx_vmexit_untimed as *mut (), Ordering::Relaxed);
}

/// Exits are traced from now on: they come back as such, on the caller's rare path, with their time.
pub fn trace_exits() {
    EXIT.store(nvmx_vmexit_traced as *mut (), Ordering::Relaxed);
}

/// VMLAUNCH or VMRESUME.
#[inline(always)]
pub fn by_instruction(regs: &mut GuestRegs, launch: bool) -> Entered {
    let code: u64;
    // SAFETY: 1. the current VMCS is one of nvmx's and its host area was written by hw::host_area (HOST_RIP, HOST_RSP of these
    // registers). 2. `ENTER` is one of two ways that restore RBX, RBP and RSP, and all else is named here: so no more is saved than the caller
    // uses. 3. `regs` is exclusively borrowed. 4. The image has no SSE.
    unsafe {
        asm!("call qword ptr [rip + {enter}]", enter = sym ENTER, inout("rdi") regs => _, inout("rsi") u64::from(!launch) => _,
            lateout("rax") code, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _);
    }
    if code == 0 { Entered::Exit } else { not_entered(code) }
}

#[cold]
fn not_entered(code: u64) -> Entered {
    match code {
        1 => Entered::VmFail,
        2 => Entered::CalledOff,
        _ => Entered::TracedExit,
    }
}

// rdi = &GuestRegs, rsi = 0 for VMLAUNCH, else VMRESUME. Returns 0 exit, 1 VMfail, 2 an event arrived, 3 an exit that is traced.
//
// The window between the look at what arrived and the entry must not lose an NMI or a machine check: their handlers see that
// they interrupted the window and return to nvmx_entry_window_bail instead. RSP is nvmx's own all through it.
global_asm!(
    ".global nvmx_vmenter, nvmx_vmexit, nvmx_vmenter_untimed, nvmx_vmexit_untimed, nvmx_vmexit_traced, nvmx_entry_window_start, nvmx_entry_window_end, nvmx_entry_window_bail",
    // The guest's registers to where they belong.
    ".macro nvmx_guest_left",
    "push r15",
    "push r14",
    "push r13",
    "push r12",
    "push r11",
    "push r10",
    "push r9",
    "push r8",
    "push rdi",
    "push rsi",
    "push rbp",
    "push rbp",
    "push rbx",
    "push rdx",
    "push rcx",
    "push rax",
    "mov rdi, rsp",
    ".endm",
    "nvmx_vmenter_untimed:",
    "push rbx",
    "push rbp",
    "push rdi",
    "mov [rdi + {host_rsp}], rsp",
    "jmp nvmx_entry_window_start",
    "nvmx_vmenter:",
    // 1. Save what the caller wants kept, and where the stack is.
    "push rbx",
    "push rbp",
    "push rdi",
    "mov [rdi + {host_rsp}], rsp",
    // 2. Book the time spent since the last exit.
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [rdi + {exit_tsc}]",
    "add [rdi + {ticks}], rax",
    // 3. From here on an NMI or a machine check calls the entry off.
    "nvmx_entry_window_start:",
    "cmp byte ptr gs:[{arrived}], 0",
    "jne nvmx_entry_window_bail",
    "test rsi, rsi",
    // 4. The guest's registers; RDI, which points to them, last. MOV leaves ZF alone.
    "mov rax, [rdi + 8*0]",
    "mov rcx, [rdi + 8*1]",
    "mov rdx, [rdi + 8*2]",
    "mov rbx, [rdi + 8*3]",
    "mov rbp, [rdi + 8*5]",
    "mov rsi, [rdi + 8*6]",
    "mov r8, [rdi + 8*8]",
    "mov r9, [rdi + 8*9]",
    "mov r10, [rdi + 8*10]",
    "mov r11, [rdi + 8*11]",
    "mov r12, [rdi + 8*12]",
    "mov r13, [rdi + 8*13]",
    "mov r14, [rdi + 8*14]",
    "mov r15, [rdi + 8*15]",
    "mov rdi, [rdi + 8*7]",
    // 5. Go.
    "jz 2f",
    "vmresume",
    "jmp 3f",
    "2:",
    "vmlaunch",
    "nvmx_entry_window_end:",
    // 6. Still here: VMfail.
    "3:",
    "mov eax, 1",
    "jmp 4f",
    "nvmx_entry_window_bail:",
    "mov eax, 2",
    // Neither is an exit: the clock goes on from here.
    "4:",
    "mov r8d, eax",
    "mov rdi, [rsp]",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rdi + {exit_tsc}], rax",
    "mov eax, r8d",
    "jmp 5f",
    // 7. A VM exit lands here with RSP = &regs.gpr[16], or without a clock behind it.
    "nvmx_vmexit:",
    "nvmx_guest_left",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rdi + {exit_tsc}], rax",
    "6:",
    "mov rsp, [rdi + {host_rsp}]",
    "xor eax, eax",
    "5:",
    "pop rdi",
    "pop rbp",
    "pop rbx",
    "ret",
    "nvmx_vmexit_untimed:",
    "nvmx_guest_left",
    "jmp 6b",
    // An exit that is traced: the same with the clock, told on the caller's rare path.
    "nvmx_vmexit_traced:",
    "nvmx_guest_left",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rdi + {exit_tsc}], rax",
    "mov rsp, [rdi + {host_rsp}]",
    "mov eax, 3",
    "jmp 5b",
    host_rsp = const offset_of!(GuestRegs, host_rsp),
    exit_tsc = const offset_of!(GuestRegs, exit_tsc),
    ticks = const offset_of!(GuestRegs, ticks),
    arrived = const offset_of!(PerCpu, arrived),
);
