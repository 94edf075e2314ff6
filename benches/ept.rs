//! What composing costs on this host, per event: a fill under tables that exist, one that continues a run, a fault that
//! is reflected, an activation that finds nothing to do, and dropping what L2 invalidated.
//!
//! `cargo bench --bench ept`; with the arguments `count ROUNDS` it runs fills only, for an instruction counter to watch.

use nvmx::addr::{Hpa, Ngpa};
use nvmx::ept::{Ept02, EptRules, Eptp, Outcome, PoolFrames, Qualification};
use nvmx::mm::{FramePool, GuestMemory, PhysMem, Place, Span};
use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

const SIZE: u64 = 16 << 20;
const OWN: Span = Span::new(8 << 20, SIZE);
const PAGES: u64 = 512;

/// Physical memory as words: as cheap to reach as the direct map.
struct Words(Vec<Cell<u64>>);

impl PhysMem for &Words {
    #[inline]
    fn read_u64(&self, at: Hpa) -> u64 {
        self.0.get((at.get() / 8) as usize).map_or(u64::MAX, Cell::get)
    }
    #[inline]
    fn write_u64(&self, at: Place<'_>, value: u64) {
        if let Some(word) = self.0.get((at.hpa().get() / 8) as usize) {
            word.set(value);
        }
    }
    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        let same = self.read_u64(at.hpa()) == old;
        if same {
            self.write_u64(at, new);
        }
        same
    }
    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        let same = self.read_u32(at.hpa()) == old;
        if same {
            self.write_bytes(at, &new.to_le_bytes());
        }
        same
    }
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        let old = self.read_u64(at.hpa());
        self.write_u64(at, old & !bits);
        old & bits
    }
    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        for (n, byte) in into.iter_mut().enumerate() {
            let at = at.get() + n as u64;
            *byte = self.read_u64(Hpa::new(at & !7)).to_le_bytes()[at as usize % 8];
        }
    }
    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        assert!(bytes.len() % 8 == 0 && bytes.iter().all(|byte| *byte == 0), "only used to clear frames");
        let first = at.hpa().get() as usize / 8;
        self.0[first..first + bytes.len() / 8].iter().for_each(|word| word.set(0));
    }
}

type Machine<'a> = (GuestMemory<&'a Words>, PoolFrames<'a, &'a Words>, Ept02);

const EPTP: Eptp = Eptp::new(0x101e);

fn machine<'a>(words: &'a Words, pool: &'a mut FramePool) -> Machine<'a> {
    for (table, index, entry) in [(0x1000, 0, 0x2007), (0x2000, 0, 0x3007), (0x3000, 0, 0x4007)] {
        words.write_u64(Place::anywhere(Hpa::new(table + index * 8)), entry);
    }
    for page in 0..PAGES {
        words.write_u64(Place::anywhere(Hpa::new(0x4000 + page * 8)), (page << 12) | 6 << 3 | 7);
    }
    let guest = GuestMemory::new(words, OWN, 39);
    let mut frames = PoolFrames { pool, memory: words };
    let ept = Ept02::new(EptRules::new(39, true, true, true), false, 500, &mut frames).expect("enough frames");
    (guest, frames, ept)
}

/// One fault for each of the first `pages` pages.
#[inline(never)]
fn touch(machine: &mut Machine<'_>, pages: u64) {
    let (guest, frames, ept) = machine;
    for page in 0..pages {
        let ngpa = Ngpa::new(page << 12);
        let outcome = ept.violation(EPTP, black_box(ngpa), black_box(Qualification::READ), None, guest, frames);
        assert_eq!(outcome, Outcome::Filled);
    }
}

/// The same in a run: the first fault was there before.
#[inline(never)]
fn touch_next(machine: &mut Machine<'_>, pages: u64) {
    let (guest, frames, ept) = machine;
    for page in 0..pages {
        let ngpa = Ngpa::new(page << 12);
        let outcome = ept.refill(EPTP, black_box(ngpa), black_box(Qualification::READ), guest, frames);
        assert_eq!(outcome, Some(Outcome::Filled));
    }
}

fn report(what: &str, events: u64, took: Duration) {
    println!("{what:<60} {:>9.1} ns", took.as_nanos() as f64 / events as f64);
}

fn main() {
    let words = Words(vec![Cell::new(0); (SIZE / 8) as usize]);
    let mut pool = FramePool::new(OWN);
    let mut m = machine(&words, &mut pool);
    let _ = m.2.activate(EPTP, &m.0, None, &mut m.1);
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "count") {
        let rounds = arguments.get(at + 1).and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
        (0..rounds).for_each(|_| touch(&mut m, PAGES));
        return;
    }
    let rounds = 2000;
    let start = Instant::now();
    (0..rounds).for_each(|_| touch(&mut m, PAGES));
    report("fill, tables exist", rounds * PAGES, start.elapsed());

    let start = Instant::now();
    (0..rounds).for_each(|_| touch_next(&mut m, PAGES));
    report("fill, in a run", rounds * PAGES, start.elapsed());

    let start = Instant::now();
    for _ in 0..rounds * PAGES {
        let missing = black_box(Ngpa::new(1 << 30));
        let outcome = m.2.violation(EPTP, missing, Qualification::READ, None, &m.0, &mut m.1);
        assert!(matches!(outcome, Outcome::ReflectViolation { .. }));
    }
    report("fault that L2 must see", rounds * PAGES, start.elapsed());

    let start = Instant::now();
    for _ in 0..rounds * PAGES {
        let _ = black_box(m.2.activate(black_box(EPTP), &m.0, None, &mut m.1));
    }
    report("activation, nothing changed", rounds * PAGES, start.elapsed());

    for pages in [1, 16, PAGES] {
        let mut took = Duration::ZERO;
        for _ in 0..rounds {
            touch(&mut m, pages);
            let start = Instant::now();
            m.2.invept_all();
            let _ = m.2.activate(EPTP, &m.0, None, &mut m.1);
            took += start.elapsed();
        }
        report(&format!("INVEPT of L2 and activation, {pages} pages in use"), rounds, took);
    }
}
