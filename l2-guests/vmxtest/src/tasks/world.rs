//! The 32-bit world: descriptor tables, tasks, page tables and stacks in pages of its own, and what was reached there.

use core::cell::UnsafeCell;
use core::ptr;
use l2_kit::{apic, cpu, descriptors};

core::arch::global_asm!(include_str!("run.s"));

unsafe extern "C" {
    fn vmxtest_tasks_run();
    static vmxtest_tasks_context: u8;
    static vmxtest_tasks_vectors: u8;
    static vmxtest_tasks_land: u8;
    static vmxtest_tasks_land_user: u8;
}

/// Pages of the world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Page {
    Gdt = 0,
    Idt = 1,
    /// Two pages each
    Old = 2,
    New = 4,
    Other = 6,
    OldStack = 8,
    NewStack = 9,
    Stack0 = 10,
    Ldt = 11,
    Virtual8086 = 12,
    Top = 13,
    OtherTop = 14,
    Table = 15,
    LowTable = 16,
    Directories = 17,
    Log = 21,
}
const PAGES: usize = 23;

#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; PAGES * 4096]>);
// SAFETY: one CPU, and every access goes through pointers.
unsafe impl Sync for Arena {}
static ARENA: Arena = Arena(UnsafeCell::new([0; PAGES * 4096]));

/// Selectors.
#[allow(missing_docs)]
pub mod selector {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE3: u16 = 0x1B;
    pub const DATA3: u16 = 0x23;
    pub const OLD: u16 = 0x28;
    pub const NEW: u16 = 0x30;
    pub const OTHER: u16 = 0x38;
    pub const LDT: u16 = 0x40;
    pub const GATE: u16 = 0x48;
    /// Code that begins where tasks do
    pub const NEAR: u16 = 0x50;
    /// A stack of 16 bits in `NewStack`
    pub const STACK16: u16 = 0x58;
    pub const ABSENT: u16 = 0x60;
    pub const CONFORMING: u16 = 0x68;
    pub const READ_ONLY: u16 = 0x70;
    pub const FRESH: u16 = 0x78;
    pub const ABSENT_CODE: u16 = 0x80;
    pub const EXECUTE_ONLY: u16 = 0x88;
    /// A TSS for the way back
    pub const HOME: u16 = 0x90;
    /// In the LDT
    pub const LOCAL: u16 = 0x04;
}

/// How the world pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Paging {
    Off,
    Wide32,
    Pae,
}

/// What sets a case off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Trigger {
    Jmp(u16),
    Call(u16),
    Int,
    Int3,
    Ud,
    Gp,
    Pf,
    Iret,
    Interrupt,
    Nmi,
    LongMode,
    Cr3(u32),
}

macro_rules! addresses {
    ($($trigger:pat => $symbol:ident;)*) => {
        unsafe extern "C" { $( static $symbol: u8; )* }
        fn address(trigger: Trigger) -> u32 {
            match trigger { $( $trigger => &raw const $symbol as u32, )* }
        }
    };
}
addresses! {
    Trigger::Jmp(_) => vmxtest_tasks_jmp;
    Trigger::Call(_) => vmxtest_tasks_call;
    Trigger::Int => vmxtest_tasks_int;
    Trigger::Int3 => vmxtest_tasks_int3;
    Trigger::Ud => vmxtest_tasks_ud;
    Trigger::Gp => vmxtest_tasks_gp;
    Trigger::Pf => vmxtest_tasks_pf;
    Trigger::Iret => vmxtest_tasks_iret;
    Trigger::Interrupt => vmxtest_tasks_interrupt;
    Trigger::Nmi => vmxtest_tasks_nmi;
    Trigger::LongMode => vmxtest_tasks_long_mode;
    Trigger::Cr3(_) => vmxtest_tasks_cr3;
}

