//! The memory management of a small guest kernel: pages on demand, changed rights, copy on write. It runs in the guest, and the
//! same under each kind of hypervisor.

use crate::{guest::call, store::store};
use core::{arch::asm, ptr::read_volatile};
use l2_kit::{
    Global, cpu,
    pages::{self, LARGE, PAGE},
    trap::{self, Frame, PF},
};

/// Where the kernel maps its pages: nothing else is there.
pub const AREA: u64 = 0x80_0000_0000;
/// RAX of the hypercall that announces a copy-on-write: RBX = linear address, RCX = its new entry.
pub const ANNOUNCE: u64 = 0x1AC0;
/// Pages that the kernel has frames for
pub const PAGES: u64 = 256;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 3;

/// The guest's page tables
pub static CR3: Global<u64> = Global::new(0);
/// 512 frames
pub static FRAMES: Global<u64> = Global::new(0);
/// Page faults that the kernel handled
pub static FAULTS: Global<u64> = Global::new(0);
/// Whether it announces its copy-on-write
pub static ANNOUNCES: Global<bool> = Global::new(false);
/// 0: not copying; 1: forking; 2: writing after it
pub static PHASE: Global<usize> = Global::new(0);

/// Frames for the kernel, page tables for [`AREA`] down to the last level, its page-fault handler.
pub fn boot(cr3: u64, fault: fn(&mut Frame) -> bool) {
    if FRAMES.get() == 0 {
        FRAMES.set(pages::take(LARGE, LARGE));
    }
    CR3.set(cr3);
    FAULTS.set(0);
    pages::set_entry(cr3, AREA, 0);
    trap::hook(PF, Some(fault));
}

/// Two frames for each page: the one it has and the one it gets.
pub fn frame(page: u64, second: bool) -> u64 {
    FRAMES.get() + (page % PAGES + if second { PAGES } else { 0 }) * PAGE
}

fn invlpg(linear: u64) {
    // SAFETY: drops a translation.
    unsafe { asm!("invlpg [{}]", in(reg) linear, options(nostack)) };
}

fn write(linear: u64) {
    store(linear, linear);
}

/// The life of `count` pages: mapped on demand, moved to another frame, made read-only and writable again, unmapped. Every
/// eighth a switch of address spaces.
pub fn page_lives(count: u64) {
    let cr3 = CR3.get();
    for page in 0..count {
        let linear = AREA + page % PAGES * PAGE;
        write(linear);
        pages::set_entry(cr3, linear, frame(page, true) | WRITABLE);
        invlpg(linear);
        write(linear);
        pages::set_entry(cr3, linear, frame(page, true) | PRESENT);
        invlpg(linear);
        write(linear);
        pages::set_entry(cr3, linear, 0);
        invlpg(linear);
        if page % 8 == 7 {
            cpu::set_cr3(cr3);
        }
    }
}

/// The page-fault handler for [`page_lives`].
pub fn on_demand(frame_of_trap: &mut Frame) -> bool {
    let linear = cpu::cr2() & !(PAGE - 1);
    if !(AREA..AREA + PAGES * PAGE).contains(&linear) {
        return false;
    }
    FAULTS.set(FAULTS.get() + 1);
    let page = (linear - AREA) / PAGE;
    // Not present: it gets its frame. Present: it may be written again.
    let second = frame_of_trap.error & 1 != 0;
    pages::set_entry(CR3.get(), linear, frame(page, second) | WRITABLE);
    invlpg(linear);
    true
}

/// A "fork": all pages become read-only and shared, and are read once; then the parent writes to each.
pub fn fork_and_write(count: u64) {
    PHASE.set(1);
    for page in 0..count.min(PAGES) {
        set_leaf(AREA + page * PAGE, frame(page, false) | PRESENT);
    }
    cpu::set_cr3(CR3.get());
    for page in 0..count.min(PAGES) {
        // SAFETY: a page that is mapped.
        unsafe { read_volatile((AREA + page * PAGE) as *const u64) };
    }
    PHASE.set(2);
    for page in 0..count.min(PAGES) {
        write(AREA + page * PAGE);
    }
    PHASE.set(0);
}

/// The page-fault handler for [`fork_and_write`]: the page gets a copy of its own.
pub fn copy_on_write(frame_of_trap: &mut Frame) -> bool {
    let linear = cpu::cr2() & !(PAGE - 1);
    if !(AREA..AREA + PAGES * PAGE).contains(&linear) || frame_of_trap.error & 3 != 3 {
        return false;
    }
    FAULTS.set(FAULTS.get() + 1);
    let page = (linear - AREA) / PAGE;
    let (old, new) = (frame(page, false), frame(page, true));
    if ANNOUNCES.get() {
        call(ANNOUNCE, linear, new | WRITABLE);
    }
    // SAFETY: two frames of the kernel's.
    unsafe { core::ptr::copy_nonoverlapping(old as *const u64, new as *mut u64, (PAGE / 8) as usize) };
    if !ANNOUNCES.get() {
        set_leaf(linear, new | WRITABLE);
        invlpg(linear);
    }
    true
}

/// Sets the entry of a page by the one store that a hypervisor can emulate.
fn set_leaf(linear: u64, entry: u64) {
    store(leaf(linear), entry);
}

/// Where the entry of a page is.
pub fn leaf(linear: u64) -> u64 {
    pages::table_of(CR3.get(), linear) + (linear >> 12 & 511) * 8
}
