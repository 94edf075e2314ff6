//! The other CPUs of the machine: finding them, starting them, and giving them work.
//!
//! CPU 0 is the one that booted. It alone writes records: the others leave what they find in words ([`note`]), and CPU 0
//! prints these in order, so that two boots can be compared.

use super::{apic, cpu, descriptors, report, trap};
use arrayvec::ArrayVec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

core::arch::global_asm!(include_str!("ap.s"));

/// Most CPUs that a guest uses.
pub const MAX_CPUS: usize = 8;

/// The words that a started CPU leaves, by name; the GDTR and IDTR take two words each, of which the limit counts.
pub const STATE: [&str; 27] = [
    "eax", "ebx", "ecx", "edx", "esp", "ebp", "esi", "edi", "cs", "ds", "es", "ss", "fs", "gs", "gdtr", "", "idtr", "",
    "eflags", "cr0", "cr2", "cr3", "cr4", "dr0", "dr6", "dr7", "efer",
];

const PAGE: u64 = 0x7_0000;
const STACK_AT: u64 = PAGE + 0x7F8;
const INDEX_AT: u64 = PAGE + 0x7F0;
const STATE_AT: u64 = PAGE + 0x800;
/// Turns of a loop after which a CPU that does not answer is taken to hang.
const PATIENCE: u32 = 200_000_000;
/// Turns until a CPU must have begun. A processor takes some hundred; a KVM on the emulated machine has a thread to wake and pages to
/// fetch first.
const BEGINS: u32 = 2_000_000;

/// What a CPU does; gets its number.
pub type Job = fn(usize);

/// The job of each CPU; 0: none. The boot code's CPU has none.
static JOBS: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];
/// How often each was started.
static STARTS: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];
/// What each leaves.
static NOTES: [[AtomicU64; NOTES_PER_CPU]; MAX_CPUS] =
    [const { [const { AtomicU64::new(0) }; NOTES_PER_CPU] }; MAX_CPUS];
/// Words that a CPU can leave.
pub const NOTES_PER_CPU: usize = 16;

unsafe extern "C" {
    static kit_ap_begin: u8;
    static kit_ap_end: u8;
}

/// The APIC ids of the CPUs that ACPI lists as usable; the one that runs comes first.
pub fn find() -> ArrayVec<u32, MAX_CPUS> {
    let own = cpu::cpuid(1, 0)[1] >> 24;
    let mut ids: ArrayVec<u32, MAX_CPUS> = ArrayVec::new();
    ids.push(own);
    let Some(madt) = find_madt() else { return ids };
    let (mut entry, end) = (madt + 44, madt + u64::from(read32(madt + 4)));
    while entry < end {
        let [kind, length, _, id] = read32(entry).to_le_bytes();
        let id = u32::from(id);
        if kind == 0 && read32(entry + 4) & 1 != 0 && !ids.contains(&id) {
            let _ = ids.try_push(id);
        }
        entry += u64::from(length.max(2));
    }
    ids
}

/// The MADT by way of the RSDT (ACPI specification, "Root System Description Pointer", "Multiple APIC Description Table").
fn find_madt() -> Option<u64> {
    let extended = u64::from(read32(0x40E) as u16) << 4;
    let mut places = (0xE_0000u64..0x10_0000).step_by(16).chain((extended..extended + 1024).step_by(16));
    let rsdp = places.find(|at| *at != 0 && read32(*at) == 0x2044_5352 && read32(*at + 4) == 0x2052_5450)?;
    let rsdt = u64::from(read32(rsdp + 16));
    let pointers = (rsdt + 36..rsdt + u64::from(read32(rsdt + 4))).step_by(4);
    pointers.map(|at| u64::from(read32(at))).find(|table| read32(*table).to_le_bytes() == *b"APIC")
}

fn read32(at: u64) -> u32 {
    // SAFETY: firmware's tables lie in the first 4 GiB, which are mapped.
    unsafe { (at as *const u32).read_unaligned() }
}

/// Sends INIT and start-up to the CPU with this APIC id and waits until it is there, as number `index`: true, or false if
/// it does not come.
pub fn start(index: usize, apic_id: u32) -> bool {
    lay_out(index);
    let before = STARTS[index].load(Ordering::Acquire);
    JOBS[index].store(0, Ordering::Release);
    apic::send(apic_id, apic::message::INIT);
    pause(10_000);
    (0..2).any(|_| {
        apic::send(apic_id, apic::message::startup((PAGE >> 12) as u8));
        until(BEGINS, || STARTS[index].load(Ordering::Acquire) > before)
    })
}

/// Sends INIT and two start-up messages, one right after it and one `turns` of a loop later; whether the CPU came. The first
/// one may find a CPU that has not taken the INIT yet.
pub fn start_in_haste(index: usize, apic_id: u32, turns: u32) -> bool {
    lay_out(index);
    let before = STARTS[index].load(Ordering::Acquire);
    JOBS[index].store(0, Ordering::Release);
    let startup = apic::message::startup((PAGE >> 12) as u8);
    apic::send(apic_id, apic::message::INIT);
    apic::send(apic_id, startup);
    pause(turns);
    apic::send(apic_id, startup);
    until(1_000_000, || STARTS[index].load(Ordering::Acquire) > before)
}

