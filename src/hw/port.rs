//! I/O ports that nvmx itself uses: the serial port and the ports that end a machine.

use crate::hw::processor::Processor;
use crate::hw::this_processor;

/// Writes a byte to a port.
///
/// # Safety
///
/// The device behind the port does not write to memory in consequence.
#[inline]
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { this_processor().outb(port, value) };
}

/// Takes about a microsecond: reads the port where firmware writes its progress.
pub fn delay() {
    // SAFETY: reading it has no effect.
    let _ = unsafe { inb(0x80) };
}

/// Reads a byte from a port.
///
/// # Safety
///
/// Reading the port has no effect on memory.
#[inline]
pub unsafe fn inb(port: u16) -> u8 {
    // SAFETY: the caller's promise.
    unsafe { this_processor().inb(port) }
}
