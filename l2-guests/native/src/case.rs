//! One combination: the code in memory, the IRET into it, and the traps that follow.

use crate::{
    instructions::{Base, Instruction, Operand, Value},
    log,
    situation::{At, Before, Memory, Situation, Watch},
};
use core::arch::asm;
use l2_kit::{
    Global, cpu,
    descriptors::{self as d, TablePointer},
    pages::{self, PAGE},
    setup,
    trap::{self, Frame},
    vmx,
};

/// CR0.WP
pub const CR0_WP: u64 = 1 << 16;

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const IOPL_3: u64 = 3 << 12;
/// CF, PF, AF, ZF, SF, OF, IF
const COMPARED_FLAGS: u64 = 0xAD5;

/// B0 to B3, BD, BS
const DR6_BITS: u64 = 0x600F;
const DR6_CLEAR: u64 = 0xFFFF_0FF0;
const DR7_CLEAR: u64 = 0x400;
const BS: u64 = 1 << 14;

/// What CR2 holds while nothing has faulted.
pub const CR2_UNTOUCHED: u64 = 0x5555_0000;

/// Linear addresses of the operand's pages: there, and as the situation says; below 4 GiB, where no memory is.
pub const WINDOW: u64 = 0x7000_0000;
/// Offset of an operand in its page, and in the segment that is the page
const IN_SEGMENT: u64 = 0x800;
/// The last canonical page of the lower half.
const EDGE: u64 = 0x0000_7FFF_FFFF_F000;

/// Slots of the GDT after the kit's: the code segment of a case.
const OWN_CODE: u16 = 0x40;
const GDT_ENTRIES: usize = 9;

/// Kinds of code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "named after ring and size")]
pub enum Mode {
    Kernel64,
    User64,
    Kernel32,
    User32,
    Kernel16,
    User16,
    Narrow32,
    NarrowUser32,
    Pae32,
    Flat32,
    Legacy16,
    Real,
}

impl Mode {
    /// Those of IA-32e mode.
    pub const ALL: [Self; 6] =
        [Self::Kernel64, Self::User64, Self::Kernel32, Self::User32, Self::Kernel16, Self::User16];

    /// Outside of IA-32e mode: 32-bit paging in both rings, PAE paging, no paging; 16-bit code; real mode.
    pub const LEGACY: [Self; 6] =
        [Self::Narrow32, Self::NarrowUser32, Self::Pae32, Self::Flat32, Self::Legacy16, Self::Real];

    /// For records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel64 => "kernel64",
            Self::User64 => "user64",
            Self::Kernel32 => "kernel32",
            Self::User32 => "user32",
            Self::Kernel16 => "kernel16",
            Self::User16 => "user16",
            Self::Narrow32 => "narrow32",
            Self::NarrowUser32 => "narrowuser32",
            Self::Pae32 => "pae32",
            Self::Flat32 => "flat32",
            Self::Legacy16 => "legacy16",
            Self::Real => "real",
        }
    }

    /// Ring
    pub fn ring(self) -> u16 {
        if matches!(self, Self::User64 | Self::User32 | Self::User16 | Self::NarrowUser32) { 3 } else { 0 }
    }

    /// 64-bit code
    pub fn is_64(self) -> bool {
        matches!(self, Self::Kernel64 | Self::User64)
    }

    /// 16-bit code
    pub fn is_16(self) -> bool {
        matches!(self, Self::Kernel16 | Self::User16 | Self::Legacy16 | Self::Real)
    }

    /// The descriptor of such a code segment, as long as it can be.
    fn descriptor(self, base: u64) -> u64 {
        let flags = if self.is_64() {
            0x00AF_9B00_0000_FFFF
        } else if self.is_16() {
            0x0000_9B00_0000_FFFF
        } else {
            0x00CF_9B00_0000_FFFF
        };
        flags | u64::from(self.ring()) << 45 | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56
    }
}

