//! The clock of a PC (MC146818), as far as an operating system reads the time from it: the host's time, in UTC.

use chrono::{DateTime, Datelike};
use std::time::{SystemTime, UNIX_EPOCH};

/// The port that chooses a register; the next one reads or writes it.
pub const CLOCK: u16 = 0x70;
/// Registers A to D: no update is under way and the usual rate; binary numbers and 24 hours; no interrupt; the battery is good.
const STATUS: [(u8, u8); 4] = [(0x0A, 0x26), (0x0B, 0x06), (0x0C, 0), (0x0D, 0x80)];
/// The century, where PCs have it.
const CENTURY: u8 = 0x32;

/// The clock.
#[derive(Default)]
pub struct Clock {
    chosen: u8,
}

impl Clock {
    /// A byte written by the guest: it cannot set the time.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == CLOCK {
            // The highest bit is another matter: it masks NMIs.
            self.chosen = value & 0x7F;
        }
    }

    /// A byte read by the guest.
    pub fn read(&self, port: u16) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        if port == CLOCK { 0xFF } else { register(self.chosen, now) }
    }
}

/// A register at so many seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, seconds) = (now / 86_400, now % 86_400);
    let (year, month, day) = date(days);
    let value = match index {
        0 => seconds % 60,
        2 => seconds / 60 % 60,
        4 => seconds / 3600,
        // 1970 began with a Thursday; Sunday is 1.
        6 => (days + 4) % 7 + 1,
        7 => day,
        8 => month,
        9 => year % 100,
        CENTURY => year / 100,
        _ => return STATUS.iter().find(|(status, _)| *status == index).map_or(0, |(_, value)| *value),
    };
    value as u8
}

/// Year, month and day, so many days after the first of January 1970; that day itself beyond the library's years.
fn date(days: u64) -> (u64, u64, u64) {
    let seconds = i64::try_from(days).unwrap_or(0).saturating_mul(86_400);
    let date = DateTime::from_timestamp(seconds, 0).unwrap_or_default();
    (date.year().unsigned_abs().into(), date.month().into(), date.day().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_hold_the_date_and_the_time() {
        // 29 February 2024, a Thursday, 23:59:58 UTC.
        let now = 1_709_251_198;
        let of = |index| register(index, now);
        assert_eq!([of(CENTURY), of(9), of(8), of(7)], [20, 24, 2, 29]);
        assert_eq!([of(4), of(2), of(0), of(6)], [23, 59, 58, 5]);
        assert_eq!([register(8, now + 2), register(7, now + 2), register(4, now + 2)], [3, 1, 0]);
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(20_819), (2027, 1, 1));
    }

    #[test]
    fn no_update_is_ever_under_way_and_numbers_are_binary() {
        let mut clock = Clock::default();
        clock.write(CLOCK, 0x8A);
        assert_eq!(clock.read(CLOCK + 1) & 0x80, 0);
        clock.write(CLOCK, 0x0B);
        assert_eq!(clock.read(CLOCK + 1) & 0x06, 0x06);
        assert_eq!(clock.read(CLOCK), 0xFF);
    }
}
