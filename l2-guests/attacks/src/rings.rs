//! Ring 3 of L2 and of L3: whatever a program executes, it gets a fault or an answer, and its kernel and all below go on.

mod instructions;

use self::instructions::{INSTRUCTIONS, Instruction, SYSENTER};
use crate::{
    guest::{Exit, Extra},
    lab::{Lab, Seen, Told},
    place::{self, Place},
};
use core::{arch::global_asm, fmt::Write};
use l2_kit::{
    Global,
    arrayvec::ArrayString,
    cpu,
    descriptors::{KERNEL_CODE32, USER_CODE, USER_DATA, gdt_base},
    fields as f,
    identity::Slot,
    log,
    pages::{self, PAGE},
    protocol::abi::{LEAF_INTERFACE, LEAF_MAX, LEAF_SIGNATURE},
    setup::{self, Kind, pin, primary as p, secondary as s},
    trap::{self, Trap},
    user,
    vmx::{self, reason as r},
};

/// Where an instruction is executed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Setting {
    Plain,
    Stepped,
    /// After MOV to SS
    Shadow,
    /// After MOV to SS, with a single step that is due
    SteppedShadow,
    /// Its last byte is the last one below the end of canonical addresses.
    CanonicalEdge,
    Compatibility,
    /// Its last byte is the last one below 4 GiB.
    CompatibilityEdge,
}

const SETTINGS: [Setting; 7] = [
    Setting::Plain,
    Setting::Stepped,
    Setting::Shadow,
    Setting::SteppedShadow,
    Setting::CanonicalEdge,
    Setting::Compatibility,
    Setting::CompatibilityEdge,
];

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const AC: u64 = 1 << 18;
const END: u64 = 1 << 47;
const FOUR_GIB: u64 = 1 << 32;
const INT3: u8 = 0xCC;
/// #AC
const AC_VECTOR: u8 = 17;
/// `mov r8d, ss`, `mov ss, r8d`
const SHADOW: &[u8] = &[0x41, 0x8C, 0xD0, 0x41, 0x8E, 0xD0];
/// `mov r8d, ss`, `pushfq`, `or dword ptr [rsp], 0x100`, `popfq`, `mov ss, r8d`
const STEPPED_SHADOW: &[u8] = &[0x41, 0x8C, 0xD0, 0x9C, 0x81, 0x0C, 0x24, 0, 1, 0, 0, 0x9D, 0x41, 0x8E, 0xD0];
/// `mov [rdi], eax`, `mov [rdi + 4], ebx`, `mov [rdi + 8], ecx`, `mov [rdi + 12], edx` after CPUID
const CPUID_STORED: &[u8] = &[0x0F, 0xA2, 0x89, 0x07, 0x89, 0x5F, 0x04, 0x89, 0x4F, 0x08, 0x89, 0x57, 0x0C];

/// What ring 3 begins with, in the order in which `attacks_ring3` takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Start {
    ss: u64,
    rsp: u64,
    rflags: u64,
    cs: u64,
    rip: u64,
    rax: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
}

global_asm!(
    ".pushsection .text.attacks_ring3, \"ax\"",
    "attacks_ring3:",
    "push [rdi]",
    "push [rdi + 8]",
    "push [rdi + 16]",
    "push [rdi + 24]",
    "push [rdi + 32]",
    "mov rax, [rdi + 40]",
    "mov rcx, [rdi + 48]",
    "mov rdx, [rdi + 56]",
    "mov rsi, [rdi + 64]",
    "mov rdi, [rdi + 72]",
    "iretq",
    ".popsection",
);

unsafe extern "C" {
    /// Goes to ring 3; a trap ends it.
    #[link_name = "attacks_ring3"]
    safe fn enter(start: *const Start);
}

/// The trap that ended ring 3.
static ENDED: Global<Option<Trap>> = Global::new(None);

/// Goes to ring 3 until it traps: what L2 does, and a program of L3.
extern "C" fn ring3(start: u64) -> u64 {
    let own = cpu::cr3();
    cpu::set_cr3(user::tables());
    ENDED.set(trap::catch(|| enter(start as *const Start)).err());
    cpu::set_cr3(own);
    0
}

/// Pages of the lab: code, data, stack, what lies from 4 GiB on, [`Start`].
const CODE: usize = 3;
const DATA: usize = 4;
const STACK: usize = 5;
const ZERO: usize = 6;
const START: usize = 7;

type Text = ArrayString<192>;