/// Where things are.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Base of the code segment
    pub base: u64,
    /// Instruction pointer of the instruction under test
    pub ip: u64,
    /// Linear address of the operand
    pub operand: u64,
}

impl Place {
    /// For a situation; the length of the instruction comes in later, so that it ends at the end of its page.
    pub fn of(mode: Mode, situation: Situation) -> Self {
        let boundary = MEMORY.get().code + PAGE;
        let base = match situation.at {
            _ if mode.is_64() => 0,
            At::End if mode.is_16() => boundary - 0x1_0000,
            At::End => boundary,
            At::Somewhere => boundary - 0x8000,
        };
        let operand = match situation.memory {
            Memory::Whole | Memory::Limit(_) | Memory::ExpandDown(_) => WINDOW + IN_SEGMENT,
            Memory::Wrap(inside) => (1 << 32) - inside,
            Memory::Crossing(inside) | Memory::Missing(inside) | Memory::ReadOnly(inside) => WINDOW + PAGE - inside,
            Memory::NotCanonical(inside) => EDGE + PAGE - inside,
        };
        // `code` puts the instruction's end here.
        let ip = boundary.wrapping_sub(base) & if mode.is_64() { u64::MAX } else { 0xFFFF_FFFF };
        Self { base, ip, operand }
    }
}

/// One combination.
pub struct Case<'a> {
    /// The instruction
    pub instruction: &'a Instruction,
    /// The kind of code
    pub mode: Mode,
    /// The situation
    pub situation: Situation,
    /// Where code and operand are
    pub place: Place,
}

/// Memory of the image that the cases use.
#[derive(Clone, Copy, Default)]
struct Own {
    /// Two pages of code
    code: u64,
    /// The pages behind [`WINDOW`]
    window: [u64; 2],
    /// ... behind [`EDGE`]
    edge: u64,
    /// End of a stack
    stack: u64,
    /// VMCS regions
    regions: [u64; 2],
    /// A word that is a stack selector
    selector: u64,
}

/// What the IRET loads, where the assembly code finds it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
#[allow(missing_docs, reason = "registers speak for themselves")]
pub struct Start {
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
}

/// The case that runs, for the hook.
#[derive(Clone, Copy, Default)]
struct Running {
    active: bool,
    /// Instruction pointer of the instruction
    ip: u64,
    operand: u64,
    operand_bytes: u64,
    compared: [u64; 4],
    faulted: bool,
    traps: u32,
    /// 64-bit code
    wide: bool,
    /// Bits of a linear address
    mask: u64,
    seen: Seen,
}

/// What the laws are about.
#[derive(Clone, Copy, Default)]
struct Seen {
    completed: bool,
    faults_without_rf: u32,
    steps: u32,
    breakpoints: u32,
    watches: u32,
}

impl Seen {
    fn debugged(&mut self, dr6: u64) {
        self.steps += u32::from(dr6 & BS != 0);
        self.breakpoints += u32::from(dr6 & 1 << 1 != 0);
        self.watches += u32::from(dr6 & 1 != 0);
    }
}

static MEMORY: Global<Own> =
    Global::new(Own { code: 0, window: [0; 2], edge: 0, stack: 0, regions: [0; 2], selector: 0 });
static RUNNING: Global<Running> = Global::new(Running {
    active: false,
    ip: 0,
    operand: 0,
    operand_bytes: 0,
    compared: [0; 4],
    faulted: false,
    traps: 0,
    wide: false,
    mask: 0,
    seen: Seen { completed: false, faults_without_rf: 0, steps: 0, breakpoints: 0, watches: 0 },
});
static COUNT: Global<u32> = Global::new(0);
static GDT: Global<[u64; GDT_ENTRIES]> = Global::new([0; GDT_ENTRIES]);

/// How many combinations were tried.
pub fn count() -> u32 {
    COUNT.get()
}

