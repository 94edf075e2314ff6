//! Role confusion: few frames that are roots, tables of every level and data of the guest's EPT all at once, changed at random
//! with and without INVEPT, while an oracle says what each access of the guest may come to.
//!
//! On machines with two CPUs both do it at once: each changes what the other's guest runs on.

mod history;
mod oracle;

use crate::{
    guest::{self, Exit, Extra, Guest, Program},
    lab::Lab,
    random::Random,
};
use core::{
    arch::global_asm,
    cell::UnsafeCell,
    sync::atomic::{AtomicU64, Ordering},
};
use history::History;
use l2_kit::{
    Check, caps,
    ept::{LARGE_BIT, WRITE_BACK, rights::RWX},
    fields as f,
    identity::{self, Slot},
    log,
    pages::{self, LARGE, PAGE},
    report,
    serial::Serial,
    setup, smp,
    vmx::{self, reason},
};
use oracle::{Allowed, Kind, Oracle};

/// Roots: more than a hypervisor below may want to keep.
pub const ROOTS: usize = 12;
/// Frames, roots first.
pub const FRAMES: u64 = 32;
/// Words of a frame: its tag, code that returns it, and what each CPU's guest writes.
const TAG: u64 = 300;
const CODE: u64 = 310;
const WRITTEN: u64 = 320;
/// The addresses under attack are those below entry 1 of the root.
pub const BASE: u64 = 1 << 39;
/// Steps of a CPU after which it has executed an INVEPT of all contexts.
const FORGET: u64 = 40;
/// Frames that the hypervisor below may take for all of this.
const MOST_FRAMES: u64 = 512;

/// What all CPUs share.
pub struct Shared {
    /// The frames
    pub arena: u64,
    pub history: History,
    flags: AtomicU64,
    steps: AtomicU64,
    seed: AtomicU64,
}

static SHARED: [SharedCell; 1] = [SharedCell(UnsafeCell::new(Shared {
    arena: 0,
    history: History::new(),
    flags: AtomicU64::new(0),
    steps: AtomicU64::new(0),
    seed: AtomicU64::new(0),
}))];

struct SharedCell(UnsafeCell<Shared>);
// SAFETY: the address of the arena is set before other CPUs work; the rest is atomic, or under the lock of the history.
unsafe impl Sync for SharedCell {}

fn shared() -> &'static Shared {
    // SAFETY: as above.
    unsafe { &*SHARED[0].0.get() }
}

/// Each CPU's guest.
struct Guests([UnsafeCell<Option<Guest>>; 2]);
// SAFETY: each CPU uses its own.
unsafe impl Sync for Guests {}
static GUESTS: Guests = Guests([const { UnsafeCell::new(None) }; 2]);

/// Words that a CPU leaves.
mod note {
    pub const CHANGES: usize = 0;
    pub const ACCESSES: usize = 1;
    pub const WRONG: usize = 2;
    pub const STALE: usize = 3;
    pub const REACHED: usize = 4;
    /// What the first wrong one was: kind, address, outcome, root
    pub const FIRST: usize = 5;
}

/// The entries of a frame that walks use.
pub fn slots(arena: u64) -> [u64; 5] {
    [0, 1, 2, 3, arena >> 21 & 511]
}

