//! COM1 at 115200 8N1, polled.

use super::cpu::{in8, out8, out8s};
use core::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
};

const COM1: u16 = 0x3F8;
const INTERRUPT_IDENTIFICATION: u16 = COM1 + 2;
const LINE_STATUS: u16 = COM1 + 5;
/// IIR: the FIFOs are on, and they work.
const FIFOS: u8 = 3 << 6;
/// LSR: the transmit FIFO is empty.
const THR_EMPTY: u8 = 1 << 5;
const ALL_SENT: u8 = 1 << 6;

/// Bytes that an empty transmit FIFO takes: 16 of a 16550A, and one of its predecessors.
static DEPTH: AtomicUsize = AtomicUsize::new(1);
/// Bytes that it takes now, at least: whoever else writes to the line, nvmx too, only waits until it is empty.
static ROOM: AtomicUsize = AtomicUsize::new(0);

/// The serial line.
pub struct Serial;

/// Sets speed and format; interrupts of the UART stay off.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 0x03), (2, 0xC7), (4, 0x03)] {
        out8(COM1 + register, value);
    }
    DEPTH.store(if in8(INTERRUPT_IDENTIFICATION) & FIFOS == FIFOS { 16 } else { 1 }, Ordering::Relaxed);
}

/// Waits until the last bit is on the line: the exit ports would cut it off.
pub fn drain() {
    while in8(LINE_STATUS) & ALL_SENT == 0 {}
}

/// As many bytes as the FIFO takes at once: an access to the port is expensive where it is emulated.
impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut bytes = text.as_bytes();
        while !bytes.is_empty() {
            let mut room = ROOM.load(Ordering::Relaxed);
            if room == 0 {
                while in8(LINE_STATUS) & THR_EMPTY == 0 {}
                room = DEPTH.load(Ordering::Relaxed);
            }
            let (now, later) = bytes.split_at(bytes.len().min(room));
            out8s(COM1, now);
            ROOM.store(room - now.len(), Ordering::Relaxed);
            bytes = later;
        }
        Ok(())
    }
}
