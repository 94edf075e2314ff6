//! What processors share, in every interleaving that the memory model allows: the lock on the serial line and the start.
//!
//! The code under test is the image's, over loom's words instead of the processor's.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use nvmx::sync::Word;
use nvmx::sync::line_lock::{LineLock, LineTurn};
use nvmx::sync::start::Start;

struct Modelled(AtomicU32);

impl Modelled {
    fn zero() -> Self {
        Self(AtomicU32::new(0))
    }
}

impl Word for Modelled {
    fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
    fn store(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }
    fn compare_exchange(&self, old: u32, new: u32) -> u32 {
        match self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(there) | Err(there) => there,
        }
    }
    fn increment(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
    fn pause(&self) {
        thread::yield_now();
    }
}

/// The serial line: who writes on it at the moment, by relaxed accesses, so that only the lock can keep writers apart.
struct Line {
    lock: LineLock<Modelled>,
    writer: AtomicU32,
    epitaphs: AtomicU32,
}

const PATIENCE: u32 = 2;

impl Line {
    fn new() -> Arc<Self> {
        let lock = LineLock::new(Modelled::zero(), Modelled::zero());
        Arc::new(Self { lock, writer: AtomicU32::new(0), epitaphs: AtomicU32::new(0) })
    }

    /// Writes a line under the lock that was taken.
    fn write(&self, me: u32) {
        assert_eq!(self.writer.swap(me, Ordering::Relaxed), 0, "two processors write at once");
        thread::yield_now();
        assert_eq!(self.writer.swap(0, Ordering::Relaxed), me);
        self.lock.unlock();
    }

    /// A line of the log, as `hw::serial` writes it: false if this processor must stop.
    fn log(&self, me: u32) -> bool {
        match self.lock.lock(me, PATIENCE) {
            LineTurn::Held => self.write(me),
            LineTurn::Through => panic!("nobody dies here"),
            LineTurn::Never => return false,
        }
        true
    }

    /// Dies, as `hw::epitaph` does: true if the epitaph was written.
    fn die(&self, me: u32) -> bool {
        if self.lock.die(me) == LineTurn::Never {
            return false;
        }
        let turn = self.lock.lock(me, PATIENCE);
        assert_ne!(turn, LineTurn::Never, "the one that dies stops before its epitaph");
        self.epitaphs.fetch_add(1, Ordering::Relaxed);
        if turn == LineTurn::Held {
            self.write(me);
        }
        true
    }
}

/// How many executions loom tried, with so many preemptions at most: a model that tries one shows nothing.
fn model(preemptions: usize, check: impl Fn() + Sync + Send + 'static) -> usize {
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = count.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        check();
    });
    count.load(std::sync::atomic::Ordering::Relaxed)
}

#[test]
fn lines_of_two_processors_never_mix() {
    let tried = model(3, || {
        let line = Line::new();
        let other = line.clone();
        let second = thread::spawn(move || assert!(other.log(2)));
        assert!(line.log(1));
        second.join().unwrap();
    });
    assert!(tried > 10, "{tried}");
}

#[test]
fn one_dies_while_another_writes() {
    let tried = model(3, || {
        let line = Line::new();
        let other = line.clone();
        let second = thread::spawn(move || {
            // It writes or it stops; it never waits for ever.
            let _ = other.log(2);
        });
        assert!(line.die(1));
        second.join().unwrap();
        assert!(!line.log(3), "after an epitaph nobody writes");
    });
    assert!(tried > 10, "{tried}");
}

#[test]
fn of_two_that_die_one_writes_an_epitaph() {
    let tried = model(3, || {
        let line = Line::new();
        let other = line.clone();
        let second = thread::spawn(move || other.die(2));
        let first = line.die(1);
        assert!(first != second.join().unwrap());
        assert_eq!(line.epitaphs.load(Ordering::Relaxed), 1);
    });
    assert!(tried > 5, "{tried}");
}

#[test]
fn a_holder_that_dies_in_mid_line_or_stops_for_good_holds_up_nobody() {
    let tried = model(3, || {
        let line = Line::new();
        // Processor 2 stops with the lock in its hand: hit by an exception after processor 1 began to die.
        assert_eq!(line.lock.lock(2, PATIENCE), LineTurn::Held);
        let other = line.clone();
        let second = thread::spawn(move || other.lock.die(2));
        let first = line.lock.die(1);
        let second = second.join().unwrap();
        assert!((first == LineTurn::Never) != (second == LineTurn::Never));
        let dying = if first == LineTurn::Never { 2 } else { 1 };
        assert_eq!(line.lock.lock(dying, PATIENCE), LineTurn::Through);
    });
    assert!(tried > 1, "{tried}");
}

/// What the processor that boots hands to the one it starts: in a place that is then used for the next, by way of a page
/// that is then given back.
#[test]
fn a_started_processor_takes_its_own_and_does_not_go_on_early() {
    let tried = model(3, || {
        let start = Arc::new(Start::new(Modelled::zero(), Modelled::zero(), Modelled::zero()));
        let place = Arc::new(AtomicU32::new(100));
        let page_is_back = Arc::new(AtomicU32::new(0));
        let (start_of_other, place_of_other, page) = (start.clone(), place.clone(), page_is_back.clone());
        let other = thread::spawn(move || {
            let taken = place_of_other.load(Ordering::Relaxed);
            start_of_other.arrive();
            assert_eq!(page.load(Ordering::Relaxed), 1, "it went on before the page was given back");
            start_of_other.ready();
            taken
        });
        while start.arrived() != 1 {
            thread::yield_now();
        }
        place.store(200, Ordering::Relaxed);
        page_is_back.store(1, Ordering::Relaxed);
        start.go();
        start.wait_ready(1);
        assert_eq!(other.join().unwrap(), 100, "it took what was meant for the next");
    });
    assert!(tried > 1, "{tried}");
}

/// The model finds what it is there for: without the lock, lines mix.
#[test]
fn the_model_sees_lines_that_mix() {
    let mixed = std::panic::catch_unwind(|| {
        model(3, || {
            let line = Line::new();
            let other = line.clone();
            let second = thread::spawn(move || other.write(2));
            line.write(1);
            second.join().unwrap();
        })
    });
    assert!(mixed.is_err());
}
