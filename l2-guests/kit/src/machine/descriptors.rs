//! GDT and TSS: flat segments for ring 0, ring 3 and compatibility mode, and stacks for traps.

use super::smp::MAX_CPUS;
use crate::Global;
use core::{arch::asm, cell::UnsafeCell, mem::size_of};

/// Ring 0, 64-bit code
pub const KERNEL_CODE: u16 = 0x08;
/// Ring 0 data
pub const KERNEL_DATA: u16 = 0x10;
/// Ring 3, 64-bit code
pub const USER_CODE: u16 = 0x18 | 3;
/// Ring 3 data
pub const USER_DATA: u16 = 0x20 | 3;
/// Ring 0, 32-bit code: compatibility mode
pub const KERNEL_CODE32: u16 = 0x28;
/// The task state segment
pub const TSS: u16 = 0x30;

/// Limit of the GDT
pub const GDT_LIMIT: u16 = (size_of::<[u64; 8]>() - 1) as u16;
/// Limit of the TSS
pub const TSS_LIMIT: u32 = (size_of::<TaskState>() - 1) as u32;

const STACK: usize = 16 * 1024;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Stack([u8; STACK]);

/// 64-bit TSS (SDM "64-Bit TSS Format").
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
struct TaskState {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Tables {
    gdt: [u64; 8],
    tss: TaskState,
}

static TABLES: [Global<Tables>; MAX_CPUS] = [const { Global::new(EMPTY) }; MAX_CPUS];
const EMPTY: Tables = Tables {
    gdt: [
        0,
        0x00AF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00AF_FB00_0000_FFFF,
        0x00CF_F300_0000_FFFF,
        0x00CF_9B00_0000_FFFF,
        0,
        0,
    ],
    tss: TaskState {
        reserved0: 0,
        rsp: [0; 3],
        reserved1: 0,
        ist: [0; 7],
        reserved2: 0,
        reserved3: 0,
        io_map: size_of::<TaskState>() as u16,
    },
};

/// Of each CPU: for traps out of ring 3, for #DF, for NMI and #MC, for #SS, #GP and #PF, and the one it starts on.
const STACKS_PER_CPU: usize = 5;
struct Stacks(UnsafeCell<[[Stack; STACKS_PER_CPU]; MAX_CPUS]>);
// SAFETY: each CPU uses its own.
unsafe impl Sync for Stacks {}
static STACKS: Stacks = Stacks(UnsafeCell::new([[Stack([0; STACK]); STACKS_PER_CPU]; MAX_CPUS]));

/// End of a stack of a CPU.
fn stack_end(cpu: usize, number: usize) -> u64 {
    STACKS.0.get() as u64 + ((cpu * STACKS_PER_CPU + number + 1) * STACK) as u64
}

/// End of the stack that a CPU other than the first starts on.
pub fn start_stack(cpu: usize) -> u64 {
    stack_end(cpu, STACKS_PER_CPU - 1)
}

/// A pointer to memory and its limit, as LGDT, LIDT, SGDT and SIDT use it.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, packed)]
pub struct TablePointer {
    /// Size - 1
    pub limit: u16,
    /// First byte
    pub base: u64,
}

/// Base of the GDT of this CPU.
pub fn gdt_base() -> u64 {
    base_of(index())
}

fn base_of(cpu: usize) -> u64 {
    core::ptr::from_ref(&TABLES) as u64 + (cpu * size_of::<Global<Tables>>()) as u64
}

/// Which CPU this is, from the GDT it has loaded: that works in a guest of the guest too, which runs on the same. 0 with a
/// foreign GDT.
pub fn index() -> usize {
    let mut pointer = TablePointer::default();
    // SAFETY: stores ten bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut pointer, options(nostack, preserves_flags)) };
    let offset = pointer.base.wrapping_sub(base_of(0)) as usize / size_of::<Global<Tables>>();
    if offset < MAX_CPUS { offset } else { 0 }
}

/// Base of the TSS of this CPU.
pub fn tss_base() -> u64 {
    gdt_base() + core::mem::offset_of!(Tables, tss) as u64
}

/// Makes this CPU number `cpu`: loads its GDT, segments and TR.
pub fn load(cpu: usize) {
    let base = base_of(cpu) + core::mem::offset_of!(Tables, tss) as u64;
    let mut tables = EMPTY;
    tables.gdt[6] = 0x0000_8900_0000_0000 | u64::from(TSS_LIMIT) | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56;
    tables.gdt[7] = base >> 32;
    let top = |number| stack_end(cpu, number);
    tables.tss.rsp = [top(0); 3];
    tables.tss.ist = [top(1), top(2), top(3), 0, 0, 0, 0];
    TABLES[cpu].set(tables);
    let pointer = TablePointer { limit: GDT_LIMIT, base: base_of(cpu) };
    // SAFETY: single CPU, ring 0; the GDT is complete and stays where it is. CS keeps its selector, whose descriptor is the
    // boot code's in the same place of the table.
    unsafe {
        asm!(
            "lgdt [{p}]", "mov ds, {d:x}", "mov es, {d:x}", "mov ss, {d:x}", "ltr {t:x}",
            p = in(reg) &raw const pointer, d = in(reg) KERNEL_DATA, t = in(reg) TSS, options(nostack),
        );
    }
}
