//! What an experiment prints: a row for each thing it measures.
//!
//! A row is an `event` record: ticks and nvmx's counters (of each nvmx, if they are stacked) over `count` events, and how many
//! exits of each reason the guest's own hypervisor saw. Those must be the same on every machine, so they are a `check` record
//! too. The row `empty` of the experiment `calibration` tells what a bracket itself costs.

use core::fmt;
use l2_kit::{
    BootInfo, Check, Global, cpu,
    identity::{self, Counters, counters_below},
    protocol::{Kind, Level, Record, abi::Counter},
    serial::Serial,
    setup::Missing,
    vmx::{self, Outcome},
};

/// Why an experiment ends early.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// The machine lacks this
    Missing(&'static str),
    /// ... or these controls
    Setup(Missing),
    /// VMLAUNCH or VMRESUME failed
    NotEntered(Outcome),
    /// Reason, qualification and RIP of an exit that the experiment does not know
    Unexpected(u32, u64, u64),
}

impl From<Missing> for Stop {
    fn from(missing: Missing) -> Self {
        Stop::Setup(missing)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Missing(what) => write!(f, "this machine has no {what}"),
            Stop::Setup(missing) => write!(f, "{missing}"),
            Stop::NotEntered(outcome) => write!(f, "the guest could not be entered: {outcome}"),
            Stop::Unexpected(reason, qualification, rip) => {
                write!(f, "unexpected exit: reason {reason:#x}, qualification {qualification:#x}, at {rip:#x}")
            }
        }
    }
}

/// Exit reasons with names of their own in records; others are `x_other`.
pub const REASONS: [(u32, &str); 18] = [
    (0, "x_exception"),
    (1, "x_interrupt"),
    (10, "x_cpuid"),
    (12, "x_hlt"),
    (14, "x_invlpg"),
    (16, "x_rdtsc"),
    (18, "x_vmcall"),
    (28, "x_cr"),
    (30, "x_io"),
    (31, "x_rdmsr"),
    (32, "x_wrmsr"),
    (46, "x_gdtr_idtr"),
    (47, "x_ldtr_tr"),
    (48, "x_ept_violation"),
    (52, "x_timer"),
    (54, "x_wbinvd"),
    (62, "x_pml_full"),
    (2, "x_triple_fault"),
];

/// Exits by reason; the last counts those without a name.
pub type Seen = [u64; REASONS.len() + 1];

/// Counts an exit.
#[inline]
pub fn count(seen: &mut Seen, reason: u32) {
    seen[REASONS.iter().position(|(number, _)| *number == reason).unwrap_or(REASONS.len())] += 1;
}

const STACK: usize = 4;
static DEPTH: Global<u32> = Global::new(0);
static EXPERIMENT: Global<&str> = Global::new("calibration");
static MOST: Global<u64> = Global::new(u64::MAX);

/// Reads the command line.
///
/// # Errors
/// What is wrong with it.
pub fn options(info: &BootInfo) -> Result<(), &'static str> {
    DEPTH.set(identity::depth().min(STACK as u32));
    match info.option("events").map(str::parse) {
        None => {}
        Some(Ok(most)) if most > 0 => MOST.set(most),
        Some(_) => return Err("events=: a number above 0 is expected"),
    }
    Ok(())
}

/// At most so many events, if the command line wants fewer.
pub fn events(count: u64) -> u64 {
    count.min(MOST.get())
}

/// Whether the command line limits events: what is below is slow.
pub fn limited() -> bool {
    MOST.get() != u64::MAX
}

/// The rows that follow are this experiment's.
pub fn begin(experiment: &'static str) {
    EXPERIMENT.set(experiment);
}

/// The experiment (or a part of it) cannot be done here.
pub fn missing(what: &str) {
    l2_kit::report::record(Kind::Event, &[("experiment", &EXPERIMENT.get()), ("missing", &what)]);
}

