//! What each processor has for itself: a block reached by GS base, with its GDT, TSS, stacks and flags.

#[cfg(target_os = "none")]
use core::mem::offset_of;
use core::{
    arch::asm,
    mem::{ManuallyDrop, size_of},
    ops::Range,
    ptr,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
};

use bitflags::bitflags;
use x86_64::{
    VirtAddr,
    instructions::tables,
    registers::segmentation::{CS, DS, ES, SS, Segment},
    structures::{DescriptorTablePointer, gdt::SegmentSelector, tss::TaskStateSegment},
};

use l2_protocol::abi;

use crate::{
    addr::{Hpa, PAGE_SIZE},
    hw::{early, phys::DirectMap},
    mm::{
        FramePool,
        paging::{OutOfFrames, PageRights, PageTables, window_entry},
    },
    vmx::ExitReason,
    x86::{descriptor, msr::IA32_GS_BASE},
};

/// Stacks lie here, one slot each; what a stack does not use of its slot is not mapped, so an overflow faults. The last
/// slot of a processor is for its window.
const STACKS: u64 = 0xFFFF_C000_0000_0000;
const STACK_SLOT: u64 = 0x4_0000;
const SLOTS_PER_CPU: u64 = 5;
/// The start moves values of 30 KiB around, with an old compiler more often; the run loop needs a fraction.
const MAIN_STACK: u64 = 0x3_8000;
const IST_STACK: u64 = 0x4000;
/// The entry of the TSS's table of stacks, from 1, that the gate of NMIs names.
pub(super) const NMI_STACK: u8 = 2;

/// An IDT, shared by all processors and read-only once built.
///
/// It fills a page: a VM exit sets the limit of IDTR to 0xFFFF, and what lies behind the 32 gates is not present.
#[derive(Clone, Copy, Debug)]
pub struct Idt {
    base: u64,
}

impl Idt {
    /// Bytes that IDTR's limit covers.
    pub const BYTES: usize = PAGE_SIZE as usize;

    /// The one that was built at this address.
    pub(super) const fn at(base: u64) -> Self {
        Self { base }
    }

    /// Linear address.
    pub const fn base(self) -> u64 {
        self.base
    }
}

/// Selectors of the GDT of every processor.
pub mod selector {
    /// 64-bit code
    pub const CODE: u16 = 0x08;
    /// Data and stack
    pub const DATA: u16 = 0x10;
    /// The TSS; takes two entries
    pub const TSS: u16 = 0x18;
}

bitflags! {
    /// Events for a guest that arrived while nvmx ran, noted by their handlers.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Arrived: u8 {
        /// An NMI
        const NMI = 1 << 0;
        /// A machine check
        const MACHINE_CHECK = 1 << 1;
    }
}

/// The block of one processor; GS base points to it for as long as nvmx runs.
#[repr(C, align(64))]
pub struct PerCpu {
    /// Its own address: `gs:[0]`.
    this: *const PerCpu,
    /// Bits of [`Arrived`]: one byte, so that one look before an entry finds all of them.
    pub(super) arrived: AtomicU8,
    parked: AtomicBool,
    index: u32,
    last: LastBlock,
    main_stack_top: u64,
    /// A page that shows any other one, and where its entry lies.
    window: (u64, Hpa),
    idt: u64,
    /// LTR marks the TSS busy in it, so it is written behind shared references.
    gdt: [AtomicU64; 5],
    tss: TaskStateSegment,
}

/// The last exits as [`l2_protocol::abi::LAST_EXITS_MARK`] lays them out: also found from outside when the machine hangs.
#[repr(C)]
struct LastBlock {
    mark: u64,
    this: u64,
    guest: LastExit,
    nested: LastExit,
}

const _: () = assert!(size_of::<LastBlock>() == abi::LAST_EXITS_WORDS * 8);

/// The last exit of one level, for the epitaph: the exit-reason field, or a value that it never has. Written on every exit: one
/// plain store.
#[repr(C)]
struct LastExit {
    reason: AtomicU32,
    /// The word is 64 bits wide.
    high: u32,
}

/// The last exits of this processor, if there were any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LastExits {
    /// Of the guest hypervisor.
    pub guest: Option<ExitReason>,
    /// Of its guest.
    pub nested: Option<ExitReason>,
}

impl LastExit {
    const fn none() -> Self {
        LastExit { reason: AtomicU32::new(abi::NO_LAST_EXIT), high: 0 }
    }

