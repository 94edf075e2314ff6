//! COM1 at 115200 8N1, polled.

use super::cpu::{in8, out8};
use core::fmt;

const COM1: u16 = 0x3F8;
const LINE_STATUS: u16 = COM1 + 5;
const THR_EMPTY: u8 = 1 << 5;
const ALL_SENT: u8 = 1 << 6;

/// The serial line.
pub struct Serial;

/// Sets speed and format; interrupts of the UART stay off.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 0x03), (2, 0xC7), (4, 0x03)] {
        out8(COM1 + register, value);
    }
}

/// Waits until the last bit is on the line: the exit ports would cut it off.
pub fn drain() {
    while in8(LINE_STATUS) & ALL_SENT == 0 {}
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while in8(LINE_STATUS) & THR_EMPTY == 0 {}
            out8(COM1, byte);
        }
        Ok(())
    }
}