/// All variants on this machine.
pub fn all(lab: &mut Lab) {
    let cpus = crate::cpus();
    for (variant, name) in [(0, "plain"), (1, "with flags"), (2, "some with flags")] {
        let has_flags = caps::get(setup::VMX_EPT_VPID_CAP) >> 21 & 1 != 0;
        if variant != 0 && !has_flags || lab.lists(format_args!("roles on {cpus} CPUs, {name}")) {
            continue;
        }
        prepare(lab, variant);
        let before = free_frames();
        smp::clear_notes();
        smp::run_on_all(cpus, work);
        let taken = before.saturating_sub(free_frames());
        let sum = |word| (0..cpus).map(|cpu| smp::noted(cpu, word)).sum::<u64>();
        for cpu in (0..cpus).filter(|cpu| smp::noted(*cpu, note::WRONG) != 0) {
            let [kind, at, outcome, root] = [0, 1, 2, 3].map(|word| smp::noted(cpu, note::FIRST + word));
            log!("CPU {cpu}: first wrong: kind {kind} at {at:#x} outcome {outcome:#x} root {root}");
        }
        log!(
            "{} changes, {} accesses, {} reached a page, {} had a choice; {taken} frames taken",
            sum(note::CHANGES),
            sum(note::ACCESSES),
            sum(note::REACHED),
            sum(note::STALE)
        );
        if taken > MOST_FRAMES {
            report::fail(format_args!("the hypervisor below took {taken} frames"));
        }
        Check::new(&mut Serial, format_args!("roles on {cpus} CPUs, {name}"))
            .fact("cases", lab.changes())
            .expect("all_changes", sum(note::CHANGES) >= lab.changes(), true)
            .expect("wrong", sum(note::WRONG), 0)
            .end();
    }
}

fn free_frames() -> u64 {
    if Slot::find() == Slot::Nvmx { identity::frames_and_stack().0 } else { 0 }
}

/// The arena as each variant finds it, and what the CPUs are to do.
fn prepare(lab: &mut Lab, variant: u64) {
    // SAFETY: no other CPU works.
    let shared = unsafe { &mut *SHARED[0].0.get() };
    if shared.arena == 0 {
        shared.arena = pages::take(LARGE, LARGE);
    }
    let identity = lab.guest.ept.entry(0, 3);
    for frame in 0..FRAMES {
        let at = shared.arena + frame * PAGE;
        // SAFETY: the arena is ours.
        let words = unsafe { pages::at(at) };
        words.fill(0);
        words[TAG as usize] = tag(frame);
        // mov eax, tag; ret
        words[CODE as usize] = 0x9090_C300_0000_00B8 | tag(frame) << 8;
        if frame < ROOTS as u64 {
            words[0] = identity;
        }
    }
    shared.history.clear();
    shared.flags.store(variant, Ordering::Release);
    shared.steps.store(lab.changes() / crate::cpus() as u64, Ordering::Release);
    shared.seed.store(lab.seed() ^ variant << 32, Ordering::Release);
}

fn tag(frame: u64) -> u64 {
    0x7A60 + frame
}

/// One CPU's part.
fn work(cpu: usize) {
    if cpu != 0 {
        crate::enter_vmx_once();
    }
    // SAFETY: see `Guests`.
    let slot = unsafe { &mut *GUESTS.0[cpu % 2].get() };
    if slot.is_none() {
        match Guest::new(8 + cpu as u64) {
            Ok(guest) => *slot = Some(guest),
            Err(missing) => report::die(format_args!("{missing}")),
        }
    }
    let Some(guest) = slot else { return };
    map_base(guest, shared().arena);
    if let Err(missing) = guest.fresh(Extra::default()) {
        report::die(format_args!("{missing}"));
    }
    guest.start(guest::nothing, 0);
    guest::forget();
    Worker::new(cpu, guest).run();
}

/// The guest's own tables map the addresses under attack one to one.
fn map_base(guest: &Guest, arena: u64) {
    for pointer in 0..4u64 {
        let linear = BASE | pointer << 30;
        // Makes the tables.
        pages::set_entry(guest.cr3, linear, 0);
        let directory = guest::directory_of(guest.cr3, linear);
        for large in slots(arena) {
            crate::place::put(directory, large, linear | large << 21 | 0xE7);
        }
    }
}

struct Worker<'a> {
    cpu: usize,
    guest: &'a mut Guest,
    random: Random,
    oracle: Oracle,
    root: usize,
    since: u64,
}

impl<'a> Worker<'a> {
    fn new(cpu: usize, guest: &'a mut Guest) -> Self {
        let random = Random::new(shared().seed.load(Ordering::Acquire), "roles", cpu as u64);
        Self { cpu, guest, random, oracle: Oracle::new(), root: 0, since: 0 }
    }