    fn get(&self) -> Option<ExitReason> {
        let reason = self.reason.load(Ordering::Relaxed);
        (reason != abi::NO_LAST_EXIT).then_some(ExitReason(reason))
    }

    #[inline(always)]
    fn set(&self, reason: ExitReason) {
        self.reason.store(reason.0, Ordering::Relaxed);
    }
}

impl PerCpu {
    /// Position in the order in which processors were brought up; the one that booted is 0.
    #[inline]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What arrived in nvmx since the last [`PerCpu::take_arrived`].
    #[inline]
    pub fn arrived(&self) -> Arrived {
        Arrived::from_bits_retain(self.arrived.load(Ordering::Relaxed))
    }

    /// Takes what arrived: the caller passes it on.
    pub fn take_arrived(&self) -> Arrived {
        // One instruction: the other handler may run before and behind it, not within.
        Arrived::from_bits_retain(self.arrived.swap(0, Ordering::Relaxed))
    }

    /// Remembers what arrived while nvmx ran.
    pub fn note_arrived(&self, what: Arrived) {
        self.arrived.fetch_or(what.bits(), Ordering::Relaxed);
    }

    /// From now on it runs nothing: there is no guest whose event could be kept.
    pub fn park(&self) {
        self.parked.store(true, Ordering::Relaxed);
    }

    /// It was parked.
    pub fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed)
    }

    /// The stack on which an NMI is handled.
    pub(super) fn nmi_stack(&self) -> Range<u64> {
        let top = { self.tss.interrupt_stack_table }[usize::from(NMI_STACK) - 1].as_u64();
        top - IST_STACK..top
    }

    /// Lets the processor's window show the page at `at`, strong uncacheable, and returns its linear address. It shows that
    /// page until this is called again.
    pub fn window(&self, phys: &DirectMap, at: Hpa) -> *mut u8 {
        let (linear, entry) = self.window;
        phys.poke_u64(entry, window_entry(at));
        // SAFETY: dropping a cached translation is always allowed. Only this processor uses the window.
        unsafe { asm!("invlpg [{}]", in(reg) linear, options(nostack, preserves_flags)) };
        linear as *mut u8
    }

    /// Zeroes what lies unused of the main stack, on which this runs: [`PerCpu::stack_used`] counts from now on.
    pub fn clear_unused_stack(&self) {
        let mut word = self.main_stack_end();
        // What calls use while this runs.
        const IN_USE: u64 = 1024;
        let end = (&raw const word as u64 - IN_USE).min(self.main_stack_top);
        while word < end {
            // SAFETY: 1. between its end and what is in use the stack is mapped, and nobody's. 2. Other stacks take traps.
            unsafe { (word as *mut u64).write_volatile(0) };
            word += 8;
        }
    }

    /// Bytes of the main stack that were never written yet, which holds until [`PerCpu::clear_unused_stack`].
    pub fn stack_left(&self) -> u64 {
        MAIN_STACK - self.stack_used()
    }

    /// Bytes of the main stack that were written since [`PerCpu::clear_unused_stack`], or since the start: how deep it went.
    pub fn stack_used(&self) -> u64 {
        let end = self.main_stack_end();
        // SAFETY: the stack is mapped from end to top.
        let untouched = |at: &u64| unsafe { (*at as *const u64).read_volatile() } == 0;
        let deepest = (end..self.main_stack_top).step_by(8).find(|at| !untouched(at));
        self.main_stack_top - deepest.unwrap_or(self.main_stack_top)
    }

    /// The lowest address of the main stack.
    fn main_stack_end(&self) -> u64 {
        self.main_stack_top.saturating_sub(MAIN_STACK)
    }

    /// A block for a processor of a host, which has no stack and no tables of its own; it lasts for good.
    #[cfg(not(target_os = "none"))]
    pub fn of_host(index: u32) -> &'static Self {
        let last = LastBlock { mark: 0, this: 0, guest: LastExit::none(), nested: LastExit::none() };
        std::boxed::Box::leak(std::boxed::Box::new(PerCpu {
            this: ptr::null(),
            arrived: AtomicU8::new(0),
            parked: AtomicBool::new(false),
            index,
            last,
            main_stack_top: 0,
            window: (0, Hpa::new(0)),
            idt: 0x1000,
            gdt: [0; 5].map(AtomicU64::new),
            tss: TaskStateSegment::new(),
        }))
    }

    /// The IDT that it shares with the others.
    pub fn idt(&self) -> Idt {
        Idt::at(self.idt)
    }

    /// Notes an exit of L2 for the epitaph.
    #[inline]
    pub fn note_guest_exit(&self, reason: ExitReason) {
        self.last.guest.set(reason);
    }

    /// Notes an exit of L3 for the epitaph.
    #[inline]
    pub fn note_nested_exit(&self, reason: ExitReason) {
        self.last.nested.set(reason);
    }

    /// What was noted.
    pub fn last_exits(&self) -> LastExits {
        LastExits { guest: self.last.guest.get(), nested: self.last.nested.get() }
    }

    /// What the host-state area of a VMCS needs to come back to this processor's tables.
    pub fn host_tables(&self) -> HostTables {
        HostTables {
            code: selector::CODE,
            data: selector::DATA,
            task: selector::TSS,
            gs_base: self as *const Self as u64,
            gdt_base: self.gdt.as_ptr() as u64,
            tss_base: &raw const self.tss as u64,
            idt_base: self.idt,
        }
    }
}

