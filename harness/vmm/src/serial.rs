//! COM1 of the guest: a 16550 that is always ready to send, and lines out of it.
//!
//! Where a line is the record of a measurement, KVM's counters are added to it: what they counted between the end of the
//! line before and the first byte of this one is what the measurement took.

use crate::console::Console;
use crate::counters::Counters;
use crate::stats::{Snapshot, Stats};

/// Its first port.
pub const COM1: u16 = 0x3F8;
/// Line status: transmitter empty, and what it had is sent.
const READY: u8 = 0x60;
/// What is written to this register switches the FIFOs on.
const FIFOS_ON: u8 = 1;
/// Interrupt identification.
const NO_INTERRUPT: u8 = 1;
/// Interrupt identification: the FIFOs are on. A guest then writes 16 bytes without a look at the line status.
const FIFOS: u8 = 3 << 6;
const EVENT: [&[u8]; 2] = [b"@L2 event ", b"@L3 event "];
const INNER: &[u8] = b" l0_exits=";
const OUTER: &[u8] = b" outer_exits=";
/// A line that never ends is shown in pieces.
const LONGEST: usize = 4096;

/// The port.
pub struct Serial {
    registers: [u8; 8],
    divisor: bool,
    line: Vec<u8>,
    line_before: Snapshot,
    line_start: Snapshot,
    nvmx: Option<Counters>,
}

/// The counters of this level's KVM, by names that are not in the line yet: VMMs in the guest have added those of the levels above.
/// The line has room for two levels; the counters of a third one are left out.
fn named(line: &[u8], fields: String) -> String {
    let has = |key: &[u8]| line.windows(key.len()).any(|w| w == key);
    match (has(INNER), has(OUTER)) {
        (false, _) => fields,
        (true, false) => fields.replace(" l0_", " outer_"),
        (true, true) => String::new(),
    }
}

impl Serial {
    /// A port that nobody has programmed yet.
    pub fn new(now: Snapshot) -> Self {
        Serial {
            registers: [0; 8],
            divisor: false,
            line: Vec::new(),
            line_before: now,
            line_start: now,
            nvmx: Counters::read(),
        }
    }

    /// A byte read by the guest.
    pub fn read(&self, port: u16) -> u8 {
        match port.wrapping_sub(COM1) {
            // Nothing was received, no interrupt is pending.
            0 if !self.divisor => 0,
            2 if self.registers[2] & FIFOS_ON != 0 => NO_INTERRUPT | FIFOS,
            2 => NO_INTERRUPT,
            5 => READY,
            // Clear to send, data set ready, carrier.
            6 => 0xB0,
            n => self.registers.get(usize::from(n)).copied().unwrap_or(0xFF),
        }
    }

    /// A byte written by the guest.
    pub fn write(&mut self, port: u16, value: u8, stats: &Stats, console: &mut Console) {
        match port.wrapping_sub(COM1) {
            0 if !self.divisor => self.take(value, stats, console),
            3 => {
                self.divisor = value & 0x80 != 0;
                self.registers[3] = value;
            }
            // With the divisor latch open, the first two registers are another pair: nobody reads it back.
            0 | 1 if self.divisor => {}
            n => {
                if let Some(register) = self.registers.get_mut(usize::from(n)) {
                    *register = value;
                }
            }
        }
    }

    /// A byte of a line.
    pub fn take(&mut self, byte: u8, stats: &Stats, console: &mut Console) {
        if self.line.is_empty() {
            self.line_start = stats.snapshot();
        }
        match byte {
            b'\r' => {}
            b'\n' => {
                if EVENT.iter().any(|event| self.line.starts_with(event)) {
                    let fields = stats.fields(&self.line_before, &self.line_start);
                    self.line.extend(named(&self.line, fields).as_bytes());
                    let counted = self.nvmx_counted();
                    self.line.extend(counted.as_bytes());
                }
                self.flush(console);
                self.line_before = stats.snapshot();
            }
            _ => {
                self.line.push(byte);
                if self.line.len() >= LONGEST {
                    self.flush(console);
                }
            }
        }
    }

    /// What nvmx counted since it was asked last, for measurements of the innermost guest.
    fn nvmx_counted(&mut self) -> String {
        let now = if self.line.starts_with(EVENT[1]) { Counters::read() } else { None };
        let fields = self.nvmx.as_ref().zip(now.as_ref()).map(|(from, to)| from.fields(to));
        if now.is_some() {
            self.nvmx = now;
        }
        fields.unwrap_or_default()
    }

    /// Shows what there is of the line.
    pub fn flush(&mut self, console: &mut Console) {
        self.line.push(b'\n');
        console.write(&self.line);
        self.line.clear();
    }

    /// The guest ended within a line.
    pub fn finish(&mut self, console: &mut Console) {
        if !self.line.is_empty() {
            self.flush(console);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_switches_the_fifos_on_is_told_of_them() {
        let stats = Stats::none();
        let mut port = Serial::new(stats.snapshot());
        let mut console = Console::Standard;
        assert_eq!(port.read(COM1 + 2), NO_INTERRUPT);
        port.write(COM1 + 2, 0xC7, &stats, &mut console);
        assert_eq!(port.read(COM1 + 2), 0xC1);
        port.write(COM1 + 2, 0, &stats, &mut console);
        assert_eq!(port.read(COM1 + 2), NO_INTERRUPT);
    }

    #[test]
    fn each_level_of_kvm_has_its_own_names_and_a_third_one_none() {
        let own = || " l0_exits=1 l0_fills=2".to_string();
        assert_eq!(named(b"@L3 event name=boot", own()), own());
        assert_eq!(named(b"@L3 event name=boot l0_exits=5", own()), " outer_exits=1 outer_fills=2");
        assert_eq!(named(b"@L3 event name=boot l0_exits=5 outer_exits=3", own()), "");
    }
}
