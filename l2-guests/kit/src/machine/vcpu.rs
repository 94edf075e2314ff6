//! Entering a guest and coming back.

use super::{
    pages,
    vmx::{self, Outcome},
};
use crate::fields;
use core::mem::offset_of;

/// General registers of a guest. RSP, RIP and RFLAGS are in the VMCS.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "registers speak for themselves")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    /// Our own stack pointer while the guest runs. The CPU's stack pointer after an exit points here (HOST_RSP), so that
    /// pushes fill the fields above.
    own_rsp: u64,
}

impl Registers {
    /// The register that an instruction encodes with `number`; RSP (4) is in the VMCS.
    pub fn get(&self, number: u64) -> u64 {
        match number & 15 {
            0 => self.rax,
            1 => self.rcx,
            2 => self.rdx,
            3 => self.rbx,
            4 => vmx::read(fields::GUEST_RSP),
            5 => self.rbp,
            6 => self.rsi,
            7 => self.rdi,
            8 => self.r8,
            9 => self.r9,
            10 => self.r10,
            11 => self.r11,
            12 => self.r12,
            13 => self.r13,
            14 => self.r14,
            _ => self.r15,
        }
    }

    /// EDX:EAX
    pub fn edx_eax(&self) -> u64 {
        self.rdx << 32 | self.rax & 0xFFFF_FFFF
    }

    /// Sets EDX:EAX as RDMSR and RDTSC do.
    pub fn set_edx_eax(&mut self, value: u64) {
        self.rax = value & 0xFFFF_FFFF;
        self.rdx = value >> 32;
    }
}

core::arch::global_asm!(
    ".pushsection .text.kit_enter, \"ax\"",
    // u64 kit_enter(rdi = registers, rsi = launched): 0 after an exit, else RFLAGS of the failed VMLAUNCH or VMRESUME
    ".global kit_enter",
    "kit_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rdi + {own_rsp}], rsp",
    "test esi, esi",
    "mov rax, [rdi + {rax}]",
    "mov rcx, [rdi + {rcx}]",
    "mov rdx, [rdi + {rdx}]",
    "mov rbx, [rdi + {rbx}]",
    "mov rbp, [rdi + {rbp}]",
    "mov rsi, [rdi + {rsi}]",
    "mov r8, [rdi + {r8}]",
    "mov r9, [rdi + {r9}]",
    "mov r10, [rdi + {r10}]",
    "mov r11, [rdi + {r11}]",
    "mov r12, [rdi + {r12}]",
    "mov r13, [rdi + {r13}]",
    "mov r14, [rdi + {r14}]",
    "mov r15, [rdi + {r15}]",
    "mov rdi, [rdi + {rdi}]",
    "jz 1f",
    "vmresume",
    "jmp 2f",
    "1: vmlaunch",
    // Not entered: the stack pointer is still ours
    "2: pushfq",
    "pop rax",
    "jmp 3f",
    // The exit: RSP points just above the registers
    ".global kit_exited",
    "kit_exited:",
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
    "mov rsp, [rsp + {own_rsp}]",
    "xor eax, eax",
    "3: pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
    own_rsp = const offset_of!(Registers, own_rsp),
    rax = const offset_of!(Registers, rax),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rbx = const offset_of!(Registers, rbx),
    rbp = const offset_of!(Registers, rbp),
    rsi = const offset_of!(Registers, rsi),
    rdi = const offset_of!(Registers, rdi),
    r8 = const offset_of!(Registers, r8),
    r9 = const offset_of!(Registers, r9),
    r10 = const offset_of!(Registers, r10),
    r11 = const offset_of!(Registers, r11),
    r12 = const offset_of!(Registers, r12),
    r13 = const offset_of!(Registers, r13),
    r14 = const offset_of!(Registers, r14),
    r15 = const offset_of!(Registers, r15),
);

unsafe extern "C" {
    fn kit_enter(registers: *mut Registers, launched: u64) -> u64;
    fn kit_exited();
}

/// A virtual CPU: a VMCS and the registers that are not in it.
pub struct Vcpu {
    /// Address of the VMCS region
    pub vmcs: u64,
    /// Whether the VMCS is launched
    pub launched: bool,
    /// The registers; their place in memory is in the VMCS, so they stay where they are.
    pub registers: &'static mut Registers,
}

impl Vcpu {
    /// A virtual CPU with a new, cleared VMCS that becomes the current one, or the instruction's failure.
    ///
    /// # Errors
    /// What VMCLEAR or VMPTRLD said.
    pub fn new(revision: u32) -> Result<Self, Outcome> {
        let region = pages::page();
        region[0] = u64::from(revision);
        let vmcs = pages::address(region);
        let registers = pages::take(size_of::<Registers>() as u64, 64);
        // SAFETY: fresh memory of the right size and alignment; all-zero registers are valid.
        let registers = unsafe { &mut *(registers as *mut Registers) };
        let vcpu = Self { vmcs, launched: false, registers };
        for outcome in [vmx::vmclear(vmcs), vmx::vmptrld(vmcs)] {
            if !outcome.succeeded() {
                return Err(outcome);
            }
        }
        vcpu.write_host_stack();
        Ok(vcpu)
    }

    /// HOST_RSP and HOST_RIP of the current VMCS.
    pub fn write_host_stack(&self) {
        vmx::write(fields::HOST_RSP, pages::address(&self.registers.own_rsp));
        vmx::write(fields::HOST_RIP, kit_exited as *const () as u64);
    }

    /// Enters the guest of the current VMCS and returns after its exit (or an entry that failed late).
    ///
    /// # Errors
    /// What VMLAUNCH or VMRESUME said if it did not enter.
    #[inline]
    pub fn run(&mut self) -> Result<(), Outcome> {
        // SAFETY: the host area is set up for `kit_exited`; what the guest may do to memory is its VMCS's business.
        let rflags = unsafe { kit_enter(self.registers, u64::from(self.launched)) };
        if rflags != 0 {
            return Err(Outcome::from_rflags(rflags));
        }
        self.launched = true;
        Ok(())
    }
}