pub fn all(lab: &mut Lab) {
    let cr0 = cpu::cr0();
    let msrs = SYSENTER_MSRS.map(|(msr, _)| (msr, cpu::rdmsr(msr)));
    // The 32-bit code segment becomes one of ring 3, for L3 too.
    const CODE32: u64 = 0x00CF_FB00_0000_FFFF;
    let slot = (gdt_base() + u64::from(KERNEL_CODE32)) as *mut u64;
    // SAFETY: the GDT of this CPU, whose 32-bit code segment nobody uses meanwhile.
    let before = unsafe { slot.replace(CODE32) };
    for (physical, linear) in [(CODE, END - PAGE), (CODE, FOUR_GIB - PAGE), (ZERO, 0)] {
        pages::set_entry(user::tables(), linear, lab.pages[physical] | 0x67);
    }
    for Instruction(name, code, touched) in INSTRUCTIONS {
        for level in [2, 3] {
            lab.attack(format_args!("ring 3 of L{level}: {name}"), Told::Same, |lab| {
                let (mut text, mut escape) = (Text::new(), false);
                for setting in SETTINGS {
                    let start = prepare(lab, code, *touched, setting);
                    sysenter(lab, level);
                    escape |= !run(lab, level, start, *name == SYSENTER, &mut text);
                }
                log!("  {text}");
                let digest = text.bytes().fold(0u32, |sum, byte| sum.rotate_left(5) ^ u32::from(byte));
                Seen::of(format_args!("{digest:#x}")).escaped_if(escape)
            });
        }
    }
    lab.attack(format_args!("ring 3 of L2: CPUID leaves of a hypervisor"), Told::Answered, leaves);
    alignment(lab);
    if setup::allowed_one(Kind::Secondary, s::VM_FUNCTIONS) {
        for place in Place::INSIDE.into_iter().chain(Place::BESIDE) {
            lab.attack(format_args!("ring 3 of L3: an EPTP list {}", place.name()), Told::Same, |lab| {
                functions(lab, place)
            });
        }
    }
    // SAFETY: as above.
    unsafe { slot.write(before) };
    msrs.iter().for_each(|(msr, value)| cpu::wrmsr(*msr, *value));
    cpu::set_cr0(cr0);
}

/// Puts code where the setting wants it, and draws registers.
fn prepare(lab: &mut Lab, code: &[u8], touched: bool, setting: Setting) -> Start {
    use Setting::*;
    // An exit of another guest may have taken it away.
    cpu::set_cr0(cpu::cr0() | cpu::CR0_AM);
    let wide = !matches!(setting, Compatibility | CompatibilityEdge);
    let prefix = match setting {
        Shadow => SHADOW,
        SteppedShadow => STEPPED_SHADOW,
        _ => &[],
    };
    let end = match setting {
        CanonicalEdge => END,
        CompatibilityEdge => FOUR_GIB,
        _ => lab.pages[CODE] + PAGE / 2,
    };
    let length = (prefix.len() + code.len()) as u64;
    let at = lab.pages[CODE] + (end - 1) % PAGE + 1 - length;
    let drawn = lab.random.next() as u8;
    let bytes = prefix.iter().chain(code).copied().chain([INT3]);
    let room = if matches!(setting, CanonicalEdge | CompatibilityEdge) { length } else { length + 1 };
    for (address, byte) in (at..at + room).zip(bytes) {
        let byte = if code[0] == 0xCD && address + 1 == at + length { drawn } else { byte };
        // SAFETY: the lab's page.
        unsafe { (address as *mut u8).write_volatile(byte) };
    }
    place::put(lab.pages[ZERO], 0, u64::MAX / 0xFF * u64::from(INT3));
    let own = lab.pages[DATA] + 0x100 + lab.random.below(16);
    let inside = lab.random.pick(&Place::INSIDE).page(lab.random.next()) + lab.random.below(16);
    let nowhere = [END - 8 + lab.random.below(8), 1 << 63, FOUR_GIB + PAGE];
    let rdi = match (touched, wide) {
        (false, _) if lab.random.one_in(2) => inside,
        (_, true) if lab.random.one_in(2) => lab.random.pick(&nowhere),
        _ => own,
    };
    let leaf = lab.random.below(16);
    let [rcx, rdx, rsi] = [(); 3].map(|()| lab.random.next());
    Start {
        ss: USER_DATA.into(),
        rsp: lab.pages[STACK] + PAGE / 2,
        rflags: 2 | if setting == Stepped { TF | RF } else { 0 } | if lab.random.one_in(2) { AC } else { 0 },
        cs: if wide { USER_CODE.into() } else { u64::from(KERNEL_CODE32) | 3 },
        rip: end - length,
        rax: lab.random.pick(&[leaf, 0x4000_0000 + leaf, 0x8000_0000 + leaf, rcx ^ rsi]),
        rcx: lab.random.pick(&[0, 0x480 + leaf, 0xC000_0080 + leaf, rcx]),
        rdx,
        rsi: lab.random.pick(&[leaf, 0x6800 + 2 * leaf, 0x4000 + 2 * leaf, rsi]),
        rdi,
    }
}