/// Adds to that.
pub fn counted(cases: u32) {
    COUNT.set(COUNT.get() + cases);
}

/// With STI nothing comes: both interrupt controllers are masked.
pub fn mask_interrupts() {
    cpu::out8(0x21, 0xFF);
    cpu::out8(0xA1, 0xFF);
}

/// Memory, GDT and hooks. The page tables are those of user mode already.
pub fn init() {
    let pages = |count: u64| pages::take(count * PAGE, PAGE);
    let memory = Own {
        code: pages(2),
        window: [pages(1), pages(1)],
        edge: pages(1),
        stack: pages(4) + 4 * PAGE,
        regions: [setup::region(), setup::region()],
        selector: pages(1),
    };
    MEMORY.set(memory);
    pages::set_entry(cpu::cr3(), WINDOW, memory.window[0] | 7);
    pages::set_entry(cpu::cr3(), EDGE, memory.edge | 7);
    for vector in (0..32).filter(|vector| *vector != trap::NMI) {
        trap::hook(vector, Some(trapped));
    }
}

/// Base and limit of the GDT with the code segment of the case, a copy of the kit's otherwise.
pub fn gdt() -> (u64, u16) {
    (core::ptr::from_ref(&GDT) as u64, (GDT_ENTRIES * 8 - 1) as u16)
}

