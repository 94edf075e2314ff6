//! Code in ring 3 and in compatibility mode. It always ends by a trap, `int3` if it has nothing better.

use super::{
    cpu,
    descriptors::{KERNEL_CODE32, KERNEL_DATA, USER_CODE, USER_DATA},
    pages::{self, Access},
    trap::{self, Trap},
};
use crate::Global;
use core::arch::asm;

const STACK: u64 = 4096;

static TABLES: Global<u64> = Global::new(0);
static STACK_TOP: Global<u64> = Global::new(0);

/// Page tables that let ring 3 use everything: CR3.
pub fn tables() -> u64 {
    if TABLES.get() == 0 {
        TABLES.set(pages::identity_tables(Access::User));
        STACK_TOP.set(pages::take(STACK, pages::PAGE) + STACK);
    }
    TABLES.get()
}

/// Runs the 64-bit code at an address in ring 3 with RDI and RSI, until it traps.
pub fn ring3(code: u64, rdi: u64, rsi: u64) -> Trap {
    let own = cpu::cr3();
    cpu::set_cr3(tables());
    let trap = until_trap(|| {
        // SAFETY: the far return never comes back; the trap that ends the code lands in `until_trap`.
        unsafe {
            asm!(
                "push {ss}", "push {rsp}", "push 2", "push {cs}", "push {rip}", "iretq",
                ss = in(reg) u64::from(USER_DATA), rsp = in(reg) STACK_TOP.get(), cs = in(reg) u64::from(USER_CODE),
                rip = in(reg) code, in("rdi") rdi, in("rsi") rsi, options(noreturn),
            )
        }
    });
    cpu::set_cr3(own);
    trap
}

/// Runs the 32-bit code at an address in ring 0 with EDI and ESI, until it traps.
pub fn compatibility(code: u64, edi: u32, esi: u32) -> Trap {
    tables();
    until_trap(|| {
        // SAFETY: as in `ring3`; all of the image is below 4 GiB.
        unsafe {
            asm!(
                "push {ss}", "push {rsp}", "push 2", "push {cs}", "push {rip}", "iretq",
                ss = in(reg) u64::from(KERNEL_DATA), rsp = in(reg) STACK_TOP.get(), cs = in(reg) u64::from(KERNEL_CODE32),
                rip = in(reg) code, in("edi") edi, in("esi") esi, options(noreturn),
            )
        }
    })
}

/// Calls the code at an address in ring 0 with RDI and RSI, until it traps.
pub fn ring0(code: u64, rdi: u64, rsi: u64) -> Trap {
    until_trap(|| {
        // SAFETY: the code does not return; it changes registers only.
        unsafe { asm!("jmp {}", in(reg) code, in("rdi") rdi, in("rsi") rsi, options(noreturn)) }
    })
}

fn until_trap(f: impl FnOnce()) -> Trap {
    trap::catch(f).err().unwrap_or_else(|| panic!("code that should end by a trap returned"))
}
