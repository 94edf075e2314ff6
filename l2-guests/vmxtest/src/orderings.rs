//! Every ordering of events around an entry: what is pending or injected, what exits, and the state that the guest is entered
//! in. The order in which they come is recorded, by the handlers of guest and hypervisor and at each exit; none may be lost
//! or come twice.
//!
//! Sources: SDM "Priority Among Concurrent Events", "Event Injection", "Other Causes of VM Exits", "Monitor Trap Flag",
//! "VMX-Preemption Timer", "Delivery of Pending Debug Exceptions after VM Entry".
//!
//! Left out, because Bochs departs from the SDM: pending debug exceptions beside an injected event (dropped).

use crate::guest::{Exit, Guest, Program};
use core::{arch::global_asm, fmt::Write};
use l2_kit::{
    Check, Global, apic,
    arrayvec::ArrayString,
    cpu, descriptors,
    ept::rights,
    fields as f,
    pages::{self, PAGE},
    serial::Serial,
    setup::{Controls, Kind, Missing, allowed_one, pin, primary, secondary},
    trap::{self, Frame},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
const IF: u64 = 1 << 9;
const TF: u64 = 1 << 8;
const PENDING_STEP: u64 = 1 << 14;
const BLOCKED_BY_STI: u64 = 1;
const BLOCKED_BY_MOV_SS: u64 = 2;
const BLOCKED_BY_NMI: u64 = 8;
/// The interrupt that is pending, and the one that is injected.
const PENDING: u8 = 0x61;
const INJECTED: u8 = 0x60;
const SOFTWARE: u8 = 0x62;
/// Longer than any case: it ends one that would wait for ever.
const LONG: u64 = 0x4_0000;
const TRAP_FLAG_EXIT: u32 = 37;
/// FS.base of the guest tells whose handler runs.
const GUEST_FS: u64 = 0x1234_5000;
/// More exits than any case has.
const EXITS: usize = 12;

global_asm!(
    ".pushsection .text.vmxtest_orderings, \"ax\"",
    "vmxtest_orderings:",
    ".fill 12, 1, 0x90",
    "mov eax, 5",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    safe fn vmxtest_orderings(_: u64) -> u64;
}

extern "C" fn program(argument: u64) -> u64 {
    vmxtest_orderings(argument)
}

/// What came, in order, as text; and how often each kind.
#[derive(Clone, Copy)]
struct Log {
    text: ArrayString<320>,
    /// Interrupts pending, NMIs, single steps, interrupts injected, other events injected
    counts: [u32; 5],
}

const EMPTY: Log = Log { text: ArrayString::new_const(), counts: [0; 5] };

static LOG: Global<Log> = Global::new(EMPTY);

fn log(vector: Option<u8>, text: core::fmt::Arguments<'_>) {
    let mut log = LOG.get();
    let separator = if log.text.is_empty() { "" } else { " " };
    let _ = write!(log.text, "{separator}{text}");
    let kind = match vector {
        Some(PENDING) => Some(0),
        Some(trap::NMI) => Some(1),
        Some(trap::DB) => Some(2),
        Some(INJECTED) => Some(3),
        Some(_) => Some(4),
        None => None,
    };
    if let Some(count) = kind.and_then(|kind: usize| log.counts.get_mut(kind)) {
        *count += 1;
    }
    LOG.set(log);
}

/// Where in the program, or `h` in a handler.
struct At(u64);

impl core::fmt::Display for At {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0.checked_sub(vmxtest_orderings as *const () as u64) {
            Some(offset) if offset < 0x20 => write!(f, "{offset}"),
            _ => f.write_str("h"),
        }
    }
}

/// The handler of all vectors, in the guest and in the hypervisor.
fn note(frame: &mut Frame) -> bool {
    let vector = frame.vector as u8;
    match (cpu::rdmsr(cpu::FS_BASE) == GUEST_FS, vector) {
        // The hypervisor's own way to an IRET
        (false, trap::BP) => {}
        (false, _) => log(Some(vector), format_args!("L2:{vector:x}")),
        (true, _) => log(Some(vector), format_args!("L3:{vector:x}@{}", At(frame.rip))),
    }
    if vector == trap::DB {
        frame.rflags &= !TF;
    }
    true
}

/// What waits when the guest is entered.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pending {
    interrupt: bool,
    nmi: bool,
}

/// What the hypervisor wants to see.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Wants {
    name: &'static str,
    pin: u32,
    primary: u32,
    timer: u64,
}