fn load_gdt(descriptor: u64) {
    // SAFETY: the kit's GDT has eight entries and stays where it is.
    let kit: [u64; 8] = unsafe { core::ptr::read(d::gdt_base() as *const [u64; 8]) };
    let mut entries = [0; GDT_ENTRIES];
    entries[..8].copy_from_slice(&kit);
    entries[8] = descriptor;
    GDT.set(entries);
    let (base, limit) = gdt();
    let pointer = TablePointer { limit, base };
    // SAFETY: the selectors in use mean what they did.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// The kit's GDT again, by which it finds its stacks.
fn unload_gdt(base: u64) {
    let pointer = TablePointer { limit: d::GDT_LIMIT, base };
    // SAFETY: as above.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

fn poke<T>(address: u64, value: T) {
    // SAFETY: the test's own memory.
    unsafe { core::ptr::write_unaligned(address as *mut T, value) };
}

fn invalidate(linear: u64) {
    // SAFETY: forgets a translation.
    unsafe { asm!("invlpg [{}]", in(reg) linear, options(nostack)) };
}

impl Case<'_> {
    /// Runs it right here, in root operation or outside of VMX operation.
    pub fn run_here(&self, in_vmx_operation: bool) {
        let regions = MEMORY.get().regions;
        if in_vmx_operation {
            let _ = (vmx::vmclear(regions[0]), vmx::vmclear(regions[1]));
            if self.instruction.current {
                let _ = vmx::vmptrld(regions[0]);
                vmx::write(l2_kit::fields::GUEST_RIP, 0x1111_2222_3333_4444);
                vmx::write(l2_kit::fields::HOST_RIP, 0x5555_6666_7777_8888);
            }
        }
        let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
        self.prepare();
        run(false);
        // What the instruction changed.
        if cpu::cr0() != cr0 {
            log::add(format_args!(",cr0^{:x}", cpu::cr0() ^ cr0));
            cpu::set_cr0(cr0);
        }
        if cpu::cr4() != cr4 {
            log::add(format_args!(",cr4^{:x}", cpu::cr4() ^ cr4));
            cpu::set_cr4(cr4);
        }
    }

    /// Bytes of the operand: those of VMREAD and VMWRITE have the size of the mode.
    fn bytes(&self) -> u64 {
        self.instruction.bytes(self.mode).into()
    }

    /// Base of the segment of the operand outside of IA-32e mode
    pub fn segment_base(&self) -> u64 {
        if matches!(self.situation.memory, Memory::Limit(_) | Memory::ExpandDown(_)) { WINDOW } else { 0 }
    }

    /// Its limit
    pub fn limit(&self) -> u64 {
        match self.situation.memory {
            Memory::Limit(inside) | Memory::ExpandDown(inside) => IN_SEGMENT + inside - 1,
            _ => 0xFFFF_FFFF,
        }
    }

    /// What the SDM says of every instruction, whatever the machine: the law that was broken, if any.
    pub fn broken_law(&self) -> Option<&'static str> {
        let (seen, situation) = (RUNNING.get().seen, self.situation);
        let first = situation.before == Before::Nothing;
        let reaches = |at: Option<Watch>| at.is_some_and(|watch| self.reaches(watch));
        let watched = seen.completed && reaches(situation.watches[0]);
        if seen.faults_without_rf != 0 {
            Some("a fault was delivered with RF clear")
        } else if first && seen.breakpoints != u32::from(situation.breakpoint && !situation.resume) {
            Some("the instruction breakpoint")
        } else if seen.completed && seen.steps != u32::from(situation.single_step) {
            Some("the single step")
        } else if seen.watches != u32::from(watched) {
            Some("the data breakpoint")
        } else {
            None
        }
    }

    /// Does the instruction, if it completes, touch a byte that an enabled data breakpoint in DR0 is on?
    fn reaches(&self, watch: Watch) -> bool {
        let size = [1, 2, 8, 4][(watch.kind >> 2) as usize];
        let first = self.place.operand.wrapping_add_signed(watch.offset) / size * size;
        let touched = (0..self.bytes()).map(|n| self.place.operand + n);
        let writes_only = watch.kind & 3 == 1;
        let kind = !writes_only || self.instruction.operand.is_written();
        watch.enabled
            && kind
            && self.instruction.operand.is_touched()
            && touched.into_iter().any(|byte| (first..first + size).contains(&byte))
    }

    /// Puts code and operand where they belong, and what [`run`] needs.
    pub fn prepare(&self) {
        let memory = MEMORY.get();
        let (mode, place, situation) = (self.mode, self.place, self.situation);
        let prefix: &[u8] = if mode.is_16() && self.instruction.operand.bytes() != 0 { &[0x67] } else { &[] };
        let before: &[u8] = match situation.before {
            Before::Nothing => &[],
            Before::Sti => &[0xFB],
            // mov ss, ebp
            Before::MovSs => &[0x8E, 0xD5],
            // mov ss, [ebp + 0]
            Before::MovSsWatched if mode.is_16() => &[0x67, 0x8E, 0x55, 0x00],
            Before::MovSsWatched => &[0x8E, 0x55, 0x00],
        };
        let length = (prefix.len() + self.instruction.code.len()) as u64;
        let mask = if mode.is_64() { u64::MAX } else { 0xFFFF_FFFF };
        // The instruction ends where its page does, an INT3 follows.
        let linear = memory.code + PAGE - length;
        let ip = place.ip.wrapping_sub(length) & mask;
        let first = linear - before.len() as u64;
        let code = before.iter().chain(prefix).chain(self.instruction.code).chain(&[0xCC, 0xCC]);
        for (at, byte) in (first..).zip(code) {
            poke(at, *byte);
        }

        let cr3 = cpu::cr3();
        let second = match situation.memory {
            Memory::Missing(_) => 0,
            Memory::ReadOnly(_) => memory.window[1] | 5,
            _ => memory.window[1] | 7,
        };
        pages::set_entry(cr3, WINDOW + PAGE, second);
        invalidate(WINDOW + PAGE);
        let value = match self.instruction.operand {
            Operand::None | Operand::Written(_) => 0,
            Operand::Region | Operand::Untouched => memory.regions[0],
            Operand::OtherRegion => memory.regions[1],
            Operand::Number(_, number) => number,
        };
        let bytes = self.bytes();
        for (n, byte) in (0..bytes).zip(u128::from(value).to_le_bytes()) {
            if let Some(at) = physical((place.operand + n) & mask) {
                poke(at, byte);
            }
        }

        let selector = if mode.ring() == 3 { d::USER_DATA } else { d::KERNEL_DATA };
        poke(memory.selector, selector);
        let (mut dr7, mut dr) = (DR7_CLEAR, [0u64; 4]);
        if situation.breakpoint {
            dr[1] = linear;
            dr7 |= 1 << 2;
        }
        for (slot, watch) in situation.watches.iter().enumerate() {
            let Some(watch) = watch else { continue };
            let number = 2 * slot;
            dr[number] = place.operand.wrapping_add_signed(watch.offset);
            dr7 |= u64::from(watch.enabled) << (2 * number) | watch.kind << (16 + 4 * number);
        }
        if situation.before == Before::MovSsWatched {
            dr[3] = memory.selector;
            dr7 |= 1 << 6 | 0b11 << 28;
        }
        DEBUG.set((dr7, dr));

        let (rax, rdx) = match self.instruction.rax {
            Value::Is(value) => (value, 0),
            Value::Cr0(bits) => (cpu::cr0() ^ bits, 0),
            Value::Cr4(bits) => (cpu::cr4() ^ bits, 0),
            Value::Msr(msr) => {
                let value = cpu::rdmsr(msr);
                (value & 0xFFFF_FFFF, value >> 32)
            }
            Value::Xcr0 => (xcr0(), 0),
        };
        let flags = 2 | IOPL_3 | if situation.single_step { TF } else { 0 } | if situation.resume { RF } else { 0 };
        let rbp = match (self.instruction.base, situation.before) {
            (Base::Rbp, _) => place.operand,
            (Base::Rdi, Before::MovSsWatched) => memory.selector,
            (Base::Rdi, _) => selector.into(),
        };
        START.set(Start {
            rip: ip.wrapping_sub(before.len() as u64) & mask,
            cs: u64::from(OWN_CODE | mode.ring()),
            rflags: flags,
            rsp: memory.stack - 64,
            ss: selector.into(),
            rax,
            rbx: 0,
            rcx: self.instruction.rcx,
            rdx,
            rsi: self.instruction.rsi,
            rdi: place.operand,
            rbp,
        });
        DESCRIPTOR.set(mode.descriptor(place.base));
        RUNNING.set(Running {
            active: false,
            ip,
            operand: place.operand,
            operand_bytes: bytes,
            compared: self.instruction.compared,
            faulted: false,
            traps: 0,
            wide: mode.is_64(),
            mask,
            seen: Seen::default(),
        });
    }
}

