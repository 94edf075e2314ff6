//! The events: what is counted, who handles it, how often.

use crate::payload::{self as p, Loop};
use l2_kit::{
    Global,
    pages::{LARGE, PAGE},
};

/// Which of the guests raises an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// Exits as rarely as it can
    Plain,
    /// RDTSC and writes of control registers exit
    Strict,
}

/// Whose job an event is when the guest of a hypervisor raises it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HandledBy {
    /// Nobody's: no exit to any hypervisor
    Hardware,
    /// The guest's hypervisor's
    L2,
    /// nvmx's, if it is there; else nobody's
    Nvmx,
}

impl HandledBy {
    /// The word in records.
    pub fn word(self) -> &'static str {
        match self {
            HandledBy::Hardware => "hardware",
            HandledBy::L2 => "L2",
            HandledBy::Nvmx => "nvmx",
        }
    }
}

/// A kind of event.
pub struct Event {
    /// Name in records
    pub name: &'static str,
    /// Who raises it
    pub who: Who,
    /// Who handles it
    pub handled_by: HandledBy,
    /// How many are in the bracket, if the command line does not ask for fewer
    count: u64,
    /// Whether the loop means something without a hypervisor
    pub native: bool,
    /// Raises the given number of them
    pub run: Loop,
}

/// At most so many events are in a bracket.
static MOST: Global<u64> = Global::new(u64::MAX);

/// Asks for at most so many events in a bracket: `events=` on the command line, for machines where each takes long.
pub fn limit(most: u64) {
    MOST.set(most);
}

/// At most so many brackets an event has.
pub const MOST_BRACKETS: usize = 99;

/// Brackets of each event.
static BRACKETS: Global<usize> = Global::new(1);

/// Asks for so many brackets of each event: `brackets=` on the command line, where the TSC counts time.
pub fn set_brackets(count: usize) {
    BRACKETS.set(count);
}

/// Brackets of each event.
pub fn brackets() -> usize {
    BRACKETS.get()
}

impl Event {
    /// How many are in the bracket.
    pub fn count(&self) -> u64 {
        // Those that take pages share what is set aside for them.
        let room = if self.count == PAGES { LARGE / PAGE / brackets() as u64 - WARM_UP } else { u64::MAX };
        self.count.min(MOST.get()).min(room)
    }
}

/// How many precede the bracket, so that caches and tables are filled.
pub const WARM_UP: u64 = 4;
const N: u64 = 1000;
/// Each takes a page of its own.
const PAGES: u64 = 256;

const fn event(name: &'static str, who: Who, handled_by: HandledBy, count: u64, native: bool, run: Loop) -> Event {
    Event { name, who, handled_by, count, native, run }
}

/// The bracket round nothing that tells what a bracket itself costs.
pub const EMPTY: usize = 0;
/// Its hypervisor arms the timer at the beginning of the bracket.
pub const TIMER: &str = "preemption_timer";
/// Needs the TPR shadow.
pub const MOV_CR8_SHADOWED: &str = "mov_cr8_shadowed";
/// Needs CR4.OSXSAVE.
pub const XSETBV: &str = "xsetbv";

use HandledBy::{Hardware, L2, Nvmx};
use Who::{Plain, Strict};

/// All events, in the order in which they run.
pub static EVENTS: &[Event] = &[
    event("empty", Plain, Hardware, 1, true, p::nothing),
    event("cpuid", Plain, L2, N, true, p::cpuid),
    event("vmcall", Plain, L2, N, false, p::vmcall),
    event("rdmsr", Plain, L2, N, true, p::rdmsr_intercepted),
    event("rdmsr_passed", Plain, Hardware, N, true, p::rdmsr_passed),
    event("wrmsr", Plain, L2, N, true, p::wrmsr_intercepted),
    event("wrmsr_passed", Plain, Hardware, N, true, p::wrmsr_passed),
    event("in", Plain, L2, N, true, p::in_intercepted),
    event("in_passed", Plain, Hardware, N, true, p::in_passed),
    event("out", Plain, L2, N, true, p::out_intercepted),
    event("out_passed", Plain, Hardware, N, true, p::out_passed),
    event("rdtsc", Strict, L2, N, true, p::rdtsc),
    event("rdtsc_passed", Plain, Hardware, N, true, p::rdtsc),
    event("hlt", Plain, L2, N, false, p::hlt),
    event("mov_cr3", Strict, L2, N, true, p::mov_cr3),
    event("mov_cr3_passed", Plain, Hardware, N, true, p::mov_cr3),
    event("mov_cr0", Strict, L2, N, true, p::mov_cr0),
    event("mov_cr4", Strict, L2, N, true, p::mov_cr4),
    event("mov_cr8", Strict, L2, N, true, p::mov_cr8),
    event(MOV_CR8_SHADOWED, Plain, Hardware, N, true, p::mov_cr8),
    event("exception", Plain, L2, N, true, p::undefined),
    event("ept_violation", Plain, L2, PAGES, false, p::touch_hole),
    event("ept_fill", Plain, Nvmx, PAGES, false, p::touch_fresh),
    event("invept", Plain, L2, PAGES, false, p::invept),
    event("interrupt", Plain, L2, N, true, p::interrupt),
    event(TIMER, Plain, L2, N, false, p::nothing),
    event(XSETBV, Plain, L2, N, true, p::xsetbv),
    event("invd", Plain, L2, N, false, p::invd),
    event("host_writes", Plain, L2, N, false, p::host_writes),
    event("control_writes", Plain, L2, N, false, p::control_writes),
    event("guest_switch", Plain, L2, N, false, p::take_turns),
];

/// Events that this CPU lacks, a bit each.
static IMPOSSIBLE: Global<u64> = Global::new(0);

/// Whether the event with this number can be raised here.
pub fn possible(number: u64) -> bool {
    IMPOSSIBLE.get() >> number & 1 == 0
}

/// Leaves out the event with this name.
pub fn leave_out(name: &str) {
    if let Some(number) = EVENTS.iter().position(|e| e.name == name) {
        IMPOSSIBLE.set(IMPOSSIBLE.get() | 1 << number);
    }
}