/// Sends INIT and, so many instructions later, one start-up message; whether the CPU came.
pub fn start_after(index: usize, apic_id: u32, instructions: u32) -> bool {
    lay_out(index);
    let before = STARTS[index].load(Ordering::Acquire);
    JOBS[index].store(0, Ordering::Release);
    apic::send(apic_id, apic::message::INIT);
    // SAFETY: counts.
    unsafe {
        core::arch::asm!("2: dec {0:e}", "jnz 2b", inout(reg) instructions / 2 + 1 => _, options(nomem, nostack));
    }
    apic::send(apic_id, apic::message::startup((PAGE >> 12) as u8));
    until(100_000, || STARTS[index].load(Ordering::Acquire) > before)
}

/// Lets a CPU begin in a loop that is its first instruction, at offset 0 of a page.
pub fn spin_at_offset_0(apic_id: u32) {
    const JMP_SELF: [u8; 2] = [0xEB, 0xFE];
    let page = PAGE + 0x1000;
    // SAFETY: conventional memory that nothing of ours uses.
    unsafe { (page as *mut [u8; 2]).write_volatile(JMP_SELF) };
    apic::send(apic_id, apic::message::INIT);
    pause(10_000);
    apic::send(apic_id, apic::message::startup((page >> 12) as u8));
    pause(10_000);
}

/// The page that a CPU begins in, for CPU `index`.
fn lay_out(index: usize) {
    let begin = &raw const kit_ap_begin;
    let length = &raw const kit_ap_end as usize - begin as usize;
    // SAFETY: 1. the page is conventional memory that nothing of ours uses. 2. One CPU is started at a time.
    unsafe {
        core::ptr::copy_nonoverlapping(begin, PAGE as *mut u8, length);
        (STACK_AT as *mut u64).write_volatile(descriptors::start_stack(index));
        (INDEX_AT as *mut u64).write_volatile(index as u64);
    }
}

/// Sends an INIT to the CPU that booted, which is this one: it goes on in firmware, at the reset vector. Firmware finds that
/// it is to go on at a given place (as operating systems came back from protected mode once), and so the CPU begins like
/// the others do, and does `job`.
pub fn restart_first(job: Job) -> ! {
    const CMOS: u16 = 0x70;
    const SHUTDOWN_STATUS: u8 = 0x0F;
    /// Jump to the address at 0:467H
    const JUMP: u8 = 0x0A;
    lay_out(0);
    JOBS[0].store(job as usize, Ordering::Release);
    cpu::out8(CMOS, SHUTDOWN_STATUS);
    cpu::out8(CMOS + 1, JUMP);
    // SAFETY: the BIOS data area, for which firmware alone has a use.
    unsafe { (0x467 as *mut u32).write_unaligned((PAGE << 12) as u32) };
    apic::send(cpu::cpuid(1, 0)[1] >> 24, apic::message::INIT);
    cpu::halt()
}

/// A word of the state in which the CPU that was started last began.
pub fn state(word: usize) -> u32 {
    read32(STATE_AT + 4 * word as u64)
}

#[unsafe(no_mangle)]
extern "C" fn kit_ap_main(index: usize) -> ! {
    descriptors::load(index);
    trap::load_idt();
    apic::enable();
    STARTS[index].fetch_add(1, Ordering::AcqRel);
    loop {
        match JOBS[index].load(Ordering::Acquire) {
            0 => core::hint::spin_loop(),
            job => {
                // SAFETY: only `give` stores there, and it stores jobs.
                let job: Job = unsafe { core::mem::transmute::<usize, Job>(job) };
                job(index);
                JOBS[index].store(0, Ordering::Release);
            }
        }
    }
}

/// Gives a CPU, other than the first, a job.
pub fn give(index: usize, job: Job) {
    JOBS[index].store(job as usize, Ordering::Release);
}

/// Waits until a CPU has done its job.
pub fn wait(index: usize) {
    if !until(PATIENCE, || JOBS[index].load(Ordering::Acquire) == 0) {
        report::die(format_args!("CPU {index} does not end its job"));
    }
}

/// Lets one CPU do a job, whichever it is.
pub fn run_on(index: usize, job: Job) {
    if index == 0 {
        job(0);
    } else {
        give(index, job);
        wait(index);
    }
}

/// Lets the first `count` CPUs do a job at once.
pub fn run_on_all(count: usize, job: Job) {
    (1..count).for_each(|index| give(index, job));
    job(0);
    (1..count).for_each(wait);
}

/// Leaves a word.
pub fn note(index: usize, word: usize, value: u64) {
    NOTES[index][word].store(value, Ordering::Release);
}

/// A word that a CPU left.
pub fn noted(index: usize, word: usize) -> u64 {
    NOTES[index][word].load(Ordering::Acquire)
}

/// Adds one to a word.
pub fn count(index: usize, word: usize) {
    NOTES[index][word].fetch_add(1, Ordering::AcqRel);
}

/// Forgets all words.
pub fn clear_notes() {
    NOTES.iter().flatten().for_each(|word| word.store(0, Ordering::Release));
}

/// Waits for a condition for so many turns; whether it came.
pub fn until(turns: u32, condition: impl Fn() -> bool) -> bool {
    (0..turns).any(|_| {
        core::hint::spin_loop();
        condition()
    })
}

/// Waits until CPU `index` has left a value other than 0 in a word.
pub fn wait_for_note(index: usize, word: usize) {
    if !until(PATIENCE, || noted(index, word) != 0) {
        report::die(format_args!("CPU {index} does not come to its word {word}"));
    }
}

/// Lets some time pass.
pub fn pause(turns: u32) {
    until(turns, || false);
}