/// Where the pages are with paging.
pub const HIGH: u32 = 0xC000_0000;
/// A stack begins so far from the page's end: the notes look at what is above.
const ABOVE: u32 = 0x100;
const PRESENT: u32 = 0b11;
const WRITABLE: u32 = 0b10;
const NT: u32 = 1 << 14;
/// The vector of `int 0x30`.
pub const INT: u8 = 0x30;
/// The vector of the local APIC's interrupt.
pub const INTERRUPT: u8 = 0x32;

/// The world of one case.
pub struct World {
    paging: Paging,
    /// EFLAGS at the trigger
    pub eflags: u32,
    /// DR7 at the trigger
    pub dr7: u32,
    /// IA32_DEBUGCTL at the trigger
    pub debugctl: u64,
    /// How often a note is followed by IRET.
    pub then: u32,
}

/// What was reached.
#[derive(Clone, Copy)]
pub struct Note([u32; 33]);

impl Note {
    fn word(&self, n: usize) -> u32 {
        self.0[n]
    }
    /// 1: a task began; 2: one went on after its trigger; 3: one after its IRET; 100H and more: a trap of that vector.
    pub fn id(&self) -> u32 {
        if self.word(0) == 0x100 { 0x100 | self.word(22) } else { self.word(0) }
    }
    /// The error code of a trap; else what lies on the stack.
    pub fn error(&self) -> u32 {
        if self.id() >= 0x100 { self.word(23) } else { self.word(22) }
    }
    /// TR
    pub fn tr(&self) -> u32 {
        self.word(7)
    }
    /// Everything, for the record: DR7, DR6, CR3, CR2, CR0, LDTR, TR, GS, FS, ES, DS, SS, EDI, ESI, EBP, ESP, EBX, EDX, ECX,
    /// EAX, EFLAGS, then the stack; CR0 as far as tasks go, EBX as the notes leave it.
    pub fn all(&self) -> [u32; 32] {
        let mut all = [0; 32];
        all.copy_from_slice(&self.0[1..]);
        all[4] &= 0x8001_000B;
        all
    }
}

impl World {
    /// Two tasks, a third for faults, and a trap for every vector.
    pub fn new(paging: Paging) -> Self {
        // SAFETY: the arena is this code's alone.
        unsafe { ptr::write_bytes(ARENA.0.get().cast::<u8>(), 0, PAGES * 4096) };
        let world = Self { paging, eflags: 2, dr7: 0x400, debugctl: 0, then: 0 };
        let code = &raw const vmxtest_tasks_land as u32;
        let tss = |page| descriptor(world.at(page), 0x67, 0x89);
        for (selector, value) in [
            (selector::CODE, descriptor(0, 0xF_FFFF, 0xC09B)),
            (selector::DATA, descriptor(0, 0xF_FFFF, 0xC093)),
            (selector::CODE3, descriptor(0, 0xF_FFFF, 0xC0FB)),
            (selector::DATA3, descriptor(0, 0xF_FFFF, 0xC0F3)),
            (selector::OLD, tss(Page::Old)),
            (selector::NEW, tss(Page::New)),
            (selector::OTHER, tss(Page::Other)),
            (selector::LDT, descriptor(world.at(Page::Ldt), 0xFFF, 0x82)),
            (selector::GATE, gate(selector::NEW, 0, 0xE5)),
            (selector::NEAR, descriptor(code, 0xFFFF, 0x409B)),
            (selector::STACK16, descriptor(world.at(Page::NewStack), 0xFFF, 0x93)),
            (selector::ABSENT, descriptor(0, 0xF_FFFF, 0xC013)),
            (selector::CONFORMING, descriptor(0, 0xF_FFFF, 0xC09F)),
            (selector::READ_ONLY, descriptor(0, 0xF_FFFF, 0xC091)),
            (selector::FRESH, descriptor(0, 0xF_FFFF, 0xC092)),
            (selector::ABSENT_CODE, descriptor(0, 0xF_FFFF, 0xC01B)),
            (selector::EXECUTE_ONLY, descriptor(0, 0xF_FFFF, 0xC099)),
            (selector::HOME, tss(Page::Log)),
        ] {
            world.gdt(selector, value);
        }
        world.put64(Page::Ldt, 0, descriptor(0, 0xF_FFFF, 0xC093));
        let first = &raw const vmxtest_tasks_vectors as u32;
        for vector in 0..0x34 {
            let dpl3 = if matches!(vector, 3 | 0x31) { 0x60 } else { 0 };
            world.idt(vector as u8, gate(selector::CODE, first + 16 * vector, 0x8E | dpl3));
        }
        world.task(Page::Old, Page::OldStack, 0);
        world.task(Page::New, Page::NewStack, code);
        world.task(Page::Other, Page::Stack0, code);
        // A HLT, which virtual-8086 mode refuses.
        world.put8(Page::Virtual8086, 0, 0xF4);
        world.page_tables();
        world
    }

