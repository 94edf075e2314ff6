//! Ticks and nvmx's counters round a number of equal rounds, as an event record.

use crate::guest::Stop;
use core::fmt::{self, Write};
use l2_kit::{
    arrayvec::ArrayString,
    cpu,
    identity::{self, Slot, counters},
    protocol::{Kind, Level, Record, abi::Counter},
    serial::Serial,
};

/// Runs `round` for each number below `count`, and prints what it took. `warm_up` rounds come first.
///
/// # Errors
/// Those of a round.
pub fn measure(
    name: fmt::Arguments<'_>,
    warm_up: u64,
    count: u64,
    mut round: impl FnMut(u64) -> Result<(), Stop>,
) -> Result<(), Stop> {
    (0..warm_up).try_for_each(&mut round)?;
    let counted = Slot::find() == Slot::Nvmx;
    let zero: identity::Counters = [0; Counter::ALL.len()];
    let before = if counted { counters() } else { zero };
    let begin = cpu::rdtsc();
    (0..count).try_for_each(&mut round)?;
    let ticks = cpu::rdtsc().wrapping_sub(begin);
    let after = if counted { counters() } else { zero };
    let mut text = ArrayString::<64>::new();
    let _ = text.write_fmt(name);
    let mut out = Serial;
    let mut record = Record::new(&mut out, Level::L2, Kind::Event)
        .field("name", text.as_str())
        .field("handled_by", "L2")
        .field("scope", "l3")
        .field("count", count)
        .field("ticks", ticks);
    if counted {
        for (counter, (after, before)) in Counter::ALL.iter().zip(after.iter().zip(before)) {
            record.add(counter.name(), &after.wrapping_sub(before));
        }
    }
    // Keys are constants and the serial line does not fail.
    let _ = record.end();
    Ok(())
}
