//! The VMX instructions as functions, with what they leave in RFLAGS.

use crate::fields;
use core::{arch::asm, fmt};
use l2_protocol::Value;

/// CF, PF, AF, ZF, SF, OF: what a VMX instruction sets or clears (SDM "Conventions").
const ARITHMETIC: u64 = 0x8D5;
const CF: u64 = 1 << 0;
const ZF: u64 = 1 << 6;

/// The outcome of a VMX instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// VMsucceed
    Succeed,
    /// VMfailInvalid
    FailInvalid,
    /// VMfailValid with the VM-instruction error
    FailValid(u32),
    /// Flags that the SDM does not know
    Strange(u64),
}

impl Outcome {
    /// From RFLAGS after the instruction.
    #[inline]
    pub fn from_rflags(rflags: u64) -> Self {
        match rflags & ARITHMETIC {
            0 => Outcome::Succeed,
            CF => Outcome::FailInvalid,
            ZF => Outcome::FailValid(read(fields::INSTRUCTION_ERROR) as u32),
            other => Outcome::Strange(other),
        }
    }

    /// Whether it is VMsucceed.
    pub fn succeeded(self) -> bool {
        self == Outcome::Succeed
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Succeed => f.write_str("succeed"),
            Outcome::FailInvalid => f.write_str("fail-invalid"),
            Outcome::FailValid(error) => write!(f, "fail-{error}"),
            Outcome::Strange(flags) => write!(f, "flags-{flags:#x}"),
        }
    }
}

impl Value for Outcome {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

/// Runs one VMX instruction, given as for `asm!`, with all arithmetic flags set before, so that one it forgets to clear
/// shows: `vmx!("vmread [rax], {f}", in("rax") p, f = in(reg) field)` is its [`Outcome`](crate::vmx::Outcome).
#[macro_export]
macro_rules! vmx {
    ($instruction:expr $(, $($operand:tt)*)?) => {{
        let rflags: u64;
        #[allow(clippy::macro_metavars_in_unsafe, reason = "operands of asm! cannot be named outside of it")]
        // SAFETY: single CPU, ring 0; a bad operand traps or fails, and that is the caller's experiment.
        unsafe {
            ::core::arch::asm!(
                "push 0x8D7", "popfq", $instruction, "pushfq", "pop {rflags}",
                rflags = out(reg) rflags $(, $($operand)*)?
            );
        }
        $crate::vmx::Outcome::from_rflags(rflags)
    }};
}

/// VMXON with the address of a region.
pub fn vmxon(region: u64) -> Outcome {
    vmx!("vmxon [{p}]", p = in(reg) &raw const region)
}

/// VMXOFF.
pub fn vmxoff() -> Outcome {
    let rflags: u64;
    // SAFETY: as in `vmx!`.
    unsafe { asm!("push 0x8D7", "popfq", "vmxoff", "pushfq", "pop {}", out(reg) rflags) };
    // There is no VMCS to read an error from after it.
    if rflags & (CF | ZF) == 0 { Outcome::Succeed } else { Outcome::Strange(rflags & ARITHMETIC) }
}

/// VMCLEAR of a region.
pub fn vmclear(region: u64) -> Outcome {
    vmx!("vmclear [{p}]", p = in(reg) &raw const region)
}

/// VMPTRLD of a region.
#[inline]
pub fn vmptrld(region: u64) -> Outcome {
    vmx!("vmptrld [{p}]", p = in(reg) &raw const region)
}

/// VMPTRST: the current VMCS, all ones if there is none.
pub fn vmptrst() -> (Outcome, u64) {
    let mut region = 0;
    let outcome = vmx!("vmptrst [{p}]", p = in(reg) &raw mut region);
    (outcome, region)
}

/// VMREAD with its outcome; the value is 0 if it failed.
pub fn try_read(field: u64) -> (Outcome, u64) {
    let mut value = 0;
    let outcome = vmx!("vmread {v}, {f}", v = inout(reg) value, f = in(reg) field);
    (outcome, value)
}

/// VMWRITE with its outcome.
pub fn try_write(field: u64, value: u64) -> Outcome {
    vmx!("vmwrite {f}, {v}", f = in(reg) field, v = in(reg) value)
}

/// VMLAUNCH that must fail: if it entered, nobody would be there for the exit. Real entries are [`Vcpu`](super::vcpu::Vcpu)'s.
pub fn vmlaunch() -> Outcome {
    vmx!("vmlaunch")
}

/// VMRESUME that must fail, as [`vmlaunch`].
pub fn vmresume() -> Outcome {
    vmx!("vmresume")
}

/// VMCALL in root operation.
pub fn vmcall() -> Outcome {
    vmx!("vmcall")
}

/// VMREAD of a field that exists.
#[inline(always)]
pub fn read(field: u32) -> u64 {
    let value;
    // SAFETY: reading has no effect on Rust's state.
    unsafe { asm!("vmread {}, {}", out(reg) value, in(reg) u64::from(field), options(nomem, nostack)) };
    value
}

/// VMWRITE of a field that exists and can be written.
#[inline(always)]
pub fn write(field: u32, value: u64) {
    // SAFETY: the values that matter for Rust's state (host area) are written by `setup` and `vcpu` only.
    unsafe { asm!("vmwrite {}, {}", in(reg) u64::from(field), in(reg) value, options(nostack)) };
}

/// INVEPT.
pub fn invept(kind: u64, descriptor: [u64; 2]) -> Outcome {
    vmx!("invept {k}, [{d}]", k = in(reg) kind, d = in(reg) &raw const descriptor)
}

/// INVVPID.
pub fn invvpid(kind: u64, descriptor: [u64; 2]) -> Outcome {
    vmx!("invvpid {k}, [{d}]", k = in(reg) kind, d = in(reg) &raw const descriptor)
}

/// Basic exit reasons (SDM "VMX Basic Exit Reasons").
pub mod reason {
    #![allow(missing_docs, reason = "the names are the SDM's")]
    pub const EXCEPTION_OR_NMI: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const CPUID: u32 = 10;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const RDTSC: u32 = 16;
    pub const VMCALL: u32 = 18;
    pub const VMREAD: u32 = 23;
    pub const VMWRITE: u32 = 25;
    pub const CR_ACCESS: u32 = 28;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const INVALID_GUEST_STATE: u32 = 33;
    pub const MSR_LOADING: u32 = 34;
    pub const TPR_BELOW_THRESHOLD: u32 = 43;
    pub const APIC_ACCESS: u32 = 44;
    pub const VIRTUALIZED_EOI: u32 = 45;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const XSETBV: u32 = 55;
    pub const APIC_WRITE: u32 = 56;
    pub const VMFUNC: u32 = 59;
    pub const PML_FULL: u32 = 62;
    /// Bit of the exit reason: the entry failed
    pub const ENTRY_FAILURE: u32 = 1 << 31;
}
