//! Counters of one CPU: a plain increment each. Exits by reason, the list of the last exits and nvmx's own time can be left out
//! (`measure=off`); the rest, VMX instructions among it, is always on.

use crate::vmx::exit::ExitReason;
use core::sync::atomic::{AtomicU64, Ordering};
use l2_protocol::abi::{Counter, EXITS_OF_L2, EXITS_OF_L3, REASONS};

const NAMED: usize = Counter::ALL.len();

/// Who ran before nvmx did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ran {
    /// L2
    Guest,
    /// L3
    Nested,
}

/// All counters, the snapshot that L2 reads, and the last exits for the epitaph.
pub struct Counters {
    live: Values,
    snapshot: Values,
    recent: [Recent; KEPT],
    next: u8,
    measures: bool,
    /// How often something was counted: for tests of what counting costs
    #[cfg(not(target_os = "none"))]
    updates: u64,
}

#[derive(Clone)]
struct Values {
    named: [u64; NAMED],
    guest_exits: [u64; REASONS],
    nested_exits: [u64; REASONS],
    /// What stands for several counts ([`Values::together`])
    exchanges: u64,
    exits: u64,
    reported_exits: u64,
    entries: u64,
}

/// VMWRITEs by which a usual exit loads L2's host state, if all its selectors are there: counted with the exit.
pub const WRITES_OF_EXIT: u64 = 43;
/// VMWRITEs besides of one that nvmx reports with an exit qualification of its own: counted with it.
pub const WRITES_OF_REPORT: u64 = 1;
/// VMREADs with which a usual entry begins: counted with it.
pub const READS_OF_ENTRY: u64 = 2;
/// Counters for which others stand ([`Values::together`]).
const TOGETHER: [Counter; 5] =
    [Counter::Vmclear, Counter::Vmptrld, Counter::Reflected, Counter::Vmwrite, Counter::Vmread];

/// How many of the last exits are told, and how many are kept: as many as places that a byte names, so that it comes round by itself.
const RECENT: u8 = 16;
const KEPT: usize = 1 << u8::BITS;

/// One of the last exits in one word: its basic reason, and [`BY_NESTED`].
type Recent = u32;

/// It was L3's.
const BY_NESTED: Recent = 1 << 16;
/// There was none.
const NO_EXIT: Recent = u32::MAX;

impl Values {
    const fn new() -> Self {
        Values {
            named: [0; NAMED],
            guest_exits: [0; REASONS],
            nested_exits: [0; REASONS],
            exchanges: 0,
            exits: 0,
            reported_exits: 0,
            entries: 0,
        }
    }

    /// What is to be added to a counter for what was counted together.
    const fn together(&self, counter: Counter) -> u64 {
        match counter {
            Counter::Vmclear | Counter::Vmptrld => self.exchanges,
            Counter::Reflected => self.exits.wrapping_add(self.reported_exits),
            Counter::Vmwrite => {
                let exits = self.together(Counter::Reflected).wrapping_mul(WRITES_OF_EXIT);
                exits.wrapping_add(self.reported_exits.wrapping_mul(WRITES_OF_REPORT))
            }
            Counter::Vmread => self.entries.wrapping_mul(READS_OF_ENTRY),
            _ => 0,
        }
    }

    /// What follows from the exits by reason, and from what was counted together.
    fn sum_up(&mut self) {
        for counter in TOGETHER {
            let value = self.together(counter);
            self.named[counter as usize] = self.named[counter as usize].wrapping_add(value);
        }
        (self.exchanges, self.exits, self.reported_exits, self.entries) = (0, 0, 0, 0);
        let [guest, nested] = [&self.guest_exits, &self.nested_exits].map(|exits| exits.iter().sum::<u64>());
        for (counter, sum) in
            [(Counter::ExitsL2, guest), (Counter::ExitsL3, nested), (Counter::HwExits, guest + nested)]
        {
            self.named[counter as usize] = sum;
        }
    }

    /// All, in the order of [`Totals`].
    fn all(&self) -> impl Iterator<Item = u64> + '_ {
        self.named.iter().chain(&self.guest_exits).chain(&self.nested_exits).copied()
    }

    fn get(&self, index: u32) -> Option<u64> {
        let at = |base: u32| index.checked_sub(base).map(|i| i as usize);
        self.named
            .get(index as usize)
            .or_else(|| at(EXITS_OF_L2).and_then(|i| self.guest_exits.get(i)))
            .or_else(|| at(EXITS_OF_L3).and_then(|i| self.nested_exits.get(i)))
            .copied()
    }
}

/// Sums over all CPUs: each adds what it has counted whenever it takes a snapshot, and at no other time.
pub struct Totals([AtomicU64; ALL]);

/// Counters of all kinds.
const ALL: usize = NAMED + 2 * REASONS;