    /// The linear address of a page.
    pub fn at(&self, page: Page) -> u32 {
        if self.paging == Paging::Off { physical(page) } else { HIGH + page as u32 * 4096 }
    }

    /// The top of a stack page.
    pub fn top(&self, page: Page) -> u32 {
        self.at(page) + 4096 - ABOVE
    }

    /// CR3 with other tables that are the same.
    pub fn other_cr3(&self) -> u32 {
        physical(Page::OtherTop)
    }

    /// A 32-bit TSS for a flat task.
    fn task(&self, page: Page, stack: Page, eip: u32) {
        use selector::{CODE, DATA};
        let eight = [0x0A0A_0A0A, 0x0C0C_0C0C, 0x0D0D_0D0D, 0x0B0B_0B0B, self.top(stack), 5, 6, 7];
        self.put32(page, 4, self.top(Page::Stack0));
        self.put32(page, 8, DATA.into());
        self.put32(page, 0x1C, physical(Page::Top));
        self.put32(page, 0x20, eip);
        self.put32(page, 0x24, 2);
        (0..).zip(eight).for_each(|(n, value)| self.put32(page, 0x28 + 4 * n, value));
        for (n, selector) in (0..).zip([DATA, CODE, DATA, DATA, DATA, DATA]) {
            self.put32(page, 0x48 + 4 * n, selector.into());
        }
    }

    /// A 16-bit TSS in place of the 32-bit one of the new task.
    pub fn new_is_16_bit(&self) {
        use selector::{DATA, NEAR, NEW, STACK16};
        self.gdt(NEW, descriptor(self.at(Page::New), 0x2B, 0x81));
        (0..104).for_each(|at| self.put8(Page::New, at, 0));
        let words = [0, 2, 0x1111, 0x2222, 0x3333, 0x4444, 4096 - ABOVE as u16, 0x5555, 0x6666, 0x7777];
        (0..).zip(words).for_each(|(n, word)| self.put16(Page::New, 0x0E + 2 * n, word));
        (0..).zip([DATA, NEAR, STACK16, DATA, 0]).for_each(|(n, word)| self.put16(Page::New, 0x22 + 2 * n, word));
    }

    /// The old task has a 16-bit TSS.
    pub fn old_is_16_bit(&self) {
        self.gdt(selector::OLD, descriptor(self.at(Page::Old), 0x2B, 0x81));
        (0..104).for_each(|at| self.put8(Page::Old, at, 0));
    }

    /// The new task is a program of virtual-8086 mode.
    pub fn new_is_8086(&self) {
        self.put32(Page::New, 0x20, 0);
        self.put32(Page::New, 0x24, 1 << 17 | 2);
        self.put32(Page::New, 0x38, 0x700);
        for (n, selector) in (0..).zip([0x1111, 0x0800, 0x2222, 0x3333, 0x4444, 0x5555]) {
            self.put32(Page::New, 0x48 + 4 * n, selector);
        }
    }

    /// The new task runs in ring 3.
    pub fn new_is_user(&self) {
        use selector::{CODE3, DATA3};
        self.put32(Page::New, 0x20, &raw const vmxtest_tasks_land_user as u32);
        for (n, selector) in (0..).zip([DATA3, CODE3, DATA3, DATA3, DATA3, DATA3]) {
            self.put32(Page::New, 0x48 + 4 * n, selector.into());
        }
    }