/// Selectors and bases for the host-state area. FS base is 0 and unused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostTables {
    /// CS
    pub code: u16,
    /// SS, DS, ES; FS and GS may be 0
    pub data: u16,
    /// TR
    pub task: u16,
    /// GS base: the per-CPU block
    pub gs_base: u64,
    /// GDTR base
    pub gdt_base: u64,
    /// TR base
    pub tss_base: u64,
    /// IDTR base
    pub idt_base: u64,
}

/// The block of the processor that runs this.
///
/// Only after [`adopt`]; nvmx runs no code that calls it before.
#[cfg(target_os = "none")]
#[inline]
pub fn this() -> &'static PerCpu {
    let this: *const PerCpu;
    // SAFETY: 1. GS base is the per-CPU block since `adopt`, and VM exits restore it. 2. Blocks are never freed and
    // only changed through their atomics.
    unsafe {
        asm!("mov {}, gs:[{this}]", out(reg) this, this = const offset_of!(PerCpu, this),
            options(nostack, preserves_flags, readonly, pure));
        &*this
    }
}

/// The block of the processor that is installed in this thread.
#[cfg(not(target_os = "none"))]
pub fn this() -> &'static PerCpu {
    match super::host::block() {
        Some(block) => block,
        None => unreachable!("code of nvmx that needs a processor runs in a thread without one"),
    }
}

/// As [`this`], for code that may run before [`adopt`].
#[cfg(target_os = "none")]
pub fn try_this() -> Option<&'static PerCpu> {
    // SAFETY: GS base is an architectural MSR of every 64-bit processor.
    let base = unsafe { early::rdmsr(IA32_GS_BASE) };
    (base != 0).then(this)
}

/// As [`this`], for code that may run before one is installed.
#[cfg(not(target_os = "none"))]
pub fn try_this() -> Option<&'static PerCpu> {
    super::host::block()
}

/// The block, stacks and tables of a processor that does not run on them yet.
#[derive(Debug)]
pub struct Idle(*mut PerCpu);

impl Idle {
    /// Top of the main stack.
    pub fn stack_top(&self) -> u64 {
        // SAFETY: the block is complete and only changed through its atomics.
        unsafe { (*self.0).main_stack_top }
    }

    /// Gives the block to the processor that will [`adopt`] it.
    pub fn into_block(self) -> *const PerCpu {
        self.0
    }
}

/// This processor takes the block over and loads its tables.
///
/// # Safety
///
/// `block` came out of [`Idle::into_block`], and no other processor adopts it.
pub unsafe fn adopt(block: *const PerCpu) {
    // SAFETY: blocks are never freed; the rest is the caller's promise.
    unsafe { load(&*block) };
}

/// Gives this processor its block, its stacks and its tables, and loads them. The main stack is not yet in use: see
/// [`run_on_main_stack`].
pub fn install(idle: Idle) {
    // SAFETY: `idle` was the only handle to the block.
    unsafe { adopt(idle.into_block()) };
}

