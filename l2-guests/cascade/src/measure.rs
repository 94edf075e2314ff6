//! Brackets: ticks and nvmx's counters round a number of events.
//!
//! In the guest's brackets the clock runs from the hypervisor's last instructions before it enters the guest to its first
//! after the exit that ends the bracket, so that a bracket needs no RDTSC in the guest, which may exit. The bracket `empty`
//! of the same scope tells what that adds.

use crate::{
    events::{self, EMPTY, EVENTS, Event, HandledBy, WARM_UP, XSETBV},
    payload::{INTERRUPTS, UD2_LENGTH, VECTOR},
};
use l2_kit::{
    apic, cpu,
    identity::{Counters, Slot, counters},
    protocol::{Kind, Level, Record, abi::Counter},
    serial::Serial,
    trap::{self, Frame},
};

/// Ticks and counters of one stretch of time.
#[derive(Clone, Copy, Debug)]
pub struct Bracket {
    counted: bool,
    before: Counters,
    after: Counters,
    begin: u64,
    ticks: u64,
    exits: u64,
    samples: Samples,
}

/// The ticks of brackets of one event.
#[derive(Clone, Copy, Debug)]
struct Samples {
    ticks: [u64; events::MOST_BRACKETS],
    taken: usize,
}

impl Samples {
    const NONE: Self = Self { ticks: [0; events::MOST_BRACKETS], taken: 0 };

    fn add(&mut self, ticks: u64) {
        if let Some(place) = self.ticks.get_mut(self.taken) {
            *place = ticks;
            self.taken += 1;
        }
    }

    /// All of them, in order of size.
    fn sorted(&mut self) -> &[u64] {
        let taken = &mut self.ticks[..self.taken];
        taken.sort_unstable();
        taken
    }
}

/// The value below which so many in a hundred lie, of values in order of size.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last * percent + 50) / 100).copied().unwrap_or(0)
}

impl Bracket {
    /// A bracket that reads the counters if there are any.
    pub fn new(slot: Slot) -> Self {
        let zero = [0; Counter::ALL.len()];
        Self {
            counted: slot == Slot::Nvmx,
            before: zero,
            after: zero,
            begin: 0,
            ticks: 0,
            exits: 0,
            samples: Samples::NONE,
        }
    }

    /// The bracket begins when this returns.
    pub fn start(&mut self) {
        if self.counted {
            self.before = counters();
        }
        self.begin = cpu::rdtsc_fenced();
    }

    /// The bracket has ended when this is called; `exits` is how many the hypervisor saw.
    pub fn stop(&mut self, exits: u64) {
        self.ticks = cpu::rdtsc_fenced().wrapping_sub(self.begin);
        self.samples.add(self.ticks);
        if self.counted {
            self.after = counters();
        }
        self.exits = exits;
    }

    /// All brackets of an event of this image's own.
    fn around(&mut self, event: &Event) {
        for _ in 0..events::brackets() {
            (event.run)(WARM_UP);
            self.start();
            (event.run)(event.count());
            self.stop(0);
        }
    }
}

/// The record of an event, once all of its brackets are over. Of one bracket it has the ticks, of several their median.
fn write(name: &str, handled_by: &str, scope: &str, count: u64, bracket: &mut Bracket) {
    let mut samples = core::mem::replace(&mut bracket.samples, Samples::NONE);
    let sorted = samples.sorted();
    let mut out = Serial;
    let mut record = Record::new(&mut out, Level::L2, Kind::Event)
        .field("name", name)
        .field("handled_by", handled_by)
        .field("scope", scope)
        .field("count", count)
        .field("ticks", percentile(sorted, 50));
    if sorted.len() > 1 {
        record.add("brackets", &sorted.len());
        for (key, percent) in [("ticks_least", 0), ("ticks_p10", 10), ("ticks_p90", 90)] {
            record.add(key, &percentile(sorted, percent));
        }
    }
    if bracket.counted {
        for (counter, (after, before)) in Counter::ALL.iter().zip(bracket.after.iter().zip(bracket.before)) {
            record.add(counter.name(), &after.wrapping_sub(before));
        }
    }
    // Keys are constants and the serial line does not fail.
    let _ = record.end();
}

/// Prints the record of a guest's event, and how many exits its hypervisor saw, which must be the same everywhere.
pub fn print(bracket: &mut Bracket, event: usize) {
    let Event { name, handled_by, .. } = EVENTS[event];
    if bracket.samples.taken < events::brackets() {
        return;
    }
    let count = EVENTS[event].count();
    write(name, handled_by.word(), "l3", count, bracket);
    // The exit that ends the bracket is not the event's.
    crate::observe::exits(name, handled_by, count, bracket.exits - 1);
}

/// The loops of the events in this image's own ring 0, before there is any VMX.
pub fn native() {
    if cpu::cpuid(1, 0)[2] & 1 << 26 != 0 {
        cpu::set_cr4(cpu::cr4() | cpu::CR4_OSXSAVE);
    } else {
        events::leave_out(XSETBV);
    }
    trap::hook(trap::UD, Some(skip_undefined));
    trap::hook(VECTOR, Some(count_interrupt));
    for (number, event) in (0..).zip(EVENTS) {
        if event.native && events::possible(number) {
            let mut bracket = Bracket::new(Slot::Bare);
            bracket.around(event);
            write(event.name, event.handled_by.word(), "native", event.count(), &mut bracket);
        }
    }
    trap::hook(trap::UD, None);
    trap::hook(VECTOR, None);
}

fn skip_undefined(frame: &mut Frame) -> bool {
    frame.rip += UD2_LENGTH;
    true
}

fn count_interrupt(_: &mut Frame) -> bool {
    INTERRUPTS.set(INTERRUPTS.get() + 1);
    apic::eoi();
    true
}

/// CPUID by the hypervisor itself: under nvmx an exit that nvmx handles alone, elsewhere none or the machine's business.
pub fn own_exit(slot: Slot) {
    let cpuid = EVENTS.iter().find(|e| e.name == "cpuid");
    let empty = EVENTS.get(EMPTY).map(|e| (e.name, e.handled_by, e));
    for (name, handled_by, event) in empty.into_iter().chain(cpuid.map(|e| ("l2_cpuid", HandledBy::Nvmx, e))) {
        let mut bracket = Bracket::new(slot);
        bracket.around(event);
        write(name, handled_by.word(), "l2", event.count(), &mut bracket);
    }
}
