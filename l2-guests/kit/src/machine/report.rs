//! Records on the serial line, and the count of failed checks that decides how the image ends.

use super::{exit, serial::Serial};
use crate::Global;
use arrayvec::ArrayString;
use core::fmt::{self, Write};
use l2_protocol::{Kind, Level, Record, Value};

static LEVEL: Global<Level> = Global::new(Level::L2);
static FAILED: Global<u32> = Global::new(0);
static CHECKS: Global<u32> = Global::new(0);
static DYING: Global<bool> = Global::new(false);

/// In whose name records are written from now on; returns the level before.
pub fn speak_as(level: Level) -> Level {
    LEVEL.replace(level)
}

/// Writes a record at once.
pub fn record(kind: Kind, fields: &[(&str, &dyn Value)]) {
    let mut out = Serial;
    let mut record = Record::new(&mut out, LEVEL.get(), kind);
    for (key, value) in fields {
        record.add(key, value);
    }
    if record.end().is_err() {
        FAILED.set(FAILED.get() + 1);
        let _ = writeln!(Serial, "bad record");
    }
}

/// A free line for people.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::report::log(format_args!($($arg)*)) };
}

/// What [`log!`](crate::log!) calls.
pub fn log(text: fmt::Arguments<'_>) {
    let _ = writeln!(Serial, "[{}] {text}", LEVEL.get());
}

/// A `say` record.
pub fn say(text: &str) {
    record(Kind::Say, &[("text", &text)]);
}

/// Counts a failure and says why.
pub fn fail(why: fmt::Arguments<'_>) {
    FAILED.set(FAILED.get() + 1);
    record(Kind::Say, &[("text", &format_args!("FAILED: {why}"))]);
}

/// How many `check` records there were.
pub fn checks() -> u32 {
    CHECKS.get()
}

/// Ends the image in order.
pub fn end() -> ! {
    let failed = FAILED.get();
    let status = if failed == 0 { "pass" } else { "fail" };
    record(Kind::End, &[("status", &status), ("failed", &failed), ("checks", &checks())]);
    exit::machine(failed == 0)
}

/// Ends the image at once, with a reason. A second death while dying is silent.
pub fn die(why: fmt::Arguments<'_>) -> ! {
    if !DYING.replace(true) {
        let failed = FAILED.get() + 1;
        record(Kind::End, &[("status", &"fail"), ("failed", &failed), ("why", &why)]);
    }
    exit::machine(false)
}

/// A `check` record in the making: facts that must be the same on every machine, some with the value that the SDM asks for.
#[must_use = "a check needs its `end`"]
pub struct Check<'a> {
    record: Record<'a>,
    failed: u32,
}

impl<'a> Check<'a> {
    /// Begins the record `name`.
    pub fn new(out: &'a mut Serial, name: impl Value) -> Self {
        Self { record: Record::new(out, LEVEL.get(), Kind::Check).field("name", name), failed: 0 }
    }

    /// A fact.
    pub fn fact(mut self, key: &str, value: impl Value) -> Self {
        self.record.add(key, &value);
        self
    }

    /// A fact with the value it must have; another value makes the image fail and is shown beside it.
    pub fn expect<T: Value + PartialEq>(mut self, key: &str, value: T, wanted: T) -> Self {
        self.record.add(key, &value);
        if value != wanted {
            self.failed += 1;
            let mut wanted_key = ArrayString::<40>::from("wanted_").unwrap_or_default();
            let _ = wanted_key.try_push_str(key);
            self.record.add(&wanted_key, &wanted);
        }
        self
    }

    /// Ends the record.
    pub fn end(self) {
        let bad = u32::from(self.record.end().is_err());
        FAILED.set(FAILED.get() + self.failed + bad);
        CHECKS.set(CHECKS.get() + 1);
    }
}

impl crate::BootInfo {
    /// Whether the command line has no other words than these and `caps`, which clamps what a guest uses; else the guest fails with
    /// the names there are.
    pub fn knows(&self, names: &[&str]) -> bool {
        let unknown = crate::boot_info::unknown(self.command_line, names);
        if let Some(word) = unknown {
            fail(format_args!("there is no word `{word}`; there are: {names:?}"));
        }
        unknown.is_none()
    }
}
