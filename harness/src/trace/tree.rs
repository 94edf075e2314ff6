//! From records to trees: one exit of L3 with all that followed until L3 goes on.
//!
//! A processor has one hypervisor at the root; its guests run at levels above it. Which guest a VMCS runs follows from the order
//! in which a CPU first enters VMCSs: nvmx runs L2 before L2 can run anything. On each CPU, exits that wait for their guest to
//! go on lie on a stack. An entry into level `n` lets every exit of a level up to `n` go on, and what lies above them.

use super::log::{Counts, Facts, Record, What};
use super::why::{Fields, Why, why};
use nvmx::vmx::exit::{BasicReason, ExitReason};
use std::collections::BTreeMap;

/// What came after an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The log ends, or the guest is never entered again
    Open,
    /// The root hypervisor did it alone, and the same guest goes on
    Kept,
    /// The root hypervisor runs another guest of that level
    Switched,
    /// Handed to the guest hypervisor of this level, at its handler
    Reflected {
        /// Its level
        level: u8,
        /// Where it goes on
        rip: u64,
    },
    /// It was the guest hypervisor's VM entry: a guest of this level goes on
    Entered {
        /// Its level
        level: u8,
    },
}

/// One hardware exit. Its ticks are those of its own CPU: instructions, or cycles of the TSC. Points in time are the machine's.
#[derive(Clone, PartialEq, Debug)]
pub struct Exit {
    /// On which CPU
    pub cpu: u32,
    /// Level of the guest that was left
    pub level: u8,
    /// Its VMCS
    pub vmcs: u64,
    /// When
    pub tick: u64,
    /// What the processor says
    pub facts: Facts,
    /// Why it came
    pub why: Why,
    /// What followed
    pub next: Next,
    /// ... by the clock of its CPU
    began: u64,
    /// Ticks of the root hypervisor until it entered a guest
    pub root_ticks: u64,
    /// When it did
    pub entered: u64,
    /// VMX instructions of the root hypervisor until then
    pub root: Counts,
    /// Ticks of the guest hypervisors that handled it, without their own exits: level and ticks
    pub handlers: Vec<(u8, u64)>,
    /// VMREAD and VMWRITE of them that did not exit
    pub handler: Counts,
    /// When the guest went on
    pub until: Option<u64>,
    /// What it cost: ticks until then
    pub cost: Option<u64>,
    /// The exit that this one is a part of
    pub parent: Option<u32>,
    /// Its parts
    pub children: Vec<u32>,
}

impl Exit {
    /// Exit reason.
    pub fn reason(&self) -> ExitReason {
        ExitReason(self.facts.reason)
    }

    /// Ticks of all guest hypervisors that handled it, without their own exits.
    pub fn handler_ticks(&self) -> u64 {
        self.handlers.iter().map(|(_, ticks)| ticks).sum()
    }

    /// An entry of ept02 (or, on the bare machine, of L2's EPT) was filled for it.
    pub fn fill(&self) -> Option<u64> {
        let violation = self.reason() == ExitReason::exit(BasicReason::EPT_VIOLATION);
        (violation && self.next == Next::Kept).then_some(self.facts.address)
    }
}

/// A VMX instruction that failed with an error number.
#[derive(Clone, PartialEq, Debug)]
pub struct Failure {
    /// On which CPU
    pub cpu: u32,
    /// When
    pub tick: u64,
    /// VM-instruction error
    pub error: u32,
    /// Where
    pub rip: u64,
    /// Level of who executed it
    pub level: u8,
    /// The last exit before
    pub after: Option<u32>,
}

/// Who runs what on this machine.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Levels {
    /// Level of the hypervisor at the root: 1 for nvmx, 2 for a guest hypervisor that is alone on the machine
    pub root: u8,
    /// Its name
    pub name: String,
    /// Levels of the guests whose VMCSs a CPU enters first, second, ...; the last is that of all others
    pub guests: Vec<u8>,
}

impl Levels {
    /// What a level is called.
    pub fn name(&self, level: u8) -> String {
        if level == self.root { self.name.clone() } else { format!("L{level}") }
    }
}