static DEBUG: Global<(u64, [u64; 4])> = Global::new((DR7_CLEAR, [0; 4]));
static DESCRIPTOR: Global<u64> = Global::new(0);
static START: Global<Start> = Global::new(Start {
    rip: 0,
    cs: 0,
    rflags: 0,
    rsp: 0,
    ss: 0,
    rax: 0,
    rbx: 0,
    rcx: 0,
    rdx: 0,
    rsi: 0,
    rdi: 0,
    rbp: 0,
});

fn xcr0() -> u64 {
    let low: u32;
    // SAFETY: CR4.OSXSAVE is set.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low.into()
}

/// The image's own address of a byte of the operand.
fn physical(linear: u64) -> Option<u64> {
    const LAST: u64 = 0xFFFF_F000;
    let memory = MEMORY.get();
    let page = match linear & !(PAGE - 1) {
        WINDOW => memory.window[0],
        EDGE => memory.edge,
        LAST => memory.window[0],
        0 => memory.window[1],
        other if other == WINDOW + PAGE => memory.window[1],
        _ => return None,
    };
    Some(page | linear & (PAGE - 1))
}

fn set_debug((dr7, [dr0, dr1, dr2, dr3]): (u64, [u64; 4])) {
    // SAFETY: breakpoints trap, and the traps are the test's.
    unsafe {
        asm!(
            "mov dr7, {clear}", "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {dr6}",
            "mov dr7, {dr7}",
            in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, dr6 = in(reg) DR6_CLEAR, clear = in(reg) DR7_CLEAR,
            dr7 = in(reg) dr7, options(nostack, preserves_flags),
        );
    }
}

