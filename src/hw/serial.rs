//! COM1: log lines for people and records for the harness.
//!
//! L2 owns the port as well as nvmx does; nvmx only polls and writes, never programs it after [`init`].

use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use l2_protocol::{Kind, Level, Record};
use log::{LevelFilter, Log, Metadata};
use spin::Mutex;

use crate::hw::port::{inb, outb};

const COM1: u16 = 0x3F8;
const LINE_STATUS: u16 = COM1 + 5;
/// LSR: the transmit buffer takes another byte.
const THR_EMPTY: u8 = 1 << 5;
/// LSR: the last bit has left.
const DRAINED: u8 = 1 << 6;

/// One lock for whole lines, so that processors do not mix theirs.
static LINE: Mutex<()> = Mutex::new(());
/// Set when nvmx dies: the lock's holder may be the one that died.
static DYING: AtomicBool = AtomicBool::new(false);

struct Port;

impl Port {
    fn byte(&self, byte: u8) {
        // SAFETY: the 16550's registers have no effect on memory.
        unsafe {
            while inb(LINE_STATUS) & THR_EMPTY == 0 {
                core::hint::spin_loop();
            }
            outb(COM1, byte);
        }
    }
}

impl Write for Port {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            if byte == b'\n' {
                self.byte(b'\r');
            }
            self.byte(byte);
        }
        Ok(())
    }
}

/// Programs COM1 for 115200 8N1 and makes it the target of the `log` macros.
pub fn init(level: LevelFilter) {
    // SAFETY: the 16550's registers have no effect on memory; interrupts are off in IER.
    unsafe {
        outb(COM1 + 1, 0x00);
        outb(COM1 + 3, 0x80);
        outb(COM1, 0x01);
        outb(COM1 + 1, 0x00);
        outb(COM1 + 3, 0x03);
        outb(COM1 + 2, 0xC7);
        outb(COM1 + 4, 0x03);
    }
    // Firmware may have left half a line there.
    fresh_line();
    // A second call finds the logger set, which is what it wants.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}

/// Waits until everything written has left the port.
pub fn drain() {
    // SAFETY: reading the line status has no effect on memory.
    while unsafe { inb(LINE_STATUS) } & DRAINED == 0 {
        core::hint::spin_loop();
    }
}

/// Lines are written without the lock from now on: nvmx is about to end.
pub(super) fn dying() {
    DYING.store(true, Ordering::Relaxed);
}

/// Runs `write` with the port to itself.
fn line(write: impl FnOnce(&mut Port) -> fmt::Result) {
    let _guard = (!DYING.load(Ordering::Relaxed)).then(|| LINE.lock());
    // The port itself never fails; a `Display` that does has already shown what it could.
    let _ = write(&mut Port);
}

/// Writes a record of level L1; `fields` adds what it says.
pub fn record(kind: Kind, fields: impl FnOnce(&mut Record<'_>)) {
    line(|port| {
        let mut record = Record::new(port, Level::L1, kind);
        fields(&mut record);
        record.end()
    });
}

/// An empty line: ends what somebody else left unfinished.
pub(super) fn fresh_line() {
    line(|port| port.write_str("\n"));
}

struct Logger;
static LOGGER: Logger = Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            line(|port| writeln!(port, "[nvmx {:<5}] {}", record.level(), record.args()));
        }
    }

    fn flush(&self) {
        drain();
    }
}
