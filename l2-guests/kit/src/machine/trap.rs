//! Exceptions and interrupts: hooks, traps caught as values, and an end with a reason for the rest.

use super::{cpu, descriptors, report};
use crate::Global;
use core::{arch::asm, mem::MaybeUninit};

core::arch::global_asm!(include_str!("trap.s"), options(att_syntax));

/// #DB
pub const DB: u8 = 1;
/// NMI
pub const NMI: u8 = 2;
/// #BP
pub const BP: u8 = 3;
/// #UD
pub const UD: u8 = 6;
/// #DF
pub const DF: u8 = 8;
/// #SS
pub const SS: u8 = 12;
/// #GP
pub const GP: u8 = 13;
/// #PF
pub const PF: u8 = 14;
/// #MC
pub const MC: u8 = 18;
/// #VE
pub const VE: u8 = 20;

/// What the entry code leaves on the stack; a hook may change it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "registers speak for themselves")]
pub struct Frame {
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
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// A trap that was caught.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// Vector
    pub vector: u8,
    /// Error code, 0 if the vector has none
    pub error: u64,
    /// CR2 if it was #PF, else 0
    pub address: u64,
    /// The instruction that trapped
    pub rip: u64,
    /// CS there: tells the ring
    pub cs: u16,
}

/// Called at a trap; `true` if it was dealt with and the interrupted code goes on.
pub type Hook = fn(&mut Frame) -> bool;

static HOOKS: [Global<Option<Hook>>; 256] = [const { Global::new(None) }; 256];
/// Stack pointer of the innermost `catch`, 0 if there is none.
static CATCH: Global<u64> = Global::new(0);
static CAUGHT: Global<Option<Trap>> = Global::new(None);
static IDT: Global<[[u64; 2]; 256]> = Global::new([[0; 2]; 256]);

unsafe extern "C" {
    static kit_trap_entries: u8;
    fn kit_catch(f: unsafe extern "C" fn(*mut u8), argument: *mut u8, stack: *mut u64) -> u64;
    fn kit_catch_landing();
}

/// Sets or removes the hook of a vector; returns the one before.
pub fn hook(vector: u8, hook: Option<Hook>) -> Option<Hook> {
    HOOKS[usize::from(vector)].replace(hook)
}

/// Base of the IDT.
pub fn idt_base() -> u64 {
    core::ptr::from_ref(&IDT) as u64
}

/// Limit of the IDT
pub const IDT_LIMIT: u16 = (core::mem::size_of::<[[u64; 2]; 256]>() - 1) as u16;

/// Fills the IDT and loads it.
pub fn load() {
    let mut idt = IDT.get();
    let first = &raw const kit_trap_entries as u64;
    for (vector, gate) in (0u64..).zip(idt.iter_mut()) {
        let entry = first + vector * 16;
        let ist = match vector as u8 {
            DF => 1u64,
            NMI | MC => 2,
            // The stack pointer may be what is wrong.
            SS | GP | PF => 3,
            _ => 0,
        };
        // #BP and #OF may be raised by ring 3.
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        gate[0] = entry & 0xFFFF
            | u64::from(descriptors::KERNEL_CODE) << 16
            | ist << 32
            | (0x8E | dpl << 5) << 40
            | (entry >> 16 & 0xFFFF) << 48;
        gate[1] = entry >> 32;
    }
    IDT.set(idt);
    load_idt();
}

/// Loads the IDT, which all CPUs share.
pub fn load_idt() {
    let pointer = descriptors::TablePointer { limit: IDT_LIMIT, base: idt_base() };
    // SAFETY: single CPU, ring 0; the IDT is complete and stays where it is.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

#[unsafe(no_mangle)]
extern "C" fn kit_trap(frame: &mut Frame) {
    let vector = frame.vector as u8;
    if HOOKS[usize::from(vector)].get().is_some_and(|hook| hook(frame)) {
        return;
    }
    let address = if vector == PF { cpu::cr2() } else { 0 };
    let trap = Trap { vector, error: frame.error, address, rip: frame.rip, cs: frame.cs as u16 };
    match CATCH.replace(0) {
        0 => report::die(format_args!(
            "trap {vector} error {:#x} at {:#x}:{:#x} address {address:#x}",
            trap.error, trap.cs, trap.rip
        )),
        stack => {
            CAUGHT.set(Some(trap));
            frame.rip = kit_catch_landing as *const () as u64;
            frame.rsp = stack;
            frame.cs = u64::from(descriptors::KERNEL_CODE);
            frame.ss = u64::from(descriptors::KERNEL_DATA);
            // Interrupts off, no single step, no alignment checks
            frame.rflags = 2;
        }
    }
}

/// Runs `f` and returns its value, or the trap that ended it. Values that `f` owned are then forgotten, not dropped.
///
/// # Errors
/// The trap.
pub fn catch<T, F: FnOnce() -> T>(f: F) -> Result<T, Trap> {
    struct Call<T, F> {
        f: Option<F>,
        value: MaybeUninit<T>,
    }
    unsafe extern "C" fn thunk<T, F: FnOnce() -> T>(call: *mut u8) {
        // SAFETY: `kit_catch` passes on the pointer that it got below.
        let call = unsafe { &mut *call.cast::<Call<T, F>>() };
        if let Some(f) = call.f.take() {
            call.value.write(f());
        }
    }
    let mut call = Call { f: Some(f), value: MaybeUninit::uninit() };
    let before = CATCH.get();
    // SAFETY: `thunk` gets the type it expects; CATCH is only used while `kit_catch`'s frame is there.
    let trapped = unsafe { kit_catch(thunk::<T, F>, (&raw mut call).cast(), CATCH_SLOT.0) };
    CATCH.set(before);
    match trapped {
        // SAFETY: the thunk returned, so the value was written.
        0 => Ok(unsafe { call.value.assume_init() }),
        _ => Err(CAUGHT.replace(None).unwrap_or(Trap { vector: 0, error: 0, address: 0, rip: 0, cs: 0 })),
    }
}

/// Where `kit_catch` stores its stack pointer.
struct Slot(*mut u64);
// SAFETY: single CPU.
unsafe impl Sync for Slot {}
static CATCH_SLOT: Slot = Slot(core::ptr::from_ref(&CATCH).cast_mut().cast());

/// Exchanges the innermost `catch` for another context's (0 for none): a guest of the guest has its own.
pub fn swap_catch(other: u64) -> u64 {
    CATCH.replace(other)
}
