//! COM1: log lines for people and records for the harness.
//!
//! L2 owns the port as well as nvmx does. After [`init`] nvmx polls and writes, and leaves the port as it found it: each line
//! is drained, so that whatever L2 does to the port next cannot cut it, and what L2 had set that would swallow a line (divisor
//! access, break, loopback) is set aside for its length. No wait is for ever.

use core::{
    fmt::{self, Write},
    sync::atomic::AtomicU32,
};

use l2_protocol::{Kind, Level, Record};
use log::{LevelFilter, Log, Metadata};

use crate::{
    hw::{
        cpu,
        port::{inb, outb},
    },
    sync::line_lock::{LineLock, Turn},
};

const COM1: u16 = 0x3F8;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
/// LCR: the data register is the divisor's.
const DIVISOR_ACCESS: u8 = 1 << 7;
/// LCR: the line is held low.
const BREAK: u8 = 1 << 6;
/// MCR: what is sent goes to the receiver.
const LOOPBACK: u8 = 1 << 4;
/// LSR: the transmit buffer takes another byte.
const THR_EMPTY: u8 = 1 << 5;
/// LSR: the last bit has left.
const DRAINED: u8 = 1 << 6;

/// One lock for whole lines, so that processors do not mix theirs.
static LINE: LineLock<AtomicU32> = LineLock::new(AtomicU32::new(0), AtomicU32::new(0));
/// How often a processor that dies looks whether another one has ended its line: about a second.
const PATIENCE: u32 = 10_000_000;
/// How often the line status is read for one byte, or for the last bit to leave: at 300 baud a FIFO of 16 bytes takes half a
/// second, and a read takes about a microsecond. A port that never becomes ready loses the byte and does not hang nvmx.
const POLLS: u32 = 1_000_000;

/// The port, for one line.
#[derive(Default)]
struct Port {
    /// It did not become ready once: nobody waits for the rest of the line.
    stuck: bool,
}

impl Port {
    fn byte(&mut self, byte: u8) {
        self.stuck = self.stuck || !comes(THR_EMPTY);
        // SAFETY: the 16550's registers have no effect on memory.
        unsafe { outb(COM1, byte) };
    }
}

/// Waits for `bit` of the line status; false if it does not come.
fn comes(bit: u8) -> bool {
    for _ in 0..POLLS {
        // SAFETY: reading the line status has no effect on memory.
        if unsafe { inb(LINE_STATUS) } & bit != 0 {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

/// Runs `write` with a port that sends what it is given, and puts back what L2 had set.
fn ready_to_send(write: impl FnOnce(&mut Port)) {
    // SAFETY: the 16550's registers have no effect on memory.
    let (line, modem) = unsafe { (inb(LINE_CONTROL), inb(MODEM_CONTROL)) };
    let (plain_line, plain_modem) = (line & !(DIVISOR_ACCESS | BREAK), modem & !LOOPBACK);
    let set = |line_control: u8, modem_control: u8| {
        if (line, modem) != (plain_line, plain_modem) {
            // SAFETY: as above.
            unsafe {
                outb(LINE_CONTROL, line_control);
                outb(MODEM_CONTROL, modem_control);
            }
        }
    };
    set(plain_line, plain_modem);
    let mut port = Port::default();
    write(&mut port);
    if !port.stuck {
        drain();
    }
    set(line, modem);
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
    // The loader's last line.
    drain();
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

/// Waits until everything written has left the port, or the port shows that it never will.
pub fn drain() {
    comes(DRAINED);
}

/// nvmx is about to end, on this processor: the others write nothing any more. Does not return if another one was first.
pub(crate) fn dying() {
    if LINE.die(me()) == Turn::Never {
        cpu::halt();
    }
}

/// nvmx is about to end, on some processor.
pub(crate) fn is_over() -> bool {
    LINE.is_over()
}

/// This processor's number for the lock.
fn me() -> u32 {
    cpu::try_this().map_or(0, cpu::PerCpu::index) + 1
}

/// Runs `write` with the port to itself.
fn line(write: impl FnOnce(&mut Port) -> fmt::Result) {
    let turn = LINE.lock(me(), PATIENCE);
    if turn == Turn::Never {
        cpu::halt();
    }
    // The port itself never fails; a `Display` that does has already shown what it could.
    ready_to_send(|port| {
        let _ = write(port);
    });
    if turn == Turn::Held {
        LINE.unlock();
    }
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