    fn eptp(&self, root: usize) -> u64 {
        let flags = match shared().flags.load(Ordering::Relaxed) {
            0 => 0,
            1 => 1,
            _ => root as u64 & 1,
        };
        (shared().arena + root as u64 * PAGE) | 3 << 3 | 6 | flags << 6
    }

    fn run(&mut self) {
        let steps = shared().steps.load(Ordering::Acquire);
        let mut changes = 0;
        self.switch(0);
        while changes < steps {
            for _ in 0..=self.random.below(2) {
                let (at, value) = (self.slot(), self.entry());
                shared().history.locked(|log| log.change(at, value));
                changes += 1;
            }
            self.invalidate();
            if self.random.one_in(4) {
                let root = self.random.below(ROOTS as u64) as usize;
                self.switch(root);
            }
            let accesses = 1 + self.random.below(2);
            for _ in 0..accesses {
                self.access();
            }
        }
        smp::note(self.cpu, note::CHANGES, changes);
    }

    fn switch(&mut self, root: usize) {
        self.root = root;
        vmx::write(f::EPTP, self.eptp(root));
    }

    fn invalidate(&mut self) {
        self.since += 1;
        if self.since >= FORGET
            || self.random.one_in(10)
            || shared().history.locked(|log| log.is_filling(self.oracle.all))
        {
            self.since = 0;
            let _ = vmx::invept(2, [0, 0]);
            self.oracle.forget_all(shared().history.locked(|log| log.length()));
        } else if self.random.one_in(4) {
            let root = self.random.below(ROOTS as u64) as usize;
            let _ = vmx::invept(1, [self.eptp(root), 0]);
            self.oracle.forget_root(root, shared().history.locked(|log| log.length()));
        }
    }

    /// The place of an entry that walks use.
    fn slot(&mut self) -> u64 {
        let arena = shared().arena;
        let frame = self.random.below(FRAMES);
        let slot = self.random.pick(&slots(arena));
        // Entry 0 of a root maps the guest itself.
        let slot = if frame < ROOTS as u64 && (slot == 0 || self.random.one_in(2)) { 1 } else { slot };
        arena + frame * PAGE + slot * 8
    }

    /// An entry: mostly one that leads on, whatever its place.
    fn entry(&mut self) -> u64 {
        if !self.random.one_in(6) {
            let frame = ROOTS as u64 + self.random.below(FRAMES - ROOTS as u64);
            let rights = self.random.pick(&[RWX, RWX, RWX, RWX, RWX, RWX, RWX, 3, 5, 1]);
            return (shared().arena + frame * PAGE) | rights;
        }
        // With another CPU at work nothing may lead out of the arena at any moment: no root as a lower table, which knows the
        // way to all memory by its entry 0, and no 1 GiB page.
        let alone = crate::cpus() == 1;
        let first = if alone { 0 } else { ROOTS as u64 };
        let frame = shared().arena + (first + self.random.below(FRAMES - first)) * PAGE;
        let rights = self.random.pick(&[RWX, RWX, RWX, RWX, RWX, RWX, RWX, RWX, 1, 3, 5, 4, 2, 6, 0, RWX]);
        let kind = match self.random.below(16) {
            0..=9 => 0,
            10..=14 => WRITE_BACK,
            _ => self.random.below(8) << 3,
        };
        let large = if self.random.one_in(8) { LARGE_BIT } else { 0 };
        // Ignored everywhere; or beyond the width of addresses.
        let more = match self.random.below(24) {
            0 => 1 << 51,
            1..=6 => self.random.next() & (1 << 63 | 0x1F << 52 | 1 << 11 | 3 << 8),
            _ => 0,
        };
        // Bit 12 of a large page is left to what tests entries alone.
        let frame =
            if large != 0 && !self.random.one_in(4) { shared().arena } else { frame & !(u64::from(large != 0) << 12) };
        let to_1g = alone && large != 0 && self.random.one_in(4);
        (if to_1g { frame & !((1 << 30) - 1) } else { frame }) | rights | kind | large | more
    }