/// Ticks and counters of one stretch of time, and the exits in it.
#[derive(Clone, Copy)]
pub struct Bracket {
    before: [Counters; STACK],
    after: [Counters; STACK],
    begin: u64,
    /// Ticks from begin to end
    pub ticks: u64,
    /// Exits that the guest's hypervisor saw
    pub seen: Seen,
}

impl Bracket {
    /// One that has not begun.
    pub const fn new() -> Self {
        const ZERO: [Counters; STACK] = [[0; Counter::ALL.len()]; STACK];
        Self { before: ZERO, after: ZERO, begin: 0, ticks: 0, seen: [0; REASONS.len() + 1] }
    }

    /// It begins when this returns.
    pub fn start(&mut self) {
        self.seen = [0; REASONS.len() + 1];
        for (k, counters) in (0..DEPTH.get()).zip(self.before.iter_mut()) {
            *counters = counters_below(k);
        }
        self.begin = cpu::rdtsc();
    }

    /// It ended when this is called. The innermost nvmx's counters are read last, so that reading the others is in none.
    pub fn stop(&mut self) {
        self.ticks = cpu::rdtsc().wrapping_sub(self.begin);
        for k in 0..DEPTH.get() {
            self.after[k as usize] = counters_below(k);
        }
    }

    /// The sum of exits.
    pub fn exits(&self) -> u64 {
        self.seen.iter().sum()
    }
}

/// A fact beside the counts.
pub type Fact = (&'static str, u64);

/// Prints a row and its check.
pub fn row(name: &str, scope: &str, count: u64, bracket: &Bracket, facts: &[Fact]) {
    loose_row(name, scope, count, bracket, facts);
    let mut out = Serial;
    let mut check = Check::new(&mut out, format_args!("{} {name} {scope}", EXPERIMENT.get())).fact("count", count);
    for (key, value) in seen(bracket).chain(facts.iter().copied()) {
        check = check.fact(key, value);
    }
    check.end();
}

/// [`row`] without the check: its exits follow the clock, which runs on while the levels below work.
pub fn loose_row(name: &str, scope: &str, count: u64, bracket: &Bracket, facts: &[Fact]) {
    let mut out = Serial;
    let mut record = Record::new(&mut out, Level::L2, Kind::Event)
        .field("experiment", EXPERIMENT.get())
        .field("name", name)
        .field("scope", scope)
        .field("count", count)
        .field("begin", bracket.begin)
        .field("ticks", bracket.ticks)
        .field("exits", bracket.exits());
    for (key, value) in seen(bracket).chain(facts.iter().copied()) {
        record.add(key, &value);
    }
    for k in 0..DEPTH.get() as usize {
        for (i, counter) in Counter::ALL.iter().enumerate() {
            let mut key = l2_kit::arrayvec::ArrayString::<40>::new();
            // The innermost nvmx has the plain names.
            let _ = if k == 0 { Ok(()) } else { fmt::Write::write_fmt(&mut key, format_args!("below{k}_")) };
            let _ = key.try_push_str(counter.name());
            record.add(&key, &bracket.after[k][i].wrapping_sub(bracket.before[k][i]));
        }
    }
    // Keys are constants and the serial line does not fail.
    let _ = record.end();
}

fn seen(bracket: &Bracket) -> impl Iterator<Item = (&'static str, u64)> {
    let names = REASONS.iter().map(|(_, name)| *name).chain(["x_other"]);
    names.zip(bracket.seen).filter(|(_, count)| *count > 0)
}

/// Measures a loop of this image itself: without a hypervisor of ours.
pub fn native(name: &str, count: u64, program: fn(u64)) {
    let count = events(count);
    let mut bracket = Bracket::new();
    program(WARM_UP);
    bracket.start();
    program(count);
    bracket.stop();
    row(name, "native", count, &bracket, &[]);
}

/// How many events precede a bracket, so that caches and tables are filled.
pub const WARM_UP: u64 = 4;

/// The exit whose handler runs, as an error.
pub fn unexpected(reason: u32) -> Stop {
    use l2_kit::fields as f;
    Stop::Unexpected(reason, vmx::read(f::EXIT_QUALIFICATION), vmx::read(f::GUEST_RIP))
}