/// What each CPU is at.
#[derive(Default)]
struct Cpu {
    /// VMCSs in the order in which they were first entered
    seen: Vec<u64>,
    /// Exits whose guests wait
    open: Vec<u32>,
    /// The last exit, if nothing was entered since
    fresh: Option<u32>,
    /// The guest that runs: its level and since when by the clock
    running: Option<(u8, u64)>,
    counts: Counts,
    last: Option<u32>,
    /// Instructions since its first record
    clock: u64,
    /// What it had executed at the last one, modulo 2^32
    executed: Option<u32>,
}

impl Cpu {
    /// Goes on to what it has executed now.
    fn advance(&mut self, executed: u32) {
        let before = self.executed.replace(executed).unwrap_or(executed);
        self.clock += u64::from(executed.wrapping_sub(before));
    }
}

/// Builds trees record by record.
pub struct Builder {
    levels: Levels,
    by_ticks: bool,
    cpus: BTreeMap<u32, Cpu>,
    fields: BTreeMap<u64, Fields>,
    /// All exits, in the order in which they came
    pub exits: Vec<Exit>,
    /// VMX instructions that failed
    pub failures: Vec<Failure>,
    /// Ticks at which each CPU's first guest was entered, and of the last record
    pub span: Option<(u64, u64)>,
}

impl Builder {
    /// For a machine with these levels.
    pub fn new(levels: Levels) -> Self {
        Builder {
            levels,
            by_ticks: false,
            cpus: BTreeMap::new(),
            fields: BTreeMap::new(),
            exits: Vec::new(),
            failures: Vec::new(),
            span: None,
        }
    }

    /// Costs are differences of the time: who recorded does not count what each CPU executes.
    pub fn by_ticks(self) -> Self {
        Builder { by_ticks: true, ..self }
    }

    /// All of a log.
    #[cfg(test)]
    pub fn of(levels: Levels, records: impl IntoIterator<Item = Record>) -> Self {
        Builder::new(levels).with(records)
    }

    /// Takes all these records.
    pub fn with(mut self, records: impl IntoIterator<Item = Record>) -> Self {
        records.into_iter().for_each(|record| self.add(&record));
        self
    }

    /// Who runs what.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// Takes one more record.
    pub fn add(&mut self, record: &Record) {
        let begin = self.span.map_or(record.tick, |(begin, _)| begin);
        self.span = Some((begin, record.tick.max(begin)));
        let cpu = self.cpus.entry(record.cpu).or_default();
        if self.by_ticks {
            cpu.clock = record.tick;
        } else {
            cpu.advance(record.executed);
        }
        match &record.what {
            What::Exit(facts) => self.exit(record, facts),
            What::Entry(facts) => self.entry(record, facts),
            What::Fail(facts) => self.fail(record, facts),
            What::Fields(list) => self.fields.entry(record.vmcs).or_default().extend(list.iter().copied()),
        }
    }

    /// Level of the guest that this VMCS runs on this CPU.
    fn level(&mut self, cpu: u32, vmcs: u64) -> u8 {
        let seen = &mut self.cpus.entry(cpu).or_default().seen;
        let rank = seen.iter().position(|known| *known == vmcs).unwrap_or_else(|| {
            seen.push(vmcs);
            seen.len() - 1
        });
        let last = self.levels.guests.last().copied().unwrap_or(self.levels.root + 1);
        self.levels.guests.get(rank).copied().unwrap_or(last)
    }

    fn exit(&mut self, record: &Record, facts: &Facts) {
        let level = self.level(record.cpu, record.vmcs);
        let (root, number) = (self.levels.root, self.exits.len() as u32);
        let none = Fields::new();
        let why = why(facts, self.fields.get(&record.vmcs).unwrap_or(&none), root, root);
        let cpu = self.cpus.entry(record.cpu).or_default();
        let parent = cpu.open.last().copied();
        if let (Some((ran, since)), Some(parent)) = (cpu.running.take(), parent) {
            if let Some(parent) = self.exits.get_mut(parent as usize) {
                let ticks = cpu.clock.saturating_sub(since);
                match parent.handlers.iter_mut().find(|(level, _)| *level == ran) {
                    Some((_, sum)) => *sum += ticks,
                    None => parent.handlers.push((ran, ticks)),
                }
                parent.handler = parent.handler.plus(facts.counts.since(cpu.counts));
            }
        }
        if let Some(parent) = parent.and_then(|parent| self.exits.get_mut(parent as usize)) {
            parent.children.push(number);
        }
        cpu.counts = facts.counts;
        cpu.open.push(number);
        (cpu.fresh, cpu.last) = (Some(number), Some(number));
        self.exits.push(Exit {
            cpu: record.cpu,
            level,
            vmcs: record.vmcs,
            tick: record.tick,
            facts: *facts,
            why,
            next: Next::Open,
            began: cpu.clock,
            root_ticks: 0,
            entered: record.tick,
            root: Counts::default(),
            handlers: Vec::new(),
            handler: Counts::default(),
            until: None,
            cost: None,
            parent,
            children: Vec::new(),
        });
    }