    /// IRET of the old task goes to the new one.
    pub fn nested(&mut self) {
        self.eflags |= NT;
        self.put16(Page::Old, 0, selector::NEW);
        self.gdt(selector::NEW, descriptor(self.at(Page::New), 0x67, 0x8B));
    }

    /// A vector's gate leads to a task.
    pub fn task_gate(&self, vector: u8, tss: u16) {
        self.idt(vector, gate(tss, 0, 0xE5));
    }

    /// A descriptor of the GDT.
    pub fn gdt(&self, selector: u16, value: u64) {
        self.put64(Page::Gdt, (selector & 0xFFF8).into(), value);
    }

    fn idt(&self, vector: u8, value: u64) {
        self.put64(Page::Idt, 8 * u32::from(vector), value);
    }

    /// Changes the entry of a page.
    pub fn map(&self, page: Page, present: bool, writable: bool) {
        let flags = if present { 1 } else { 0 } | if writable { WRITABLE } else { 0 } | 4;
        let size = if self.paging == Paging::Pae { 8 } else { 4 };
        self.put32(Page::Table, page as u32 * size, physical(page) | flags);
    }

    fn page_tables(&self) {
        let pae = self.paging == Paging::Pae;
        let size = if pae { 8 } else { 4 };
        let entry = |table: Page, n: u32, value: u32| self.put32(table, n * size, value);
        for n in 0..PAGES as u32 {
            entry(Page::Table, n, (physical(Page::Gdt) + n * 4096) | PRESENT | 4);
        }
        for n in 0..if pae { 512 } else { 1024 } {
            entry(Page::LowTable, n, n << 12 | PRESENT | 4);
        }
        entry(Page::LowTable, 8, physical(Page::Virtual8086) | PRESENT | 4);
        // The last page before 4 MiB beyond HIGH stays away.
        let (low, table) = (physical(Page::LowTable) | PRESENT | 4, physical(Page::Table) | PRESENT | 4);
        if pae {
            for n in 0..2048u32 {
                self.put32(Page::Directories, n * 8, n << 21 | 0x83 | 4);
            }
            self.put32(Page::Directories, 0, low);
            let of_high = (HIGH >> 21) * 8;
            self.put32(Page::Directories, of_high, table);
            self.put32(Page::Directories, of_high + 8, 0);
            for top in [Page::Top, Page::OtherTop] {
                (0..4).for_each(|n| entry(top, n, (physical(Page::Directories) + n * 4096) | 1));
            }
        } else {
            for top in [Page::Top, Page::OtherTop] {
                (0..1024).for_each(|n| entry(top, n, n << 22 | 0x83 | 4));
                entry(top, 0, low);
                entry(top, HIGH >> 22, table);
            }
        }
    }