/// How the guest is entered.
#[derive(Clone, Copy)]
struct State {
    name: &'static str,
    rflags: u64,
    blocked: u64,
    pending: u64,
    halted: bool,
}

/// What is injected.
#[derive(Clone, Copy)]
struct Injected {
    name: &'static str,
    info: u64,
    error: u64,
    length: u64,
    rflags: u64,
}

const PENDINGS: [(&str, Pending); 4] = [
    ("nothing", Pending { interrupt: false, nmi: false }),
    ("interrupt", Pending { interrupt: true, nmi: false }),
    ("NMI", Pending { interrupt: false, nmi: true }),
    ("interrupt and NMI", Pending { interrupt: true, nmi: true }),
];

const EXITING: u32 = pin::EXTERNAL_INTERRUPT | pin::NMI;
const WINDOWS: u32 = primary::INTERRUPT_WINDOW | primary::NMI_WINDOW;

const WANTS: [Wants; 8] = [
    Wants { name: "own", pin: 0, primary: 0, timer: LONG },
    Wants { name: "exiting", pin: EXITING, primary: 0, timer: LONG },
    Wants { name: "exiting, timer", pin: EXITING, primary: 0, timer: 0 },
    Wants { name: "exiting, windows", pin: EXITING | pin::VIRTUAL_NMI, primary: WINDOWS, timer: LONG },
    Wants { name: "exiting, interrupt window", pin: EXITING, primary: primary::INTERRUPT_WINDOW, timer: LONG },
    Wants { name: "exiting, windows, timer", pin: EXITING | pin::VIRTUAL_NMI, primary: WINDOWS, timer: 0 },
    Wants { name: "own, steps", pin: 0, primary: primary::TRAP_FLAG, timer: LONG },
    Wants { name: "exiting, steps, timer", pin: EXITING, primary: primary::TRAP_FLAG, timer: 0 },
];

const PLAIN: State = State { name: "plain", rflags: IF, blocked: 0, pending: 0, halted: false };

const STATES: [State; 7] = [
    PLAIN,
    State { name: "if0", rflags: 0, ..PLAIN },
    State { name: "sti", blocked: BLOCKED_BY_STI, ..PLAIN },
    State { name: "mov_ss", blocked: BLOCKED_BY_MOV_SS, ..PLAIN },
    State { name: "nmi_blocked", blocked: BLOCKED_BY_NMI, ..PLAIN },
    State { name: "step", rflags: IF | TF, pending: PENDING_STEP, ..PLAIN },
    State { name: "halted", halted: true, ..PLAIN },
];

const INJECTIONS: [Injected; 8] = [
    Injected { name: "interrupt", info: INJECTED as u64, error: 0, length: 0, rflags: IF },
    Injected { name: "nmi", info: 2 << 8 | 2, error: 0, length: 0, rflags: IF },
    Injected { name: "gp", info: 1 << 11 | 3 << 8 | 13, error: 0x18, length: 0, rflags: IF },
    Injected { name: "de", info: 3 << 8, error: 0, length: 0, rflags: 0 },
    Injected { name: "int_n", info: 4 << 8 | SOFTWARE as u64, error: 0, length: 2, rflags: IF },
    Injected { name: "int1", info: 5 << 8 | 1, error: 0, length: 1, rflags: IF },
    Injected { name: "int3", info: 6 << 8 | 3, error: 0, length: 1, rflags: IF },
    Injected { name: "mtf", info: 7 << 8, error: 0, length: 0, rflags: IF },
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let needed = [
        (Kind::Pin, EXITING | pin::VIRTUAL_NMI | pin::PREEMPTION_TIMER),
        (Kind::Primary, WINDOWS | primary::TRAP_FLAG),
    ];
    if !needed.into_iter().all(|(kind, bits)| allowed_one(kind, bits)) {
        Check::new(&mut Serial, "orderings").fact("offered", false).end();
        return Ok(());
    }
    vmx::write(f::GUEST_TR_BASE, own_stacks());
    vmx::write(f::GUEST_FS_BASE, GUEST_FS);
    const VECTORS: [u8; 8] = [0, trap::DB, trap::NMI, trap::BP, trap::GP, INJECTED, PENDING, SOFTWARE];
    let before = VECTORS.map(|vector| trap::hook(vector, Some(note)));
    for (pending_name, pending) in PENDINGS {
        for wants in WANTS {
            for state in STATES {
                let (wanted, blocked) = (wants.name, state.name);
                one(
                    &mut guest,
                    format_args!("ordering {pending_name}; {wanted}; {blocked}"),
                    pending,
                    wants,
                    state,
                    None,
                );
            }
        }
        for wants in WANTS.into_iter().filter(|wants| wants.primary & primary::NMI_WINDOW == 0 || wants.timer != 0) {
            for injected in INJECTIONS {
                let state = State { rflags: injected.rflags, ..PLAIN };
                let (wanted, event) = (wants.name, injected.name);
                one(
                    &mut guest,
                    format_args!("ordering {pending_name}; {wanted}; inject {event}"),
                    pending,
                    wants,
                    state,
                    Some(injected),
                );
            }
        }
    }
    for (vector, hook) in VECTORS.into_iter().zip(before) {
        trap::hook(vector, hook);
    }
    Ok(())
}

