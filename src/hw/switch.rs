//! The one way into a guest and back.
//!
//! HOST_RSP points just behind [`GuestRegs::gpr`], so that the exit path pushes the guest's registers straight into the
//! struct, in the processor's register order, and needs no scratch register. It is one constant per CPU.
//!
//! No FPU, vector, debug or CR2 state is touched here: the image has no SSE, so the guest's values just stay in the CPU.

use super::cpu::PerCpu;
use super::processor::Entered;
use super::regs::GuestRegs;
use core::{arch::global_asm, mem::offset_of};

unsafe extern "C" {
    fn nvmx_vmexit();
    fn nvmx_vmenter(regs: *mut GuestRegs, launch: u64) -> u64;
}

/// Where VM exits land.
pub fn exit_path() -> u64 {
    nvmx_vmexit as *const () as u64
}

/// VMLAUNCH or VMRESUME.
#[inline(always)]
pub fn by_instruction(regs: &mut GuestRegs, launch: bool) -> Entered {
    // SAFETY: 1. the current VMCS is one of nvmx's and its host area was written by hw::host_area (HOST_RIP, HOST_RSP of these
    // registers). 2. the asm restores all callee-saved registers. 3. `regs` is exclusively borrowed.
    let code = unsafe { nvmx_vmenter(regs, launch as u64) };
    if code == 0 { Entered::Exit } else { not_entered(code) }
}

#[cold]
fn not_entered(code: u64) -> Entered {
    if code == 1 { Entered::VmFail } else { Entered::Nmi }
}

// rdi = &GuestRegs, rsi = launch. Returns 0 exit, 1 VMfail, 2 NMI pending.
//
// The window between the look at the NMI flag and the entry must not lose an NMI: the NMI handler sees that it interrupted
// the window and returns to nvmx_entry_window_bail instead. RSP is nvmx's own all through it.
global_asm!(
    ".global nvmx_vmenter, nvmx_vmexit, nvmx_entry_window_start, nvmx_entry_window_end, nvmx_entry_window_bail",
    "nvmx_vmenter:",
    // 1. Save what the C ABI wants kept, and where the stack is.
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "mov [rdi + {host_rsp}], rsp",
    // 2. Book the time spent since the last exit.
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [rdi + {exit_tsc}]",
    "add [rdi + {ticks}], rax",
    // 3. From here on an NMI aborts the entry.
    "nvmx_entry_window_start:",
    "cmp byte ptr gs:[{nmi_pending}], 0",
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
    "jnz 2f",
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
    // 7. A VM exit lands here with RSP = &regs.gpr[16].
    "nvmx_vmexit:",
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
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rdi + {exit_tsc}], rax",
    "mov rsp, [rdi + {host_rsp}]",
    "xor eax, eax",
    "5:",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    host_rsp = const offset_of!(GuestRegs, host_rsp),
    exit_tsc = const offset_of!(GuestRegs, exit_tsc),
    ticks = const offset_of!(GuestRegs, ticks),
    nmi_pending = const offset_of!(PerCpu, nmi_pending),
);