    /// Runs the case; what was reached, in order, and IA32_DEBUGCTL after it.
    pub fn run(&self, trigger: Trigger) -> (impl Iterator<Item = Note>, u64) {
        let context = &raw const vmxtest_tasks_context as u64;
        let (cr4, cr0) = match self.paging {
            Paging::Off => (0, 0),
            Paging::Wide32 => (1 << 4, 1 << 31 | 1 << 16),
            Paging::Pae => (1 << 5, 1 << 31 | 1 << 16),
        };
        let far = match trigger {
            Trigger::Jmp(to) | Trigger::Call(to) => to,
            _ => 0,
        };
        let gdt_limit = u32::from(selector::HOME) + 7;
        for (at, value) in [
            (0x40, cr4),
            (0x44, physical(Page::Top)),
            (0x48, cr0),
            (0x50, gdt_limit | self.at(Page::Gdt) << 16),
            (0x54, self.at(Page::Gdt) >> 16),
            (0x58, 0x19F | self.at(Page::Idt) << 16),
            (0x5C, self.at(Page::Idt) >> 16),
            (0x60, self.top(Page::OldStack)),
            (0x64, selector::OLD.into()),
            (0x68, self.eflags),
            (0x6C, 0),
            (0x70, self.dr7),
            (0x74, address(trigger)),
            (0x78, 0x1234_5678),
            (0x7C, far.into()),
            (0x80, self.then),
            (0x84, physical(Page::Log)),
            (0x8C, physical(Page::Log) + 3 * 132 - 1),
            (0x90, if let Trigger::Cr3(value) = trigger { value } else { 0 }),
            (0x88, (descriptors::gdt_base() + u64::from(descriptors::TSS) + 5) as u32),
        ] {
            put(context + at, value);
        }
        // No processor without the bits has them set after the case.
        let _ = cpu::try_wrmsr(cpu::DEBUGCTL, self.debugctl);
        // SAFETY: the context is complete; it comes back with the registers that a call keeps, wherever the trigger led.
        unsafe { vmxtest_tasks_run() };
        let debugctl = cpu::rdmsr(cpu::DEBUGCTL);
        cpu::wrmsr(cpu::DEBUGCTL, 0);
        if trigger == Trigger::Interrupt {
            apic::eoi();
        }
        let end = get(context + 0x84);
        let log = physical(Page::Log);
        let notes = (0..(end - log) / 132).map(move |n| {
            let mut note = [0; 33];
            (0..).zip(&mut note).for_each(|(i, word)| *word = get(u64::from(log + 132 * n + 4 * i)));
            Note(note)
        });
        (notes, debugctl)
    }

    /// A sum over the GDT and the TSSs: FNV-1a.
    pub fn sum(&self, pages: &[Page]) -> u32 {
        let bytes = pages.iter().flat_map(|page| (0..1024).map(move |n| physical(*page) + 4 * n));
        bytes.fold(0x811C_9DC5, |sum, at| (sum ^ get(at.into())).wrapping_mul(0x0100_0193))
    }

    /// A word of a page.
    pub fn word(&self, page: Page, offset: u32) -> u32 {
        get(u64::from(physical(page) + offset))
    }

    /// Writes a byte.
    pub fn put8(&self, page: Page, offset: u32, value: u8) {
        let at = ptr::with_exposed_provenance_mut(physical(page) as usize + offset as usize);
        // SAFETY: the offset lies in the arena's pages.
        unsafe { ptr::write_volatile::<u8>(at, value) };
    }

    /// Writes two bytes.
    pub fn put16(&self, page: Page, offset: u32, value: u16) {
        (0..).zip(value.to_le_bytes()).for_each(|(n, byte)| self.put8(page, offset + n, byte));
    }

    /// Writes four bytes.
    pub fn put32(&self, page: Page, offset: u32, value: u32) {
        put(u64::from(physical(page) + offset), value);
    }

    fn put64(&self, page: Page, offset: u32, value: u64) {
        self.put32(page, offset, value as u32);
        self.put32(page, offset + 4, (value >> 32) as u32);
    }
}

/// A segment descriptor; `rights` as bits 15:8 and 23:20 of its second word.
pub const fn descriptor(base: u32, limit: u32, rights: u32) -> u64 {
    let low = (limit & 0xFFFF) as u64 | (base as u64 & 0xFFFF) << 16;
    let high =
        base >> 16 & 0xFF | (rights & 0xFF) << 8 | limit & 0xF_0000 | (rights & 0xF000) << 8 | base & 0xFF00_0000;
    low | (high as u64) << 32
}

const fn gate(selector: u16, offset: u32, rights: u32) -> u64 {
    (offset & 0xFFFF) as u64 | (selector as u64) << 16 | (rights as u64) << 40 | (offset as u64 >> 16) << 48
}

fn physical(page: Page) -> u32 {
    ARENA.0.get() as u32 + page as u32 * 4096
}

fn put(at: u64, value: u32) {
    // SAFETY: callers name a word of the arena or of the context.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(at as usize), value) };
}

fn get(at: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(at as usize)) }
}