/// The MSRs of SYSENTER, and where a VMCS has them
const SYSENTER_MSRS: [(u32, u32); 3] =
    [(0x174, f::GUEST_SYSENTER_CS), (0x175, f::GUEST_SYSENTER_ESP), (0x176, f::GUEST_SYSENTER_EIP)];

/// Sets the MSRs of SYSENTER to odd values, L3's with the rest of its state; where it leads there is INT3, or nothing.
fn sysenter(lab: &mut Lab, level: u32) {
    let (stack, code) = (lab.pages[STACK] + PAGE - lab.random.below(64), lab.pages[ZERO]);
    let (any, all) = (lab.random.next() & 0xFFFF, lab.random.one_in(2));
    let selector = lab.random.pick(&[0, 3, any]);
    let target = lab.random.pick(&[code, END - PAGE / 2, FOUR_GIB + PAGE]);
    if level == 3 {
        lab.with(controls(all));
        vmx::write(f::EXCEPTION_BITMAP, if lab.random.one_in(3) { 0xFFFF_FFFF } else { 0 });
    }
    for ((msr, field), value) in SYSENTER_MSRS.into_iter().zip([selector, stack, target]) {
        if level == 3 { vmx::write(field, value) } else { cpu::wrmsr(msr, value) }
    }
}

/// What L2 may intercept of what ring 3 does, or nothing.
fn controls(all: bool) -> Extra {
    let primary =
        [p::HLT, p::INVLPG, p::RDPMC, p::RDTSC, p::MOV_DR, p::UNCONDITIONAL_IO, p::PAUSE, p::MONITOR, p::MWAIT];
    let secondary = [s::DESCRIPTOR_TABLES, s::WBINVD];
    let sum = |kind, bits: &[u32]| bits.iter().filter(|b| all && setup::allowed_one(kind, **b)).sum();
    Extra { primary: sum(Kind::Primary, &primary), secondary: sum(Kind::Secondary, &secondary), ..Extra::default() }
}

/// Ring 3 of a level until it traps; what happened goes to `text`. False if that is not what can happen.
fn run(lab: &mut Lab, level: u32, start: Start, to_ring0: bool, text: &mut Text) -> bool {
    const MOST_EXITS: u32 = 4;
    let place = lab.pages[START] as *mut Start;
    // SAFETY: the lab's page.
    unsafe { place.write_volatile(start) };
    ENDED.set(None);
    if level == 2 {
        lab.bracket();
        ring3(place as u64);
        lab.bracket();
    } else {
        lab.guest.start(ring3, place as u64);
        let mut catch = 0;
        for exits in 0.. {
            let own = trap::swap_catch(catch);
            let exit = lab.run();
            catch = trap::swap_catch(own);
            match exit {
                Exit::Done(_) => break,
                Exit::Reason(r::EXCEPTION_OR_NMI) => {
                    let _ = write!(text, "v{:x} ", vmx::read(f::EXIT_INTERRUPTION_INFO) & 0xFFF);
                    return true;
                }
                Exit::Reason(reason) if exits < MOST_EXITS => {
                    let _ = write!(text, "x{reason},");
                    skip(lab);
                }
                exit => {
                    let _ = write!(text, "{exit} ");
                    return false;
                }
            }
        }
    }
    let Some(trap) = ENDED.get() else {
        let _ = write!(text, "none ");
        return false;
    };
    let _ = write!(text, "{}.{:x}@{:x} ", trap.vector, trap.error, trap.rip.wrapping_sub(start.rip) & 0xFFFF);
    to_ring0 || trap.cs & 3 == 3
}

/// Ring 3 switches EPTs by a list there, by entries that it has and has not, and calls functions that there are not.
fn functions(lab: &mut Lab, place: Place) -> Seen {
    const VMFUNC: &[u8] = &[0x0F, 0x01, 0xD4];
    let (mut text, mut escape) = (Text::new(), false);
    let page = place.page(lab.random.next());
    place::fill(page);
    for (function, entry) in [(0, 0), (0, 511), (0, 512), (0, u64::from(u32::MAX)), (1, 0), (63, 1), (64, 0)] {
        let mut start = prepare(lab, VMFUNC, false, Setting::Plain);
        (start.rax, start.rcx) = (function, entry);
        lab.with(Extra { secondary: s::VM_FUNCTIONS, ..Extra::default() });
        vmx::write(f::VM_FUNCTION_CONTROLS, 1);
        vmx::write(f::EPTP_LIST, page);
        escape |= !run(lab, 3, start, false, &mut text);
    }
    log!("  {text}");
    let digest = text.bytes().fold(0u32, |sum, byte| sum.rotate_left(5) ^ u32::from(byte));
    Seen::of(format_args!("{digest:#x}")).escaped_if(escape)
}

