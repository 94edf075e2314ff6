//! What an access may come to: a walk in software, over all that a processor may have cached.
//!
//! A processor may use each present, well-formed entry that it has seen since the last invalidation of the context, in any
//! combination; what was not present it has not cached. An EPT violation drops what is cached for its address (SDM
//! "Operations that Invalidate Cached Mappings"), a misconfiguration does not.

use super::{FRAMES, ROOTS, history::Log};
use l2_kit::{caps, cpu, pages::PAGE, setup};

/// A kind of access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read = 0,
    Write = 1,
    Fetch = 2,
}

/// What is allowed.
#[derive(Clone, Copy, Default)]
pub struct Allowed {
    /// A bit for each frame that may be reached
    pub frames: u64,
    /// Memory outside of the arena may be reached
    pub outside: bool,
    /// ... which this guest should not touch
    pub far: bool,
    /// A bit for each set of rights that a violation may report
    pub rights: u8,
    pub misconfigured: bool,
    /// Ways that a walk can take
    pub choices: u32,
}

/// Addresses of a root.
const ADDRESSES: usize = 4 * 5 * 4;

/// Since when a CPU may have cached what.
pub struct Oracle {
    /// All contexts
    pub all: u64,
    roots: [u64; ROOTS],
    violations: [[u64; ADDRESSES]; ROOTS],
    execute_only: bool,
    has_1g: bool,
    wide: u64,
}

enum Meaning {
    Absent,
    Bad,
    Table(u64),
    Page(u64),
}

impl Oracle {
    pub fn new() -> Self {
        let capabilities = caps::get(setup::VMX_EPT_VPID_CAP);
        let width = cpu::cpuid(0x8000_0008, 0)[0] & 0xFF;
        Self {
            all: 0,
            roots: [0; ROOTS],
            violations: [[0; ADDRESSES]; ROOTS],
            execute_only: capabilities & 1 != 0,
            has_1g: capabilities >> 17 & 1 != 0,
            wide: (1 << 52) - (1 << width),
        }
    }

    pub fn forget_all(&mut self, now: u64) {
        self.all = now;
    }

    pub fn forget_root(&mut self, root: usize, now: u64) {
        self.roots[root] = now;
    }

    pub fn violation(&mut self, root: usize, at: u64, now: u64) {
        self.violations[root][number(at)] = now;
    }

    /// What an access may come to that began when there were `window` changes.
    pub fn allowed(&self, log: &Log, root: usize, at: u64, kind: Kind, window: u64, arena: u64) -> Allowed {
        let epoch = self.all.max(self.roots[root]).max(self.violations[root][number(at)]);
        let walk = Walk { oracle: self, log, at, kind, window, arena, epoch };
        let mut allowed = Allowed::default();
        walk.from(arena + root as u64 * PAGE, 3, 7, &mut allowed);
        allowed
    }

    fn decode(&self, entry: u64, level: u32) -> Meaning {
        let rights = entry & 7;
        if rights == 0 {
            return Meaning::Absent;
        }
        let address = entry & 0x000F_FFFF_FFFF_F000;
        if rights & 3 == 2 || rights == 4 && !self.execute_only || address & self.wide != 0 {
            return Meaning::Bad;
        }
        let is_page = match level {
            0 => true,
            1 => entry & 1 << 7 != 0,
            2 => entry & 1 << 7 != 0 && self.has_1g,
            _ => false,
        };
        if !is_page {
            return if entry & 0xF8 != 0 { Meaning::Bad } else { Meaning::Table(address) };
        }
        let within = (1u64 << (12 + 9 * level)) - 1;
        if matches!(entry >> 3 & 7, 2 | 3 | 7) || address & within != 0 { Meaning::Bad } else { Meaning::Page(address) }
    }
}

/// The number of an address under attack.
fn number(at: u64) -> usize {
    let (pointer, large, small) = (at >> 30 & 3, at >> 21 & 511, at >> 12 & 3);
    ((pointer * 5 + large.min(4)) * 4 + small) as usize
}

struct Walk<'a> {
    oracle: &'a Oracle,
    log: &'a Log,
    at: u64,
    kind: Kind,
    window: u64,
    arena: u64,
    epoch: u64,
}

impl Walk<'_> {
    fn from(&self, table: u64, level: u32, rights: u64, allowed: &mut Allowed) {
        let entry = table + (self.at >> (12 + 9 * level) & 511) * 8;
        if entry >> 32 != 0 {
            allowed.far = true;
            return;
        }
        self.log.values(entry, self.epoch, self.window, |value, live| match self.oracle.decode(value, level) {
            Meaning::Absent if live => allowed.violation(0),
            Meaning::Bad if live => {
                allowed.misconfigured = true;
                allowed.choices += 1;
            }
            Meaning::Absent | Meaning::Bad => {}
            Meaning::Table(next) => self.from(next, level - 1, rights & value, allowed),
            Meaning::Page(page) => self.page(page | self.at & ((1 << (12 + 9 * level)) - 1), rights & value, allowed),
        });
    }

    fn page(&self, page: u64, rights: u64, allowed: &mut Allowed) {
        if rights & 1 << self.kind as u64 == 0 {
            return allowed.violation(rights);
        }
        allowed.choices += 1;
        match page.checked_sub(self.arena).map(|offset| offset / PAGE) {
            Some(frame) if frame < FRAMES => allowed.frames |= 1 << frame,
            _ => {
                allowed.outside = true;
                allowed.far |= page >= 128 << 20;
            }
        }
    }
}

impl Allowed {
    fn violation(&mut self, rights: u64) {
        self.rights |= 1 << (rights & 7);
        self.choices += 1;
    }
}