/// Makes the block, the stacks and the tables of the processor with this number.
///
/// `tables` must be the page tables that it will run on, with `phys` in them. `data` are the rights of nvmx's data, as far as
/// the processor has execute-disable.
pub fn prepare(
    index: u32,
    idt: Idt,
    data: PageRights,
    pool: &mut FramePool,
    tables: &mut PageTables,
    phys: DirectMap,
) -> Result<Idle, OutOfFrames> {
    let mut stack = |number: u64, size: u64| -> Result<u64, OutOfFrames> {
        let top = STACKS + (u64::from(index) * SLOTS_PER_CPU + number + 1) * STACK_SLOT;
        let frames = pool.alloc_run(&phys, (size / PAGE_SIZE) as usize).ok_or(OutOfFrames)?;
        tables.map(pool, &phys, top - size, frames.hpa(), size, data)?;
        Ok(top)
    };
    let main_stack_top = stack(0, MAIN_STACK)?;
    let mut tss = TaskStateSegment::new();
    for number in 0..3 {
        tss.interrupt_stack_table[number] = VirtAddr::new_truncate(stack(number as u64 + 1, IST_STACK)?);
    }

    const { assert!(size_of::<PerCpu>() <= PAGE_SIZE as usize) };
    let window = STACKS + (u64::from(index) * SLOTS_PER_CPU + SLOTS_PER_CPU - 1) * STACK_SLOT;
    let frame = pool.alloc(&phys).ok_or(OutOfFrames)?;
    tables.map(pool, &phys, window, frame.hpa(), PAGE_SIZE, data)?;
    let window = (window, tables.window(&phys, window).ok_or(OutOfFrames)?);
    let block = phys.linear(frame.hpa(), PAGE_SIZE).ok_or(OutOfFrames)?.cast::<PerCpu>();
    // SAFETY: 1. the frame is nvmx's own and never given back, so the block lives for good. 2. It is mapped writable and
    // page-aligned. 3. Nobody else knows it yet.
    unsafe {
        let tss_base = &raw const (*block).tss as u64;
        block.write(PerCpu {
            this: block,
            arrived: AtomicU8::new(0),
            parked: AtomicBool::new(false),
            index,
            last: LastBlock {
                mark: abi::LAST_EXITS_MARK,
                this: &raw const (*block).last as u64,
                guest: LastExit::none(),
                nested: LastExit::none(),
            },
            main_stack_top,
            window,
            idt: idt.base(),
            gdt: gdt(tss_base).map(AtomicU64::new),
            tss,
        });
    }
    Ok(Idle(block))
}

/// Null, 64-bit code, data, and an available TSS at `tss_base`.
fn gdt(tss_base: u64) -> [u64; 5] {
    let [low, high] = descriptor::tss(tss_base, size_of::<TaskStateSegment>() as u16 - 1);
    [0, descriptor::CODE_64, descriptor::DATA, low, high]
}

/// Loads GDTR, the segment registers, TR, IDTR and GS base.
///
/// # Safety
///
/// `block` is this processor's own, and no other processor has loaded its TSS.
unsafe fn load(block: &'static PerCpu) {
    let table = |base: u64, bytes: usize| DescriptorTablePointer {
        limit: bytes as u16 - 1,
        base: VirtAddr::new_truncate(base),
    };
    // SAFETY: 1. the tables live as long as nvmx. 2. The GDT has the selectors that are loaded, the IDT its gates. 3. LTR writes to
    // the GDT, whose words are atomic.
    unsafe {
        tables::lgdt(&table(block.gdt.as_ptr() as u64, size_of_val(&block.gdt)));
        CS::set_reg(SegmentSelector(selector::CODE));
        SS::set_reg(SegmentSelector(selector::DATA));
        DS::set_reg(SegmentSelector(selector::DATA));
        ES::set_reg(SegmentSelector(selector::DATA));
        asm!("mov fs, {0:e}", "mov gs, {0:e}", in(reg) 0, options(nostack, preserves_flags));
        early::wrmsr(IA32_GS_BASE, ptr::from_ref(block) as u64);
        tables::load_tss(SegmentSelector(selector::TSS));
        tables::lidt(&table(block.idt, Idt::BYTES));
    }
}

/// Continues with `run(data)` on this processor's main stack; the stack in use until now is left behind for good.
pub fn run_on_main_stack<T>(data: T, run: fn(T) -> !) -> ! {
    extern "C" fn landing<T>(job: *mut (T, fn(T) -> !)) -> ! {
        // SAFETY: `job` points to the caller's value on the stack that was left: still mapped, never returned to, so it
        // is moved out exactly once.
        let (data, run) = unsafe { job.read() };
        run(data)
    }
    let mut job = ManuallyDrop::new((data, run));
    // SAFETY: 1. the main stack is mapped and unused, 16-byte aligned at its top. 2. `landing` never returns.
    unsafe {
        asm!("mov rsp, {stack}", "xor ebp, ebp", "call {landing}", "ud2",
            stack = in(reg) this().main_stack_top, landing = sym landing::<T>,
            in("rdi") &raw mut *job, options(noreturn))
    }
}