impl Totals {
    /// All zero.
    pub const fn new() -> Self {
        Totals([const { AtomicU64::new(0) }; ALL])
    }

    /// A sum by the index of the CPUID interface.
    pub fn get(&self, index: u32) -> Option<u64> {
        let index = index as usize;
        let (guest, nested) = (EXITS_OF_L2 as usize, EXITS_OF_L3 as usize);
        let place = match index {
            _ if index < NAMED => index,
            _ if (guest..guest + REASONS).contains(&index) => NAMED + index - guest,
            _ if (nested..nested + REASONS).contains(&index) => NAMED + REASONS + index - nested,
            _ => return None,
        };
        self.0.get(place).map(|sum| sum.load(Ordering::Relaxed))
    }

    fn add(&self, since: &Values, now: &Values) {
        for ((sum, before), value) in self.0.iter().zip(since.all()).zip(now.all()) {
            sum.fetch_add(value.wrapping_sub(before), Ordering::Relaxed);
        }
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self::new()
    }
}

impl Counters {
    /// All zero.
    pub const fn new() -> Self {
        Counters {
            live: Values::new(),
            snapshot: Values::new(),
            recent: [NO_EXIT; KEPT],
            next: 0,
            measures: true,
            #[cfg(not(target_os = "none"))]
            updates: 0,
        }
    }

    /// The value now, of a counter that is no sum over exits.
    pub const fn get(&self, counter: Counter) -> u64 {
        self.live.named[counter as usize].wrapping_add(self.live.together(counter))
    }

    /// Counts a VMCLEAR and a VMPTRLD.
    #[inline(always)]
    pub fn exchange(&mut self) {
        self.note_update();
        self.live.exchanges += 1;
    }

    /// Counts a reflected exit by the usual way, with [`WRITES_OF_EXIT`].
    #[inline(always)]
    pub fn usual_exit(&mut self) {
        self.note_update();
        self.live.exits += 1;
    }

    /// Counts one that nvmx reports: with [`WRITES_OF_REPORT`] besides.
    #[inline(always)]
    pub fn reported_exit(&mut self) {
        self.note_update();
        self.live.reported_exits += 1;
    }

    /// Counts an entry by the usual way, which is [`READS_OF_ENTRY`].
    #[inline(always)]
    pub fn usual_entry(&mut self) {
        self.note_update();
        self.live.entries += 1;
    }

    /// Takes one back, which was counted with others and did not happen.
    #[inline(always)]
    pub fn take_back(&mut self, counter: Counter) {
        self.note_update();
        let value = &mut self.live.named[counter as usize];
        *value = value.wrapping_sub(1);
    }

    /// How often something was counted that always is: each time takes an instruction, or three.
    #[cfg(not(target_os = "none"))]
    pub const fn updates(&self) -> u64 {
        self.updates
    }

    #[inline(always)]
    fn note_update(&mut self) {
        #[cfg(not(target_os = "none"))]
        {
            self.updates += 1;
        }
    }

    /// Adds one.
    #[inline(always)]
    pub fn bump(&mut self, counter: Counter) {
        self.note_update();
        self.live.named[counter as usize] += 1;
    }

    /// Adds `count`.
    #[inline(always)]
    pub fn add(&mut self, counter: Counter, count: u64) {
        if count != 0 {
            self.note_update();
        }
        let value = &mut self.live.named[counter as usize];
        // What was taken back before may have come below 0.
        *value = value.wrapping_add(count);
    }

    /// Sets a counter that is kept elsewhere.
    #[inline(always)]
    pub fn set(&mut self, counter: Counter, value: u64) {
        self.live.named[counter as usize] = value;
    }

    /// Leaves out what is not always on.
    pub const fn leave_out(&mut self) {
        self.measures = false;
    }

    /// Nothing is left out.
    #[inline(always)]
    pub const fn measures(&self) -> bool {
        self.measures
    }

    /// Counts a hardware exit of L2 or L3, if that is not left out.
    #[inline(always)]
    pub fn exit(&mut self, ran: Ran, reason: ExitReason) {
        if !self.measures {
            return;
        }
        let slot = (reason.basic().0 as usize).min(REASONS - 1);
        match ran {
            Ran::Nested => self.live.nested_exits[slot] += 1,
            Ran::Guest => self.live.guest_exits[slot] += 1,
        }
        let by = if ran == Ran::Nested { BY_NESTED } else { 0 };
        self.recent[usize::from(self.next)] = Recent::from(reason.basic().0) | by;
        self.next = self.next.wrapping_add(1);
    }

    /// Takes back the count of the exit just counted: it was for reading the counters.
    pub fn forget_guest_exit(&mut self, reason: ExitReason) {
        let slot = (reason.basic().0 as usize).min(REASONS - 1);
        self.live.guest_exits[slot] -= u64::from(self.measures);
    }