    fn entry(&mut self, record: &Record, facts: &Facts) {
        let level = self.level(record.cpu, record.vmcs);
        let root = self.levels.root;
        let none = Fields::new();
        let cpu = self.cpus.entry(record.cpu).or_default();
        if let Some(exit) = cpu.fresh.take().and_then(|fresh| self.exits.get_mut(fresh as usize)) {
            exit.root_ticks = cpu.clock.saturating_sub(exit.began);
            exit.entered = record.tick;
            exit.root = facts.counts.since(cpu.counts);
            exit.next = match level.cmp(&exit.level) {
                std::cmp::Ordering::Less => Next::Reflected { level, rip: facts.rip },
                std::cmp::Ordering::Equal if record.vmcs == exit.vmcs => Next::Kept,
                std::cmp::Ordering::Equal => Next::Switched,
                std::cmp::Ordering::Greater => Next::Entered { level },
            };
            // What a hypervisor gets to see it has asked for; the rest the root wants.
            let asker = if let Next::Reflected { level, .. } = exit.next { level } else { root };
            exit.why = why(&exit.facts, self.fields.get(&exit.vmcs).unwrap_or(&none), asker, root);
        }
        let from = cpu.open.iter().position(|&open| self.exits.get(open as usize).is_some_and(|e| e.level <= level));
        for done in cpu.open.drain(from.unwrap_or(cpu.open.len())..) {
            if let Some(exit) = self.exits.get_mut(done as usize) {
                exit.until = Some(record.tick);
                exit.cost = Some(cpu.clock.saturating_sub(exit.began));
            }
        }
        cpu.counts = facts.counts;
        cpu.running = Some((level, cpu.clock));
    }

    fn fail(&mut self, record: &Record, facts: &Facts) {
        let cpu = self.cpus.entry(record.cpu).or_default();
        let level = if facts.mode & 1 << 8 == 0 { self.levels.root } else { cpu.running.map_or(0, |(level, _)| level) };
        let (tick, after) = (record.tick, cpu.last);
        self.failures.push(Failure { cpu: record.cpu, tick, error: facts.reason, rip: facts.rip, level, after });
    }

    /// Exits that are no part of another.
    pub fn roots(&self) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.exits).filter(|(_, exit)| exit.parent.is_none()).map(|(number, _)| number)
    }

    /// The exit that this one is a part of, and is itself part of none.
    pub fn root_of(&self, number: u32) -> u32 {
        let mut at = number;
        while let Some(parent) = self.exits.get(at as usize).and_then(|exit| exit.parent) {
            at = parent;
        }
        at
    }

    /// The exits of a tree, each with its depth, in the order in which they came.
    pub fn tree(&self, root: u32) -> Vec<(usize, u32)> {
        let (mut list, mut stack) = (Vec::new(), vec![(0, root)]);
        while let Some((depth, number)) = stack.pop() {
            list.push((depth, number));
            let children = self.exits.get(number as usize).map(|exit| &exit.children);
            stack.extend(children.into_iter().flatten().rev().map(|child| (depth + 1, *child)));
        }
        list
    }

    /// When which guest hypervisor worked on an exit, between their own exits: level, from, to.
    pub fn handling(&self, exit: &Exit) -> Vec<(u8, u64, u64)> {
        let Next::Reflected { mut level, .. } = exit.next else { return Vec::new() };
        let mut at = exit.entered;
        let mut list = Vec::new();
        for child in exit.children.iter().filter_map(|child| self.exits.get(*child as usize)) {
            if child.tick > at {
                list.push((level, at, child.tick));
            }
            // It may have let the guest hypervisor above it go on.
            if let Next::Entered { level: next } = child.next {
                level = next;
            }
            at = child.until.unwrap_or(child.tick);
        }
        list
    }

    /// What the tree of an exit holds together.
    pub fn totals(&self, root: u32) -> Totals {
        let mut totals = Totals::default();
        for (_, number) in self.tree(root) {
            let Some(exit) = self.exits.get(number as usize) else { continue };
            totals.exits += 1;
            totals.root_ticks += exit.root_ticks;
            totals.handler_ticks += exit.handler_ticks();
            totals.root = totals.root.plus(exit.root);
            totals.handler = totals.handler.plus(exit.handler);
            totals.fills += u32::from(exit.fill().is_some());
        }
        totals
    }
}

