//! The serial port (COM1, or what `serial=` says): log lines for people and records for the harness.
//!
//! L2 owns the port as well as nvmx does. After [`init`] nvmx polls and writes, and leaves the port as it found it: each line
//! is drained, so that whatever L2 does to the port next cannot cut it, and what L2 had set that would swallow a line (divisor
//! access, break, loopback) is set aside for its length. No wait is for ever.

use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicU16, AtomicU32, Ordering},
};

use l2_protocol::{Kind, Level, Record};
use log::{LevelFilter, Log, Metadata};

use crate::{
    boot::options::Serial,
    hw::{
        cpu,
        halt::halt,
        port::{inb, outb},
    },
    sync::line_lock::{LineLock, LineTurn},
};

/// Registers behind the data register.
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
/// What the line status is where no port answers.
const NOBODY: u8 = 0xFF;
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

/// Where the port's data register is; 0 while there is none.
static PORT: AtomicU16 = AtomicU16::new(0);
/// One lock for whole lines, so that processors do not mix theirs.
static LINE: LineLock<AtomicU32> = LineLock::new(AtomicU32::new(0), AtomicU32::new(0));
/// How often a processor that dies looks whether another one has ended its line: about a second.
const PATIENCE: u32 = 10_000_000;
/// How often the line status is read for one byte, or for the last bit to leave: at 300 baud a FIFO of 16 bytes takes half a
/// second, and a read takes about a microsecond. A port that never becomes ready loses the byte and does not hang nvmx.
const POLLS: u32 = 1_000_000;

/// The port, for one line.
struct Port {
    /// Its data register.
    at: u16,
    /// It did not become ready once: nobody waits for the rest of the line.
    stuck: bool,
}

impl Port {
    fn byte(&mut self, byte: u8) {
        self.stuck = self.stuck || !comes(self.at, THR_EMPTY);
        write(self.at, byte);
    }
}

/// Reads a register of the port.
fn read(register: u16) -> u8 {
    // SAFETY: the 16550's registers have no effect on memory.
    unsafe { inb(register) }
}

/// Writes one.
fn write(register: u16, value: u8) {
    // SAFETY: as in `read`.
    unsafe { outb(register, value) }
}

/// Waits for `bit` of the line status; false if it does not come.
fn comes(port: u16, bit: u8) -> bool {
    for _ in 0..POLLS {
        if read(port + LINE_STATUS) & bit != 0 {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

/// Runs `write_line` with a port that sends what it is given, and puts back what L2 had set. Without a port nothing happens.
fn ready_to_send(write_line: impl FnOnce(&mut Port)) {
    let at = PORT.load(Ordering::Relaxed);
    if at == 0 {
        return;
    }
    let (line, modem) = (read(at + LINE_CONTROL), read(at + MODEM_CONTROL));
    let (plain_line, plain_modem) = (line & !(DIVISOR_ACCESS | BREAK), modem & !LOOPBACK);
    let set = |line_control: u8, modem_control: u8| {
        if (line, modem) != (plain_line, plain_modem) {
            write(at + LINE_CONTROL, line_control);
            write(at + MODEM_CONTROL, modem_control);
        }
    };
    set(plain_line, plain_modem);
    let mut port = Port { at, stuck: false };
    write_line(&mut port);
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

/// Programs the port for 8N1 without interrupts, and makes it the target of the `log` macros. Where nothing answers there is
/// no port, and nobody waits for one.
pub fn init(serial: Serial, level: LevelFilter) {
    let at = serial.port.filter(|at| read(at + LINE_STATUS) != NOBODY).unwrap_or(0);
    PORT.store(at, Ordering::Relaxed);
    if at != 0 {
        // The loader's last line.
        drain();
        let [low, high] = serial.divisor.to_le_bytes();
        write(at + INTERRUPT_ENABLE, 0);
        write(at + LINE_CONTROL, DIVISOR_ACCESS);
        write(at, low);
        write(at + INTERRUPT_ENABLE, high);
        write(at + LINE_CONTROL, 3);
        write(at + FIFO_CONTROL, 0xC7);
        write(at + MODEM_CONTROL, 3);
    }
    // Firmware may have left half a line there.
    fresh_line();
    // A second call finds the logger set, which is what it wants.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}

/// Waits until everything written has left the port, or the port shows that it never will.
pub fn drain() {
    let at = PORT.load(Ordering::Relaxed);
    if at != 0 {
        comes(at, DRAINED);
    }
}

/// nvmx is about to end, on this processor: the others write nothing any more. Does not return if another one was first.
pub(crate) fn dying() {
    if LINE.die(me()) == LineTurn::Never {
        halt();
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
    if turn == LineTurn::Never {
        halt();
    }
    // The port itself never fails; a `Display` that does has already shown what it could.
    ready_to_send(|port| {
        let _ = write(port);
    });
    if turn == LineTurn::Held {
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