    /// Copies the live values to the snapshot, and adds to the sums over all CPUs what came since the last one.
    pub fn take_snapshot(&mut self, totals: &Totals) {
        self.live.sum_up();
        totals.add(&self.snapshot, &self.live);
        self.snapshot = self.live.clone();
    }

    /// A value of the snapshot by the index of the CPUID interface.
    pub fn snapshot_value(&self, index: u32) -> Option<u64> {
        self.snapshot.get(index)
    }

    /// The last exits, oldest first: the reason, and who ran.
    pub fn recent(&self) -> impl Iterator<Item = (ExitReason, Ran)> + '_ {
        let last = (1..=RECENT).rev().map(|back| self.recent[usize::from(self.next.wrapping_sub(back))]);
        last.filter(|exit| *exit != NO_EXIT).map(|exit| {
            let ran = if exit & BY_NESTED == 0 { Ran::Guest } else { Ran::Nested };
            (ExitReason(exit & (BY_NESTED - 1)), ran)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_for_reading_counters_leaves_no_trace() {
        let mut c = Counters::new();
        let cpuid = ExitReason(10);
        c.exit(Ran::Nested, cpuid);
        c.exit(Ran::Guest, cpuid);
        c.forget_guest_exit(cpuid);
        c.take_snapshot(&Totals::new());
        assert_eq!(c.snapshot_value(Counter::HwExits as u32), Some(1));
        assert_eq!(c.snapshot_value(EXITS_OF_L3 + 10), Some(1));
        assert_eq!(c.snapshot_value(EXITS_OF_L2 + 10), Some(0));
        assert_eq!(c.snapshot_value(EXITS_OF_L3 + REASONS as u32), None);
    }

    #[test]
    fn exits_stand_for_the_writes_that_all_of_them_have() {
        let mut c = Counters::new();
        c.usual_exit();
        c.usual_exit();
        c.reported_exit();
        let read = |c: &Counters| [Counter::Reflected, Counter::Vmwrite].map(|counter| c.get(counter));
        assert_eq!(read(&c), [3, 3 * 43 + 1]);
        c.take_snapshot(&Totals::new());
        assert_eq!(read(&c), [3, 3 * 43 + 1]);
    }

    #[test]
    fn exchanges_and_what_is_taken_back_are_in_the_counters_that_are_read() {
        let mut c = Counters::new();
        let read = |c: &Counters| [Counter::Vmclear, Counter::Vmptrld, Counter::Vmwrite].map(|counter| c.get(counter));
        c.exchange();
        c.exchange();
        c.bump(Counter::Vmptrld);
        c.take_back(Counter::Vmwrite);
        c.add(Counter::Vmwrite, 42);
        assert_eq!(read(&c), [2, 3, 41]);
        let totals = Totals::new();
        for _ in 0..2 {
            c.take_snapshot(&totals);
            assert_eq!(read(&c), [2, 3, 41]);
            let told = [Counter::Vmclear, Counter::Vmptrld, Counter::Vmwrite].map(|counter| counter as u32);
            assert_eq!(told.map(|counter| c.snapshot_value(counter)), [Some(2), Some(3), Some(41)]);
            assert_eq!(told.map(|counter| totals.get(counter)), [Some(2), Some(3), Some(41)]);
        }
    }

    #[test]
    fn what_is_counted_together_is_told_apart() {
        let mut c = Counters::new();
        c.usual_exit();
        c.usual_exit();
        c.usual_entry();
        c.bump(Counter::Vmread);
        let list = [Counter::Reflected, Counter::Vmwrite, Counter::Vmread];
        let told = [2, 2 * WRITES_OF_EXIT, READS_OF_ENTRY + 1];
        assert_eq!(list.map(|counter| c.get(counter)), told);
        c.take_snapshot(&Totals::new());
        assert_eq!(list.map(|counter| c.snapshot_value(counter as u32)), told.map(Some));
        assert_eq!(list.map(|counter| c.get(counter)), told, "and stays so");
    }

    #[test]
    fn what_is_left_out_stays_zero_and_the_rest_counts() {
        let mut c = Counters::new();
        c.leave_out();
        let cpuid = ExitReason(10);
        c.exit(Ran::Nested, cpuid);
        c.exit(Ran::Guest, cpuid);
        c.forget_guest_exit(cpuid);
        c.bump(Counter::Vmread);
        c.take_snapshot(&Totals::new());
        for counter in Counter::ALL.iter().copied() {
            assert_eq!(c.snapshot_value(counter as u32), Some(u64::from(counter == Counter::Vmread)), "{counter:?}");
        }
        for index in [EXITS_OF_L2 + 10, EXITS_OF_L3 + 10] {
            assert_eq!(c.snapshot_value(index), Some(0));
        }
        assert_eq!(c.recent().count(), 0);
    }

    #[test]
    fn every_exit_is_counted_by_level_and_by_reason() {
        // Reasons beyond the last slot share it.
        let (mut c, known) = (Counters::new(), REASONS as u32 - 1);
        for reason in (0..=known + 5).chain([0xFFFF]) {
            c.exit(Ran::Nested, ExitReason(reason));
            c.exit(Ran::Nested, ExitReason(1 << 31 | reason));
            c.exit(Ran::Guest, ExitReason(reason));
        }
        c.take_snapshot(&Totals::new());
        for reason in 0..known {
            assert_eq!(c.snapshot_value(EXITS_OF_L3 + reason), Some(2), "{reason}");
            assert_eq!(c.snapshot_value(EXITS_OF_L2 + reason), Some(1), "{reason}");
        }
        assert_eq!(c.snapshot_value(EXITS_OF_L2 + known), Some(7));
        assert_eq!(c.snapshot_value(EXITS_OF_L3 + known), Some(14));
        let total = |named| c.snapshot_value(named as u32);
        assert_eq!(total(Counter::ExitsL2).zip(total(Counter::ExitsL3)), Some((86, 172)));
        assert_eq!(total(Counter::HwExits), Some(258));
    }

    #[test]
    fn an_index_is_a_counter_or_none() {
        let c = Counters::new();
        let exists = |index: u32| {
            (index as usize) < Counter::ALL.len()
                || (EXITS_OF_L2..EXITS_OF_L2 + REASONS as u32).contains(&index)
                || (EXITS_OF_L3..EXITS_OF_L3 + REASONS as u32).contains(&index)
        };
        for index in (0..0x1_0000).chain([u32::MAX - 1, u32::MAX]) {
            assert_eq!(c.snapshot_value(index).is_some(), exists(index), "{index:#x}");
        }
    }

    /// The counters that are no sums.
    fn kept() -> impl Iterator<Item = (usize, &'static Counter)> {
        let sums = [Counter::HwExits, Counter::ExitsL2, Counter::ExitsL3];
        Counter::ALL.iter().enumerate().filter(move |(_, counter)| !sums.contains(counter))
    }

    #[test]
    fn a_snapshot_stays_while_counting_goes_on() {
        let mut c = Counters::new();
        for (i, counter) in kept() {
            c.add(*counter, 10 + i as u64);
        }
        c.take_snapshot(&Totals::new());
        for (i, counter) in kept() {
            c.bump(*counter);
            assert_eq!(c.snapshot_value(*counter as u32), Some(10 + i as u64), "{counter:?}");
        }
        c.take_snapshot(&Totals::new());
        for (i, counter) in kept() {
            assert_eq!(c.snapshot_value(*counter as u32), Some(11 + i as u64), "{counter:?}");
        }
    }

    #[test]
    fn totals_are_the_sums_of_the_last_snapshots() {
        let (totals, mut cpus) = (Totals::new(), [Counters::new(), Counters::new(), Counters::new()]);
        for round in 1..=3u64 {
            for (i, c) in (1..).zip(cpus.iter_mut()) {
                c.add(Counter::Vmread, i * 10);
                c.set(Counter::L1Ticks, round * i);
                c.exit(Ran::Nested, ExitReason(10));
                c.take_snapshot(&totals);
                // Counted, but not yet told.
                c.bump(Counter::Vmwrite);
            }
            assert_eq!(totals.get(Counter::Vmread as u32), Some(round * 60));
            assert_eq!(totals.get(Counter::L1Ticks as u32), Some(round * 6));
            assert_eq!(totals.get(EXITS_OF_L3 + 10), Some(round * 3));
            assert_eq!(totals.get(EXITS_OF_L2 + 10), Some(0));
            assert_eq!(totals.get(Counter::Vmwrite as u32), Some((round - 1) * 3));
        }
        for index in (0..0x1000).chain([u32::MAX]) {
            assert_eq!(totals.get(index).is_some(), cpus[0].snapshot_value(index).is_some(), "{index:#x}");
        }
    }

    #[test]
    fn recent_exits_tell_whose_they_were() {
        let mut c = Counters::new();
        assert_eq!(c.recent().count(), 0);
        c.exit(Ran::Nested, ExitReason(10));
        c.exit(Ran::Guest, ExitReason(24));
        let seen: Vec<_> = c.recent().map(|(reason, ran)| (reason.basic().0, ran)).collect();
        assert_eq!(seen, [(10, Ran::Nested), (24, Ran::Guest)]);
    }

    #[test]
    fn recent_exits_come_oldest_first() {
        let mut c = Counters::new();
        for reason in 0..20 {
            c.exit(Ran::Guest, ExitReason(reason));
        }
        let first = c.recent().next().map(|(r, _)| r.basic().0);
        assert_eq!(first, Some(4));
        assert_eq!(c.recent().count(), RECENT.into());
    }
}