/// A TSS with interrupt stacks of the guest's own: its handler of an NMI may be left by an exit, and ours run before it goes
/// on.
fn own_stacks() -> u64 {
    const STACK: u64 = 16 << 10;
    const FIRST_IST: u64 = 36;
    let tss = pages::address(pages::page());
    // SAFETY: a new page, and the TSS of this image; nobody else reads or writes them meanwhile.
    unsafe {
        core::ptr::copy_nonoverlapping(
            descriptors::tss_base() as *const u8,
            tss as *mut u8,
            descriptors::TSS_LIMIT as usize + 1,
        );
        for number in 0..3 {
            let top = pages::take(STACK, PAGE) + STACK;
            ((tss + FIRST_IST + 8 * number) as *mut u64).write_unaligned(top);
        }
    }
    tss
}

extern "C" fn nmi_itself(_: u64) -> u64 {
    apic::send_self_nmi();
    for _ in 0..4 {
        core::hint::spin_loop();
    }
    5
}

/// An exit by an NMI leaves NMIs blocked for us, until an IRET.
fn block_nmis(guest: &mut Guest) -> bool {
    vmx::write(f::PIN_CONTROLS, vmx::read(f::PIN_CONTROLS) | u64::from(pin::NMI));
    guest.execute(nmi_itself, 5) == Exit::Reason(r::EXCEPTION_OR_NMI, 0)
}

fn unblock_nmis() {
    // SAFETY: the handler returns, by IRET.
    unsafe { core::arch::asm!("int3") };
}

/// Takes interrupts that are pending.
fn take_own() {
    // SAFETY: the handlers return.
    unsafe { core::arch::asm!("sti", "nop", "nop", "cli") };
    apic::eoi();
}

/// The page of the IDT is one that the guest's EPT has just changed: whoever composes tables finds it missing when the first
/// event is delivered.
fn make_cold(guest: &Guest) {
    static TURN: Global<bool> = Global::new(false);
    let Some(ept) = &guest.ept else { return };
    let turn = TURN.replace(!TURN.get());
    for page in [trap::idt_base(), trap::idt_base() + PAGE - 1].map(|at| at & !(PAGE - 1)) {
        ept.map(page, PAGE, if turn { rights::RWX } else { rights::R | rights::W });
    }
    let _ = vmx::invept(1, [ept.pointer(), 0]);
}

fn one(
    guest: &mut Guest,
    name: core::fmt::Arguments<'_>,
    pending: Pending,
    wants: Wants,
    state: State,
    injected: Option<Injected>,
) {
    let old = [f::PIN_CONTROLS, f::PRIMARY_CONTROLS].map(|field| (field, vmx::read(field)));
    let ready = !pending.nmi || block_nmis(guest);
    make_cold(guest);
    LOG.set(EMPTY);
    vmx::write(f::PIN_CONTROLS, old[0].1 | u64::from(wants.pin | pin::PREEMPTION_TIMER));
    vmx::write(f::PRIMARY_CONTROLS, old[1].1 | u64::from(wants.primary));
    vmx::write(f::PREEMPTION_TIMER, wants.timer);
    guest.start(program as Program, 5);
    vmx::write(f::GUEST_RIP, vmxtest_orderings as *const () as u64);
    vmx::write(f::GUEST_RFLAGS, 2 | state.rflags);
    vmx::write(f::GUEST_INTERRUPTIBILITY, state.blocked);
    vmx::write(f::GUEST_PENDING_DEBUG, state.pending);
    vmx::write(f::GUEST_ACTIVITY, u64::from(state.halted));
    if let Some(event) = injected {
        vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | event.info);
        vmx::write(f::ENTRY_EXCEPTION_ERROR, event.error);
        vmx::write(f::ENTRY_INSTRUCTION_LENGTH, event.length);
    }
    if pending.interrupt {
        apic::send_self(PENDING);
    }
    if pending.nmi {
        apic::send_self_nmi();
    }
    let first = drive(guest);
    for (field, value) in old {
        vmx::write(field, value);
    }
    // What is still pending is ours.
    unblock_nmis();
    take_own();
    report(name, ready, first, (pending, wants, state, injected));
}

