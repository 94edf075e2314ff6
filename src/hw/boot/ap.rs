//! Starting the other processors: a page of low memory, borrowed from L2 before it runs, brings each into nvmx.
//!
//! Source: Intel SDM vol. 3A, "MP Initialization Protocol Algorithm for MP Systems" and its typical sequences.

#[cfg(target_os = "none")]
use core::arch::global_asm;

use crate::{
    addr::{Hpa, PAGE_SIZE},
    hw::{
        apic::LocalApic,
        cpu::{self, Idle, PerCpu},
        cr, machine_check,
        phys::DirectMap,
        port,
    },
    mm::{Frame, FramePool, MemoryMap, PhysMem, Span, paging::PageTables},
    x86::paging::{LARGE, PRESENT, WRITABLE},
};

#[cfg(target_os = "none")]
global_asm!(include_str!("ap.s"));

unsafe extern "C" {
    static ap_begin: u8;
    static ap_end: u8;
    static ap_gdt_base: u8;
    static ap_far32: u8;
    static ap_far64: u8;
    static ap_tables: u8;
    static ap_stack: u8;
    static ap_block: u8;
    static ap_run: u8;
    static ap_root: u8;
    static ap_landing: u8;
}

/// Where the page may lie: not the first one, which firmware uses.
const LOW: Span = Span::new(PAGE_SIZE, 0xA_0000);
/// Between INIT and the start-up message, and between two of these.
const AFTER_INIT: u32 = 10_000;
const AFTER_STARTUP: u32 = 200;
/// How long a processor may take to arrive: so many reads of a port, and so many ticks of the TSC. On a machine that is
/// emulated one processor after the other, reads take next to no time, and the others none of it.
const PATIENCE: u32 = 1_000_000;
const PATIENCE_TICKS: u64 = 1 << 31;

/// The borrowed page with the code that a started processor begins in.
#[derive(Debug)]
pub struct Trampoline {
    page: Hpa,
    before: [u8; PAGE_SIZE as usize],
    /// Page tables: nvmx's own upper half, and the page one to one.
    tables: [Frame; 3],
    root: Hpa,
    phys: DirectMap,
}

impl Trampoline {
    /// Borrows a page of `memory`, which nobody uses at this moment. `None` if there is no page below 640 KiB, or no frame.
    pub fn new(memory: &MemoryMap, tables: &PageTables, pool: &mut FramePool, phys: DirectMap) -> Option<Self> {
        const TABLE: u64 = PRESENT | WRITABLE;
        let page = Hpa::new(memory.highest_free(PAGE_SIZE, PAGE_SIZE, LOW)?.start());
        let mut frame = || pool.alloc(&phys);
        let [pml4, pdpt, directory] = [frame()?, frame()?, frame()?];
        // The first 2 MiB, executable; nvmx's own map of memory is not.
        phys.write_u64(directory.at(0), LARGE | TABLE);
        phys.write_u64(pdpt.at(0), directory.hpa().get() | TABLE);
        let (root, half) = (tables.root(), PAGE_SIZE / 2);
        phys.copy(Hpa::new(root.get() + half), pml4.at(half), half);
        phys.write_u64(pml4.at(0), pdpt.hpa().get() | TABLE);

        let mut before = [0; PAGE_SIZE as usize];
        phys.read_bytes(page, &mut before);
        let trampoline = Self { page, before, tables: [pml4, pdpt, directory], root, phys };
        trampoline.copy_code();
        Some(trampoline)
    }

    fn copy_code(&self) {
        let begin = address(&raw const ap_begin);
        for at in (begin..address(&raw const ap_end)).step_by(8) {
            // SAFETY: the code lies in the image's read-only data, which goes on behind it.
            let word = unsafe { (at as *const u64).read_unaligned() };
            self.phys.poke_u64(Hpa::new(self.page.get() + at - begin), word);
        }
        let page = self.page.get() as u32;
        for place in [&raw const ap_gdt_base, &raw const ap_far32, &raw const ap_far64] {
            let at = self.place(place);
            let offset = self.phys.read_u32(at);
            self.phys.poke_bytes(at, &(page + offset).to_le_bytes());
        }
        self.phys.poke_u64(self.place(&raw const ap_tables), self.tables[0].hpa().get());
        self.phys.poke_u64(self.place(&raw const ap_root), self.root.get());
        self.phys.poke_u64(self.place(&raw const ap_landing), landing as *const () as u64);
    }

    /// Where a label of the code lies in the page.
    fn place(&self, label: *const u8) -> Hpa {
        Hpa::new(self.page.get() + address(label) - address(&raw const ap_begin))
    }

    /// Starts a processor: it calls `run` on the stack and the tables of `idle`. False if `arrived` does not become true
    /// within about a second.
    pub fn start(
        &self,
        apic: LocalApic,
        apic_id: u32,
        idle: Idle,
        run: extern "C" fn() -> !,
        arrived: impl Fn() -> bool,
    ) -> bool {
        self.phys.poke_u64(self.place(&raw const ap_stack), idle.stack_top());
        self.phys.poke_u64(self.place(&raw const ap_block), idle.into_block() as u64);
        self.phys.poke_u64(self.place(&raw const ap_run), run as *const () as u64);
        let number = (self.page.get() / PAGE_SIZE) as u8;
        let arrives_within = |limit: u32, ticks: u64| {
            let start = tsc();
            let mut reads = 0u32;
            while reads < limit || tsc().wrapping_sub(start) < ticks {
                wait(1);
                core::hint::spin_loop();
                if arrived() {
                    return true;
                }
                reads = reads.saturating_add(1);
            }
            false
        };
        apic.send_init(apic_id);
        wait(AFTER_INIT);
        apic.send_startup(apic_id, number);
        if arrives_within(AFTER_STARTUP, 0) {
            return true;
        }
        // The SDM's sequence has a second one, for a processor that missed the first.
        apic.send_startup(apic_id, number);
        arrives_within(PATIENCE, PATIENCE_TICKS)
    }

    /// Gives the page back as it was. All processors that were started have left it.
    pub fn remove(self, pool: &mut FramePool) {
        self.phys.poke_bytes(self.page, &self.before);
        self.tables.into_iter().for_each(|frame| pool.free(frame));
    }
}

/// The first function of a started processor, on its own stack.
extern "C" fn landing(block: *const PerCpu, run: extern "C" fn() -> !, root: u64) -> ! {
    // SAFETY: 1. `root` is nvmx's own tables, which map the same upper half. 2. `block` came out of an `Idle`, which only
    // this processor was started with.
    unsafe {
        cr::set_cr3(root);
        cpu::adopt(block);
    }
    machine_check::take();
    run()
}

/// Waits about so many microseconds: reading a port that nobody answers takes about one. Without a clock to calibrate,
/// that is what firmware does too.
fn wait(microseconds: u32) {
    for _ in 0..microseconds {
        port::delay();
    }
}

fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has a TSC, and nvmx runs in ring 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn address(symbol: *const u8) -> u64 {
    symbol as u64
}
