//! The processor that nvmx runs on: an instruction each.

use core::arch::asm;

use raw_cpuid::CpuIdResult;

use crate::addr::Hpa;
use crate::hw::cpu;
use crate::hw::phys::{DIRECT_MAP, DirectMap};
use crate::hw::processor::{Entered, Invalidate, Processor, Register};
use crate::hw::region::Region;
use crate::hw::regs::GuestRegs;
use crate::hw::switch;
use crate::vmx::Field;
use crate::x86::Fault;

/// The processor that executes this.
#[derive(Clone, Copy, Debug)]
pub struct Real(());

/// The processor that executes this.
#[inline(always)]
pub const fn this_processor() -> Real {
    Real(())
}

/// Reads the register of this name.
macro_rules! read {
    ($name:literal) => {{
        let value;
        // SAFETY: reading has no side effect; DR7.GD of nvmx is 0 after each exit.
        unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }};
}

/// Writes the register of this name.
macro_rules! write {
    ($name:literal, $value:expr) => {
        // SAFETY: the caller's promise. Not `nomem`: it may change what memory accesses do.
        unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) $value, options(nostack, preserves_flags)) }
    };
}

/// Where [`Processor::exchange`] ends if the processor refuses a region of nvmx's own. It is jumped to, and needs no return address.
extern "C" fn refused() -> ! {
    panic!("VMCLEAR or VMPTRLD of nvmx's own failed")
}

// VMfailInvalid sets CF, VMfailValid sets ZF (SDM, "Conventions"): SETBE sees both.
impl Processor for Real {
    #[inline]
    unsafe fn vmxon(&mut self, region: Hpa) -> bool {
        let failed: u8;
        // SAFETY: the caller's promise.
        unsafe { asm!("vmxon [{p}]", "setbe {f}", p = in(reg) &region.get(), f = out(reg_byte) failed) };
        failed == 0
    }

    #[inline(always)]
    fn vmread(&mut self, field: Field) -> u64 {
        let value: u64;
        // SAFETY: VMREAD has no effect but on its destination and RFLAGS. `nomem`: no Rust object lies in a VMCS region.
        unsafe {
            asm!("vmread {v}, {f}", v = out(reg) value, f = in(reg) field.encoding() as u64, options(nomem, nostack))
        };
        value
    }

    #[inline]
    fn has_field(&mut self, field: Field) -> bool {
        let failed: u8;
        // SAFETY: VMREAD has no effect but on its destination and RFLAGS.
        unsafe {
            asm!("vmread {v}, {f}", "setbe {x}", v = out(reg) _, f = in(reg) field.encoding() as u64, x = out(reg_byte) failed, options(nostack))
        };
        failed == 0
    }

    #[inline(always)]
    fn vmwrite(&mut self, field: Field, value: u64) {
        #[cfg(debug_assertions)]
        let failed: u8;
        // SAFETY: VMWRITE changes a field of a VMCS that nvmx owns; what an entry may load from it is decided by the
        // code that composes the VMCS, the processor checks it before use.
        #[cfg(debug_assertions)]
        unsafe {
            asm!("vmwrite {f}, {v}", "setbe {x}", v = in(reg) value, f = in(reg) field.encoding() as u64, x = out(reg_byte) failed, options(nostack));
            assert!(failed == 0, "VMWRITE {field} failed");
        }
        // SAFETY: as above.
        #[cfg(not(debug_assertions))]
        unsafe {
            asm!("vmwrite {f}, {v}", v = in(reg) value, f = in(reg) field.encoding() as u64, options(nomem, nostack))
        };
    }

    #[inline(always)]
    fn vmptrld(&mut self, region: Hpa) -> bool {
        let failed: u8;
        // SAFETY: callers pass VMCS regions out of nvmx's own frames; the processor refuses a wrong revision.
        unsafe { asm!("vmptrld [{p}]", "setbe {f}", p = in(reg) &region.get(), f = out(reg_byte) failed) };
        failed == 0
    }

    #[inline(always)]
    fn vmclear(&mut self, region: Hpa) -> bool {
        let failed: u8;
        // SAFETY: callers pass VMCS regions out of nvmx's own frames.
        unsafe { asm!("vmclear [{p}]", "setbe {f}", p = in(reg) &region.get(), f = out(reg_byte) failed) };
        failed == 0
    }

    #[inline(always)]
    fn exchange(&mut self, _: &DirectMap, from: &Region, word: u32, to: &Region) -> bool {
        // SAFETY: 1. as for `vmclear` and `vmptrld`; `refused` does not come back. 2. A region is a frame of nvmx's: mapped and writable through the direct map (condition 1 of
        // `DirectMap::new`), and no Rust object lies in it.
        unsafe {
            asm!("vmclear [{f}]", "jbe {refused}", "mov [{base} + {at}], {word}", "vmptrld [{t}]", "jbe {refused}",
                f = in(reg) from.operand(), t = in(reg) to.operand(), base = in(reg) DIRECT_MAP, at = in(reg) from.at().get(),
                word = in(reg) u64::from(word), refused = sym refused);
        }
        true
    }

    #[inline]
    fn invept(&mut self, kind: Invalidate, eptp: u64) -> bool {
        let descriptor = [eptp, 0];
        let failed: u8;
        // SAFETY: dropping cached translations is always allowed.
        unsafe {
            asm!("invept {k}, [{d}]", "setbe {f}", k = in(reg) kind as u64, d = in(reg) &descriptor, f = out(reg_byte) failed);
        }
        failed == 0
    }

    #[inline]
    fn invvpid(&mut self, kind: Invalidate, vpid: u16, linear: u64) -> bool {
        let descriptor = [u64::from(vpid), linear];
        let failed: u8;
        // SAFETY: dropping cached translations is always allowed.
        unsafe {
            asm!("invvpid {k}, [{d}]", "setbe {f}", k = in(reg) kind as u64, d = in(reg) &descriptor, f = out(reg_byte) failed);
        }
        failed == 0
    }