    fn access(&mut self) {
        let arena = shared().arena;
        let pick = |random: &mut Random, of: &[u64]| random.pick(of);
        let at = BASE
            | self.random.below(4) << 30
            | pick(&mut self.random, &slots(arena)) << 21
            | self.random.below(4) << 12;
        let kind = self.random.pick(&[Kind::Read, Kind::Read, Kind::Write, Kind::Fetch]);
        // Only what is in the arena may be written or run.
        let (before, may) = shared()
            .history
            .locked(|log| (log.length(), self.oracle.allowed(log, self.root, at, kind, log.length(), arena)));
        if may.far || may.outside && kind != Kind::Read {
            return;
        }
        let value = self.random.next() | 1;
        let exit = self.guest_does(kind, at, value);
        let judged = shared().history.locked(|log| {
            let allowed = self.oracle.allowed(log, self.root, at, kind, before, arena);
            let right = self.is_allowed(&allowed, exit, value);
            if exit == Exit::Reason(reason::EPT_VIOLATION) {
                self.oracle.violation(self.root, at, before);
            }
            (right, allowed)
        });
        smp::count(self.cpu, note::ACCESSES);
        if matches!(exit, Exit::Done(_)) {
            smp::count(self.cpu, note::REACHED);
        }
        if judged.1.choices > 1 {
            smp::count(self.cpu, note::STALE);
        }
        if !judged.0 {
            if smp::noted(self.cpu, note::WRONG) == 0 {
                let word = match exit {
                    Exit::Done(value) => value,
                    Exit::Reason(reason) => u64::from(reason) << 32 | vmx::read(f::EXIT_QUALIFICATION),
                    _ => u64::MAX,
                };
                for (i, value) in [kind as u64, at, word, self.root as u64].into_iter().enumerate() {
                    smp::note(self.cpu, note::FIRST + i, value);
                }
            }
            smp::count(self.cpu, note::WRONG);
        }
    }

    fn guest_does(&mut self, kind: Kind, at: u64, value: u64) -> Exit {
        let (program, offset) = match kind {
            Kind::Read => (guest::read as Program, TAG),
            Kind::Write => (store as Program, WRITTEN + self.cpu as u64),
            Kind::Fetch => (guest::call as Program, CODE),
        };
        self.guest.vcpu.registers.rsi = value;
        self.guest.execute(program, at + offset * 8)
    }

    fn is_allowed(&self, allowed: &Allowed, exit: Exit, value: u64) -> bool {
        let frame_with = |wanted: u64, word: u64| {
            (0..FRAMES).find(|frame| {
                // SAFETY: the arena.
                let found = unsafe { ((shared().arena + frame * PAGE + word * 8) as *const u64).read_volatile() };
                found == wanted
            })
        };
        let frame = |frame: Option<u64>| frame.is_some_and(|frame| allowed.frames >> frame & 1 != 0);
        match exit {
            Exit::Done(found) if allowed.outside && frame_with(found, TAG).is_none() => true,
            Exit::Done(found) if found == value => frame(frame_with(value, WRITTEN + self.cpu as u64)),
            Exit::Done(found) => frame(found.checked_sub(tag(0)).filter(|frame| *frame < FRAMES)),
            Exit::Reason(reason::EPT_VIOLATION) => {
                let rights = vmx::read(f::EXIT_QUALIFICATION) >> 3 & 7;
                allowed.rights >> rights & 1 != 0
            }
            Exit::Reason(reason::EPT_MISCONFIGURATION) => allowed.misconfigured,
            _ => false,
        }
    }
}

global_asm!(
    ".pushsection .text.attacks_roles, \"ax\"",
    "attacks_roles_store:",
    "mov [rdi], rsi",
    "mov rax, rsi",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    /// Stores RSI where the argument points: a program.
    #[link_name = "attacks_roles_store"]
    safe fn store(address: u64) -> u64;
}