/// Runs the prepared case; in a guest, its hypervisor hears of the last moment before by a VMCALL.
pub fn run(in_guest: bool) {
    let gdt = d::gdt_base();
    load_gdt(DESCRIPTOR.get());
    cpu::set_cr2(CR2_UNTOUCHED);
    RUNNING.set(Running { active: true, ..RUNNING.get() });
    set_debug(DEBUG.get());
    let start = START.get();
    let Err(trap) = trap::catch(|| {
        // SAFETY: the far return never comes back; the trap that ends the code lands in `catch`.
        unsafe {
            asm!(
                "test {tell:e}, {tell:e}",
                "jz 2f",
                "mov eax, {about_to}",
                "vmcall",
                "2:",
                "push qword ptr [r15 + 32]",
                "push qword ptr [r15 + 24]",
                "push qword ptr [r15 + 16]",
                "push qword ptr [r15 + 8]",
                "push qword ptr [r15]",
                "mov rax, [r15 + 40]",
                "mov rbx, [r15 + 48]",
                "mov rcx, [r15 + 56]",
                "mov rdx, [r15 + 64]",
                "mov rsi, [r15 + 72]",
                "mov rdi, [r15 + 80]",
                "mov rbp, [r15 + 88]",
                "iretq",
                tell = in(reg) u32::from(in_guest), about_to = const ABOUT_TO, in("r15") &raw const start,
                options(noreturn),
            )
        }
    });
    set_debug((DR7_CLEAR, [0; 4]));
    unload_gdt(gdt);
    RUNNING.set(Running { active: false, ..RUNNING.get() });
    if trap.vector != trap::BP {
        log::add(format_args!(",ended"));
    }
}

/// EAX of the VMCALL before a case
pub const ABOUT_TO: u32 = 0xAB0;

/// Is this linear address in the code under test?
pub fn is_code(linear: u64) -> bool {
    let code = MEMORY.get().code;
    (code..code + 2 * PAGE).contains(&(linear & 0xFFFF_FFFF))
}

/// An instruction pointer as an offset from that of the instruction. Of 32-bit code it has 32 bits: one with more is told as
/// it is.
pub fn offset(ip: u64) -> i64 {
    let running = RUNNING.get();
    let offset = ip.wrapping_sub(running.ip);
    match ip >> 32 {
        0 if !running.wide => i64::from(offset as i32),
        _ if !running.wide => ip as i64,
        _ => offset as i64,
    }
}

/// See [`offset`].
pub fn operand_offset(linear: u64) -> i64 {
    linear.wrapping_sub(RUNNING.get().operand) as i64
}

/// Separates entries of the log.
pub fn comma() -> &'static str {
    if log::is_empty() { "" } else { "," }
}

