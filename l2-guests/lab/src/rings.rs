//! All four rings: a GDT that has code and data for rings 0, 1 and 3, and the way into a ring.
//!
//! Ring compression means that a kernel which was written for ring 0 runs in ring 1 (or 3), so that a monitor can have ring 0.
//! Pages cannot tell rings 0, 1 and 2 apart (SDM "Page-Level Protection": all are supervisor mode), so in 64-bit mode nothing
//! keeps such a kernel out of its monitor's memory. Here that is welcome: it runs from the same pages.

use core::arch::asm;
use l2_kit::{
    Global, cpu,
    descriptors::{self, TablePointer},
    pages::{self, PAGE},
    trap::{self, Trap},
    user,
};

/// A ring with its selectors for 64-bit code, 32-bit code and data.
#[derive(Clone, Copy)]
pub struct Ring {
    /// 64-bit code
    pub code: u16,
    /// Code of compatibility mode
    pub code32: u16,
    /// Data
    pub data: u16,
}

pub const RING0: Ring = Ring { code: 0x08, code32: 0x38, data: 0x10 };
pub const RING1: Ring = Ring { code: 0x30 | 1, code32: 0x48 | 1, data: 0x28 | 1 };
/// SYSRET wants data before code.
pub const RING3: Ring = Ring { code: 0x20 | 3, code32: 0x40 | 3, data: 0x18 | 3 };
/// IA32_STAR: SYSCALL goes to ring 0, SYSRET to ring 3.
pub const STAR: u64 = 0x0010 << 48 | 0x0008 << 32;
/// TSS of the GDT that a kernel would have made for itself.
pub const KERNEL_TSS: u16 = 0x60;
/// Its LDT
pub const KERNEL_LDT: u16 = 0x70;
/// Limit of either GDT
pub const GDT_LIMIT: u16 = 16 * 8 - 1;
/// RFLAGS.IF
pub const IF: u64 = 1 << 9;

const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
const CODE32: u64 = 0x00CF_9B00_0000_FFFF;
const DATA: u64 = 0x00CF_9300_0000_FFFF;

/// A GDT of its own page: its address. All its TSSs are the kit's, so that traps find their stacks.
pub fn gdt() -> u64 {
    let dpl = |ring: u64| ring << 45;
    let table = pages::page();
    let at = pages::address(table);
    table[1..10].copy_from_slice(&[
        CODE64,
        DATA,
        DATA | dpl(3),
        CODE64 | dpl(3),
        DATA | dpl(1),
        CODE64 | dpl(1),
        CODE32,
        CODE32 | dpl(3),
        CODE32 | dpl(1),
    ]);
    let system = |base: u64, kind: u64| {
        let low = u64::from(descriptors::TSS_LIMIT) | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56;
        [low | kind << 40, base >> 32]
    };
    let tss = system(descriptors::tss_base(), 0x89);
    table[10..12].copy_from_slice(&tss);
    table[12..14].copy_from_slice(&tss);
    table[14..16].copy_from_slice(&system(at, 0x82));
    at
}

/// LGDT.
pub fn load_gdt(base: u64, limit: u16) {
    let pointer = TablePointer { limit, base };
    // SAFETY: single CPU, ring 0; the table is complete and has this ring's selectors where they were.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// LIDT.
pub fn load_idt(base: u64) {
    let pointer = TablePointer { limit: trap::IDT_LIMIT, base };
    // SAFETY: as above; the table is a copy of the kit's.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// LTR and LLDT.
pub fn load_tr_ldtr(tss: u16, ldt: u16) {
    // SAFETY: single CPU, ring 0; the descriptors are there, the TSS not busy.
    unsafe { asm!("ltr {:x}", "lldt {:x}", in(reg) tss, in(reg) ldt, options(nostack)) };
}

/// Everything as the kit had it.
pub fn restore() {
    descriptors::load(0);
    trap::load_idt();
    // SAFETY: no LDT.
    unsafe { asm!("lldt {:x}", in(reg) 0, options(nostack)) };
}

/// A copy of the kit's IDT in a page of its own.
pub fn idt() -> u64 {
    let page = pages::page();
    // SAFETY: 256 gates of 16 bytes; nobody writes to them now.
    page.copy_from_slice(unsafe { core::slice::from_raw_parts(trap::idt_base() as *const u64, 512) });
    pages::address(page)
}

static STACK: Global<u64> = Global::new(0);

/// Runs the code at an address in a ring with RDI and RFLAGS, until it traps. The GDT in use is a [`gdt`]; the page tables let
/// ring 3 use everything.
pub fn run(ring: Ring, wide: bool, code: u64, rdi: u64, rflags: u64) -> Trap {
    if STACK.get() == 0 {
        STACK.set(pages::take(PAGE, PAGE) + PAGE);
    }
    let own = cpu::cr3();
    cpu::set_cr3(user::tables());
    let cs = if wide { ring.code } else { ring.code32 };
    let trap = trap::catch(|| {
        // SAFETY: the return never comes back; the trap that ends the code lands in `catch`.
        unsafe {
            asm!(
                "push {ss}", "push {rsp}", "push {flags}", "push {cs}", "push {rip}", "iretq",
                ss = in(reg) u64::from(ring.data), rsp = in(reg) STACK.get() - 64, flags = in(reg) rflags | 2,
                cs = in(reg) u64::from(cs), rip = in(reg) code, in("rdi") rdi, options(noreturn),
            )
        }
    });
    cpu::set_cr3(own);
    trap.err().unwrap_or_else(|| panic!("code that should end by a trap returned"))
}