/// A load, and where it is not aligned.
const LOAD: &[u8] = &[0x48, 0x8B, 0x07];
/// Alignment checks of a loop.
const AGAIN: u64 = 64;
static CHECKS: Global<u64> = Global::new(0);

fn misaligned(lab: &mut Lab) -> Start {
    let mut start = prepare(lab, LOAD, true, Setting::Plain);
    (start.rflags, start.rdi) = (2 | AC, lab.pages[DATA] + 1);
    start
}

/// Alignment checks that come back to what faulted.
fn alignment(lab: &mut Lab) {
    lab.attack(format_args!("ring 3 of L2: a loop of #AC"), Told::Same, |lab| {
        let start = misaligned(lab);
        CHECKS.set(0);
        let before = trap::hook(
            AC_VECTOR,
            Some(|frame| {
                CHECKS.set(CHECKS.get() + 1);
                if CHECKS.get() == AGAIN {
                    frame.rflags &= !AC;
                }
                true
            }),
        );
        let mut text = Text::new();
        let escape = !run(lab, 2, start, false, &mut text);
        trap::hook(AC_VECTOR, before);
        Seen::of(format_args!("{text}{}", CHECKS.get())).escaped_if(escape)
    });
    lab.attack(format_args!("ring 3 of L3: a storm of #AC"), Told::Same, |lab| {
        let start = misaligned(lab);
        lab.with(Extra::default());
        vmx::write(f::EXCEPTION_BITMAP, 1 << AC_VECTOR);
        begin(lab, start);
        let mut catch = 0;
        let exits = (0..AGAIN).filter(|_| {
            resume(lab, &mut catch) == Exit::Reason(r::EXCEPTION_OR_NMI)
                && vmx::read(f::EXIT_INTERRUPTION_INFO) & 0xFF == u64::from(AC_VECTOR)
        });
        Seen::of(exits.count())
    });
    let timer = Extra { pin: pin::PREEMPTION_TIMER, ..Extra::default() };
    if setup::allowed_one(Kind::Pin, timer.pin) {
        lab.attack(format_args!("ring 3 of L3: an endless loop of #AC"), Told::Same, |lab| {
            let start = misaligned(lab);
            lab.with(timer);
            begin(lab, start);
            let before = trap::hook(AC_VECTOR, Some(|_| true));
            let mut catch = 0;
            let ended = (0..16).filter(|_| {
                let ticks = 400 + lab.random.below(400);
                vmx::write(f::PREEMPTION_TIMER, ticks);
                resume(lab, &mut catch) == Exit::Reason(r::PREEMPTION_TIMER)
            });
            let ended = ended.count();
            trap::hook(AC_VECTOR, before);
            Seen::of(ended)
        });
    }
}

/// L3 is to go to ring 3.
fn begin(lab: &mut Lab, start: Start) {
    let place = lab.pages[START] as *mut Start;
    // SAFETY: the lab's page.
    unsafe { place.write_volatile(start) };
    lab.guest.start(ring3, place as u64);
}

/// Enters L3, whose traps are caught for itself.
fn resume(lab: &mut Lab, catch: &mut u64) -> Exit {
    let own = trap::swap_catch(*catch);
    let exit = lab.run();
    *catch = trap::swap_catch(own);
    exit
}

/// Skips the instruction that exited, as a hypervisor must: RIP has 32 bits outside of 64-bit mode, and no event waits
/// for the next instruction any more.
fn skip(lab: &mut Lab) {
    const LONG: u64 = 1 << 13;
    lab.guest.skip();
    if vmx::read(f::GUEST_CS_AR) & LONG == 0 {
        vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) & (FOUR_GIB - 1));
    }
    vmx::write(f::GUEST_INTERRUPTIBILITY, 0);
}

/// What nvmx says of itself is all that ring 3 gets: nothing of what others do.
fn leaves(lab: &mut Lab) -> Seen {
    let mut open = 0;
    for leaf in LEAF_SIGNATURE..=LEAF_MAX + 2 {
        for _ in 0..8 {
            let mut start = prepare(lab, CPUID_STORED, true, Setting::Plain);
            let (subleaf, any) = (lab.random.below(0x400), lab.random.next());
            start.rflags = 2;
            start.rdi = lab.pages[DATA];
            start.rax = leaf.into();
            start.rcx = lab.random.pick(&[subleaf, subleaf & 3, any, u32::MAX.into()]);
            run(lab, 2, start, false, &mut Text::new());
            let words = lab.words(DATA);
            open += u32::from(words[..2] != [0; 2] && !matches!(leaf, LEAF_SIGNATURE | LEAF_INTERFACE));
        }
    }
    Seen::of(open).escaped_if(open != 0 && Slot::find() == Slot::Nvmx)
}