/// Every trap of a case: says so, and whether the code goes on.
fn trapped(frame: &mut Frame) -> bool {
    let mut running = RUNNING.get();
    if !running.active {
        return false;
    }
    let vector = frame.vector as u8;
    running.traps += 1;
    log::add(format_args!("{}{vector}@{}", comma(), offset(frame.rip)));
    if matches!(vector, 10..=14 | 17) {
        log::add(format_args!("e{:x}", frame.error));
    }
    for (bit, letter) in [(RF, "r"), (TF, "t")] {
        log::add(format_args!("{}", if frame.rflags & bit != 0 { letter } else { "" }));
    }
    let on = match vector {
        trap::BP => {
            RUNNING.set(running);
            completed([
                frame.rax,
                frame.rbx,
                frame.rcx,
                frame.rdx,
                frame.rsi,
                frame.rdi,
                frame.rbp,
                frame.rflags,
                frame.cs,
                frame.ss,
            ]);
            running = RUNNING.get();
            false
        }
        trap::DB => {
            let (dr6, dr7): (u64, u64);
            // SAFETY: reads and resets.
            unsafe {
                asm!("mov {}, dr6", "mov dr6, {}", "mov {}, dr7", out(reg) dr6, in(reg) DR6_CLEAR, out(reg) dr7);
            }
            log::add(format_args!("d{:x}", dr6 & DR6_BITS));
            running.seen.debugged(dr6);
            if dr6 & BS != 0 {
                frame.rflags &= !TF;
            }
            // As a debugger goes on from an instruction breakpoint.
            if dr6 & 1 << 1 != 0 && dr7 & 1 << 2 != 0 && frame.rip == running.ip {
                frame.rflags |= RF;
            }
            true
        }
        _ => {
            running.seen.faults_without_rf += u32::from(frame.rflags & RF == 0);
            if vector == trap::PF {
                log::add(format_args!("a{}", operand_offset(cpu::cr2())));
                cpu::set_cr2(CR2_UNTOUCHED);
            }
            // Once more with the flags that were saved: a breakpoint there must not come again.
            !core::mem::replace(&mut running.faulted, true)
        }
    } && running.traps < 8;
    running.active = on;
    RUNNING.set(running);
    on
}

/// The code under test came to its end: RAX, RBX, RCX, RDX, RSI, RDI, RBP, RFLAGS, CS, SS.
pub fn completed(registers: [u64; 10]) {
    let mut running = RUNNING.get();
    let hash = hash(registers, &running);
    log::add(format_args!("#{hash:08x}"));
    running.seen.completed = true;
    RUNNING.set(running);
}

/// A #DB that exited; true if it is the instruction's breakpoint.
pub fn debugged(qualification: u64, ip: u64) -> bool {
    let mut running = RUNNING.get();
    running.seen.debugged(qualification);
    RUNNING.set(running);
    qualification & 1 << 1 != 0 && ip == running.ip
}

/// Another exception that exited, with RF or without; true if it is the first: the instruction gets another try.
pub fn faulted(rf: bool) -> bool {
    let mut running = RUNNING.get();
    running.seen.faults_without_rf += u32::from(!rf);
    let again = !core::mem::replace(&mut running.faulted, true);
    RUNNING.set(running);
    again
}

/// What the prepared case starts with.
pub fn start() -> Start {
    START.get()
}

/// DR7 and DR0 to DR3 of the prepared case.
pub fn breakpoints() -> (u64, [u64; 4]) {
    DEBUG.get()
}

/// Sets DR0 to DR3, without effect here.
pub fn set_addresses(addresses: [u64; 4]) {
    set_debug((DR7_CLEAR, addresses));
}

/// The pages of the operand.
pub fn window() -> [u64; 2] {
    MEMORY.get().window
}

/// What the instruction left: registers, flags, its operand.
fn hash(mut registers: [u64; 10], running: &Running) -> u32 {
    let masks = running.compared.into_iter().chain([u64::MAX; 3]).chain([COMPARED_FLAGS]);
    registers.iter_mut().zip(masks).for_each(|(register, mask)| *register &= mask);
    let memory = (0..running.operand_bytes).filter_map(|n| physical((running.operand + n) & running.mask)).map(|at| {
        // SAFETY: the test's own memory.
        unsafe { core::ptr::read_volatile(at as *const u8) }
    });
    // FNV-1a
    registers
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .chain(memory)
        .fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Adds what a #DB that exited would have left in DR6.
pub fn set_dr6(qualification: u64) {
    // SAFETY: breakpoints are off.
    unsafe { asm!("mov dr6, {}", in(reg) DR6_CLEAR | qualification & DR6_BITS, options(nostack, preserves_flags)) };
}