/// Sums over a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Hardware exits
    pub exits: u32,
    /// Ticks of the root hypervisor
    pub root_ticks: u64,
    /// Ticks of guest hypervisors
    pub handler_ticks: u64,
    /// VMX instructions of the root hypervisor
    pub root: Counts,
    /// VMREAD and VMWRITE of guest hypervisors without an exit
    pub handler: Counts,
    /// Entries filled in ept02
    pub fills: u32,
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// nvmx at the root, L2 and L3.
    pub fn nested() -> Levels {
        Levels { root: 1, name: "nvmx".into(), guests: vec![2, 3] }
    }

    /// A record of an exit.
    pub fn exit(tick: u64, vmcs: u64, reason: BasicReason, vmread: u32) -> Record {
        let counts = Counts { vmread, ..Counts::default() };
        let facts = Facts { reason: reason.0.into(), counts, rip: 0x1000 + tick, ..Facts::default() };
        Record { tick, vmcs, cpu: 0, executed: tick as u32, what: What::Exit(facts) }
    }

    /// A record of an entry.
    pub fn entry(tick: u64, vmcs: u64, vmread: u32) -> Record {
        let counts = Counts { vmread, ..Counts::default() };
        Record {
            tick,
            vmcs,
            cpu: 0,
            executed: tick as u32,
            what: What::Entry(Facts { rip: 0x2000 + tick, counts, ..Facts::default() }),
        }
    }

    /// L3 executes CPUID: reflected, a trapped VMWRITE of L2, L2's VMRESUME, L3 goes on.
    pub fn cascade() -> Vec<Record> {
        use BasicReason as R;
        vec![
            entry(10, 1, 0),
            exit(20, 1, R::VMLAUNCH, 0),
            entry(30, 2, 5),
            exit(100, 2, R::CPUID, 5),
            entry(150, 1, 15),
            exit(180, 1, R::VMWRITE, 15),
            entry(190, 1, 16),
            exit(200, 1, R::VMRESUME, 16),
            entry(260, 2, 26),
            exit(300, 2, R::EPT_VIOLATION, 26),
            entry(320, 2, 27),
        ]
    }

    #[test]
    fn one_exit_of_l3_is_one_tree_with_all_that_followed() {
        let built = Builder::of(nested(), cascade());
        assert_eq!(built.roots().collect::<Vec<_>>(), [0, 1, 4]);
        let tree = &built.exits[1];
        assert_eq!((tree.level, tree.cost), (3, Some(160)));
        assert_eq!(tree.next, Next::Reflected { level: 2, rip: 0x2000 + 150 });
        assert_eq!((tree.root_ticks, tree.root.vmread, tree.handler_ticks()), (50, 10, 40));
        assert_eq!(built.handling(tree), [(2, 150, 180), (2, 190, 200)]);
        assert_eq!(tree.children, [2, 3]);
        assert_eq!((built.exits[2].next, built.exits[2].cost), (Next::Kept, Some(10)));
        assert_eq!((built.exits[3].next, built.exits[3].cost), (Next::Entered { level: 3 }, Some(60)));
        let totals = built.totals(1);
        assert_eq!((totals.exits, totals.root_ticks, totals.handler_ticks, totals.root.vmread), (3, 120, 40, 21));
        assert_eq!(built.tree(1), [(0, 1), (1, 2), (1, 3)]);
        assert_eq!(built.root_of(3), 1);
    }

    #[test]
    fn a_violation_that_nvmx_keeps_is_a_fill_and_nvmx_asked_for_it() {
        let built = Builder::of(nested(), cascade());
        let violation = &built.exits[4];
        assert_eq!((violation.fill(), violation.next), (Some(0), Next::Kept));
        assert_eq!(violation.why.asked, super::super::why::Asked::Level(1));
        assert_eq!(built.exits[1].fill(), None);
    }

    #[test]
    fn costs_are_what_the_cpu_itself_executed_and_of_a_ring_the_time() {
        let at = |record: Record, executed| Record { executed, ..record };
        // Another CPU makes time pass too, and the count begins anew.
        let records = || {
            cascade().into_iter().map(|record| {
                let executed = (u32::MAX - 120).wrapping_add(2 * record.tick as u32);
                at(record, executed)
            })
        };
        let exact = Builder::of(nested(), records());
        let tree = &exact.exits[1];
        assert_eq!((tree.cost, tree.root_ticks, tree.handler_ticks()), (Some(320), 100, 80));
        assert_eq!((tree.tick, tree.entered, tree.until), (100, 150, Some(260)));
        assert_eq!(exact.handling(tree), [(2, 150, 180), (2, 190, 200)]);
        let ring = Builder::new(nested()).by_ticks().with(records());
        assert_eq!((ring.exits[1].cost, ring.exits[1].root_ticks, ring.exits[1].handler_ticks()), (Some(160), 50, 40));
    }

    #[test]
    fn alone_on_the_machine_each_exit_is_a_tree_of_its_own() {
        let bare = Levels { root: 2, name: "L2".into(), guests: vec![3] };
        use BasicReason as R;
        let built =
            Builder::of(bare, [entry(1, 7, 0), exit(5, 7, R::CPUID, 0), entry(9, 8, 4), exit(12, 8, R::HLT, 4)]);
        assert_eq!((built.exits[0].level, built.exits[0].next, built.exits[0].cost), (3, Next::Switched, Some(4)));
        assert_eq!((built.exits[1].next, built.exits[1].cost), (Next::Open, None));
    }

    #[test]
    fn nvmx_in_nvmx_keeps_the_exit_of_the_innermost_guest_open_over_all_levels() {
        use BasicReason as R;
        let twice = Levels { root: 1, name: "nvmx".into(), guests: vec![2, 3, 4] };
        // L4 exits, the inner nvmx (L2) enters L3, whose VMRESUME goes by the inner nvmx again.
        let built = Builder::of(
            twice,
            [
                entry(1, 1, 0),
                exit(2, 1, R::VMLAUNCH, 0),
                entry(3, 2, 0),
                exit(4, 2, R::VMLAUNCH, 0),
                entry(5, 1, 0),
                exit(6, 1, R::VMRESUME, 0),
                entry(7, 3, 0),
                exit(10, 3, R::CPUID, 0),
                entry(11, 1, 0),
                exit(12, 1, R::VMRESUME, 0),
                entry(13, 2, 0),
                exit(14, 2, R::VMRESUME, 0),
                entry(15, 1, 0),
                exit(16, 1, R::VMRESUME, 0),
                entry(17, 3, 0),
            ],
        );
        let number = built.exits.iter().position(|e| e.level == 4).unwrap();
        let l4 = &built.exits[number];
        assert_eq!((l4.cost, built.tree(number as u32).len()), (Some(7), 4));
        let levels: Vec<u8> = built.tree(number as u32).iter().map(|(_, n)| built.exits[*n as usize].level).collect();
        assert_eq!(levels, [4, 2, 3, 2]);
        assert_eq!(l4.handlers, [(2, 1), (3, 1)]);
        assert_eq!(built.handling(l4), [(2, 11, 12), (3, 13, 14)]);
    }

    #[test]
    fn an_entry_that_fails_is_a_part_of_the_vmresume_that_tried_it() {
        use BasicReason as R;
        let mut failed = exit(25, 2, R::ENTRY_INVALID_GUEST_STATE, 0);
        if let What::Exit(facts) = &mut failed.what {
            facts.reason |= ExitReason::ENTRY_FAILURE;
        }
        let built = Builder::of(nested(), [entry(10, 1, 0), exit(20, 1, R::VMLAUNCH, 0), failed, entry(40, 1, 0)]);
        assert_eq!((built.exits[1].parent, built.exits[1].level), (Some(0), 3));
        assert_eq!((built.exits[0].cost, built.exits[1].cost), (Some(20), Some(15)));
        assert_eq!(built.exits[1].why.to_string(), "always exits: the entry failed");
    }
}