    #[inline(always)]
    fn enter(&mut self, regs: &mut GuestRegs, launch: bool) -> Entered {
        switch::by_instruction(regs, launch)
    }

    fn without_clock(&mut self) {
        switch::without_clock();
    }

    fn exit_path(&self) -> u64 {
        switch::exit_path()
    }

    fn trace_exits(&mut self) {
        switch::trace_exits();
    }

    #[inline]
    fn rdmsr(&mut self, index: u32) -> Result<u64, Fault> {
        let (low, high, failed): (u32, u32, u32);
        // SAFETY: 1. a #GP lands on label 3 with registers as they were at label 2, so `failed` stays 1. 2. RDMSR writes
        // EAX and EDX only.
        unsafe {
            asm!(
                "2: rdmsr",
                "xor {failed:e}, {failed:e}",
                "3:",
                ".pushsection .fixup, \"a\", @progbits",
                ".quad 2b, 3b",
                ".popsection",
                failed = inout(reg) 1u32 => failed,
                in("ecx") index, inout("eax") 0 => low, inout("edx") 0 => high,
                options(nomem, nostack),
            );
        }
        if failed == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Fault::GeneralProtection(0)) }
    }

    #[inline]
    unsafe fn wrmsr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        let failed: u32;
        // SAFETY: 1. as in `rdmsr`. 2. What the value does is the caller's promise.
        unsafe {
            asm!(
                "2: wrmsr",
                "xor {failed:e}, {failed:e}",
                "3:",
                ".pushsection .fixup, \"a\", @progbits",
                ".quad 2b, 3b",
                ".popsection",
                failed = inout(reg) 1u32 => failed,
                in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
                options(nostack),
            );
        }
        if failed == 0 { Ok(()) } else { Err(Fault::GeneralProtection(0)) }
    }

    #[inline(always)]
    fn read(&mut self, register: Register) -> u64 {
        match register {
            Register::Cr0 => read!("cr0"),
            Register::Cr2 => read!("cr2"),
            Register::Cr3 => read!("cr3"),
            Register::Cr4 => read!("cr4"),
            Register::Dr0 => read!("dr0"),
            Register::Dr1 => read!("dr1"),
            Register::Dr2 => read!("dr2"),
            Register::Dr3 => read!("dr3"),
            Register::Dr6 => read!("dr6"),
            Register::Dr7 => read!("dr7"),
            Register::Pkru => {
                let value: u32;
                // SAFETY: it reads a register; the caller has set CR4.PKE.
                unsafe { asm!("rdpkru", out("eax") value, out("edx") _, in("ecx") 0, options(nomem, nostack)) };
                value.into()
            }
        }
    }

    #[inline(always)]
    unsafe fn write(&mut self, register: Register, value: u64) {
        match register {
            Register::Cr0 => write!("cr0", value),
            Register::Cr2 => write!("cr2", value),
            Register::Cr3 => write!("cr3", value),
            Register::Cr4 => write!("cr4", value),
            Register::Dr0 => write!("dr0", value),
            Register::Dr1 => write!("dr1", value),
            Register::Dr2 => write!("dr2", value),
            Register::Dr3 => write!("dr3", value),
            Register::Dr6 => write!("dr6", value),
            Register::Dr7 => write!("dr7", value),
            Register::Pkru => {}
        }
    }

    #[inline]
    fn xsetbv(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        let failed: u32;
        // SAFETY: 1. a #GP or #UD lands on label 3 with registers as they were. 2. nvmx uses no SSE or AVX state.
        unsafe {
            asm!(
                "2: xsetbv",
                "xor {failed:e}, {failed:e}",
                "3:",
                ".pushsection .fixup, \"a\", @progbits",
                ".quad 2b, 3b",
                ".popsection",
                failed = inout(reg) 1u32 => failed,
                in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
                options(nomem, nostack),
            );
        }
        if failed == 0 { Ok(()) } else { Err(Fault::GeneralProtection(0)) }
    }

    #[inline(always)]
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> CpuIdResult {
        raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf)
    }

    #[inline(always)]
    fn tsc(&mut self) -> u64 {
        // SAFETY: RDTSC reads a counter.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn write_back_caches(&mut self) {
        // SAFETY: WBINVD loses nothing, it only costs time.
        unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
    }

    fn device_read(&mut self, phys: &DirectMap, at: Hpa) -> u32 {
        let window = cpu::this().window(phys, at.page()).wrapping_add(at.page_offset() as usize);
        let value: u32;
        // SAFETY: 1. the window maps the page. 2. Reading has no effect on Rust's memory.
        unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) window, options(nostack, preserves_flags, readonly)) };
        value
    }

    unsafe fn device_write(&mut self, phys: &DirectMap, at: Hpa, value: u32) {
        let window = cpu::this().window(phys, at.page()).wrapping_add(at.page_offset() as usize);
        // SAFETY: 1. the window maps the page. 2. The rest is the caller's promise.
        unsafe { asm!("mov [{}], {:e}", in(reg) window, in(reg) value, options(nostack, preserves_flags)) };
    }

    #[inline]
    unsafe fn inb(&mut self, port: u16) -> u8 {
        let value;
        // SAFETY: the caller's promise.
        unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
        value
    }

    #[inline]
    unsafe fn outb(&mut self, port: u16, value: u8) {
        // SAFETY: the caller's promise.
        unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    }

    fn halt(&mut self) -> ! {
        loop {
            // SAFETY: interrupts stay off; an NMI or SMI wakes it, then it halts again.
            unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
        }
    }
}