/// Runs the guest to its end, as a hypervisor does, and logs; returns the first exit.
fn drive(guest: &mut Guest) -> u32 {
    let mut first = None;
    for _ in 0..EXITS {
        let exit = guest.run();
        let reason = match exit {
            Exit::Reason(reason, _) => reason,
            other => {
                log(None, format_args!("{other}"));
                return first.unwrap_or(r::VMCALL);
            }
        };
        first = first.or(Some(reason));
        let at = At(vmx::read(f::GUEST_RIP));
        let (blocked, info) = (vmx::read(f::GUEST_INTERRUPTIBILITY), vmx::read(f::EXIT_INTERRUPTION_INFO));
        let (debug, halted) = (vmx::read(f::GUEST_PENDING_DEBUG), vmx::read(f::GUEST_ACTIVITY));
        let vector = (reason == r::EXCEPTION_OR_NMI && info & VALID != 0).then_some(info as u8);
        log(vector, format_args!("x{reason}@{at}/{blocked:x}{debug:x}{halted}"));
        let off = |field: u32, bits: u32| vmx::write(field, vmx::read(field) & !u64::from(bits));
        match reason {
            r::EXCEPTION_OR_NMI => unblock_nmis(),
            r::EXTERNAL_INTERRUPT => take_own(),
            r::INTERRUPT_WINDOW => off(f::PRIMARY_CONTROLS, primary::INTERRUPT_WINDOW),
            r::NMI_WINDOW => off(f::PRIMARY_CONTROLS, primary::NMI_WINDOW),
            TRAP_FLAG_EXIT => off(f::PRIMARY_CONTROLS, primary::TRAP_FLAG),
            r::PREEMPTION_TIMER if vmx::read(f::PREEMPTION_TIMER) != LONG => vmx::write(f::PREEMPTION_TIMER, LONG),
            _ => break,
        }
    }
    first.unwrap_or(u32::MAX)
}

fn report(
    name: core::fmt::Arguments<'_>,
    ready: bool,
    first: u32,
    (pending, wants, state, injected): (Pending, Wants, State, Option<Injected>),
) {
    let log = LOG.get();
    let is = |vector: u8| injected.is_some_and(|event| event.info >> 8 & 7 != 7 && event.info as u8 == vector);
    let other =
        injected.is_some_and(|event| event.info >> 8 & 7 != 7) && !is(trap::NMI) && !is(trap::DB) && !is(INJECTED);
    let wanted = [
        u32::from(pending.interrupt),
        u32::from(pending.nmi) + u32::from(is(trap::NMI)),
        u32::from(state.pending != 0) + u32::from(is(trap::DB)),
        u32::from(is(INJECTED)),
        u32::from(other),
    ];
    let mut out = Serial;
    let mut check = Check::new(&mut out, name)
        .expect("ready", ready, true)
        .expect("each_came_once", log.counts == wanted, true)
        .fact("order", log.text.as_str());
    if let Some(reason) = sdm_first(pending, wants, state, injected) {
        check = check.expect("first", first, reason);
    }
    check.end();
}

/// The first exit by the priorities of the SDM, where nothing blocks, steps or is injected: timer, NMI window, NMI,
/// interrupt window, interrupt.
fn sdm_first(pending: Pending, wants: Wants, state: State, injected: Option<Injected>) -> Option<u32> {
    let plain = state.blocked == 0 && !state.halted && state.pending == 0 && injected.is_none();
    let on = |bit: u32| wants.primary & bit != 0;
    if !plain || wants.pin & EXITING == 0 || on(primary::TRAP_FLAG) {
        return None;
    }
    let interruptible = state.rflags & IF != 0;
    Some(if wants.timer == 0 {
        r::PREEMPTION_TIMER
    } else if on(primary::NMI_WINDOW) {
        r::NMI_WINDOW
    } else if pending.nmi {
        r::EXCEPTION_OR_NMI
    } else if on(primary::INTERRUPT_WINDOW) && interruptible {
        r::INTERRUPT_WINDOW
    } else if pending.interrupt {
        r::EXTERNAL_INTERRUPT
    } else {
        r::VMCALL
    })
}
