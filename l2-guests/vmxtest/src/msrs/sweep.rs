//! Every MSR that an MSR bitmap knows, and some beyond: which can be read, and which take the value that they have. Under nvmx
//! each is what nvmx's own table says; where the table leaves an access to the machine, it is as on the machine alone.

use super::policy::{self, Row, Verdict};
use crate::guest::{Exit, Guest};
use core::fmt;
use l2_kit::{Check, Global, cpu, identity::Slot, log, protocol::Value, serial::Serial, trap};

/// MSRs of one record.
const STEP: u32 = 0x400;
/// Beyond the bitmaps: the first and last of the gaps, KVM's, Hyper-V's, AMD's.
const BEYOND: [u32; 10] = [
    0x2000,
    0x1_0000,
    0x4000_0000,
    0x4000_0021,
    0x4B56_4D00,
    0x4B56_4D01,
    0xBFFF_FFFF,
    0xC000_2000,
    0xC001_0015,
    0xFFFF_FFFF,
];
/// Writing these the value that they have is not without effect: the TSC goes back, microcode is loaded from address 0.
const NOT_WRITTEN: [u32; 2] = [0x10, 0x79];
/// Those where an emulated machine takes what a processor does not have: VMX that is not offered, MTRRs of ranges beyond
/// those that IA32_MTRRCAP tells of.
fn is_not_there(index: u32) -> bool {
    let ranges = cpu::try_rdmsr(0xFE).map_or(0, |cap| cap as u32 & 0xFF);
    (0x480..=0x493).contains(&index) || (0x200 + 2 * ranges..0x250).contains(&index)
}

/// What an access came to: bits of an entry in the guest's results.
mod result {
    pub const READ: u8 = 1 << 0;
    pub const WRITTEN: u8 = 1 << 1;
    /// Something other than #GP(0)
    pub const OTHER: u8 = 1 << 2;
}
use result::{OTHER, READ, WRITTEN};

type Results = [u8; STEP as usize];
/// Of `STEP` MSRs: the hypervisor and its guest put them there.
static RESULTS: Global<Results> = Global::new([0; STEP as usize]);

pub(super) fn all(guest: &mut Guest) {
    for first in policy::IN_REACH.into_iter().flat_map(|range| range.step_by(STEP as usize)) {
        record("hypervisor", first, STEP, || {
            sweep(first.into());
            true
        });
        record("guest", first, STEP, || guest.execute(sweep, first.into()) == Exit::Done(0));
    }
    for index in BEYOND {
        record("hypervisor", index, 1, || {
            let mut results = RESULTS.get();
            results[0] = access(index);
            RESULTS.set(results);
            true
        });
    }
}

/// Reads each MSR from the first on, and writes the value back.
extern "C" fn sweep(first: u64) -> u64 {
    let mut results = [0; STEP as usize];
    for (index, result) in (first as u32..).zip(&mut results) {
        *result = access(index);
    }
    RESULTS.set(results);
    0
}

fn access(index: u32) -> u8 {
    let mut result = 0;
    let mut done = |bit: u8, fault: Option<trap::Trap>| match fault {
        None => result |= bit,
        Some(trap) if (trap.vector, trap.error) == (trap::GP, 0) => {}
        Some(_) => result |= OTHER,
    };
    let read = cpu::try_rdmsr(index);
    done(READ, read.err());
    if !NOT_WRITTEN.contains(&index) {
        done(WRITTEN, cpu::try_wrmsr(index, read.unwrap_or(0)).err());
    }
    result
}

/// Runs a sweep and prints which of `count` MSRs could be read and written, of those that are the machine's to decide.
fn record(who: &str, first: u32, count: u32, run: impl FnOnce() -> bool) {
    let ran = run();
    let results = RESULTS.get();
    let under_nvmx = Slot::find() == Slot::Nvmx;
    let mut against = 0;
    for (index, result) in (first..=first + (count - 1)).zip(results) {
        let row = policy::row(index);
        let kept = result & OTHER == 0 && (!under_nvmx || keeps(row, result));
        if !kept {
            log!("{who}: MSR {index:#x} ({}): {result:#b} is against the policy", row.name);
            against += 1;
        }
    }
    let runs = |bit: u8, of: fn(&Row) -> Verdict| Runs { first, count, of, bit, results: &results };
    Check::new(&mut Serial, format_args!("MSRs of the {who} from {first:#x}"))
        .expect("ran", ran, true)
        .expect("against_the_policy", against, 0)
        .fact("read", runs(READ, |row| row.read))
        .fact("written", runs(WRITTEN, |row| row.write))
        .end();
}

/// What is refused is refused.
fn keeps(row: &Row, result: u8) -> bool {
    let refused = |verdict, bit| verdict != Verdict::Refused || result & bit == 0;
    refused(row.read, READ) && refused(row.write, WRITTEN)
}

/// The MSRs with a bit in their results, where the policy leaves that to the machine: as runs.
struct Runs<'a> {
    first: u32,
    count: u32,
    of: fn(&Row) -> Verdict,
    bit: u8,
    results: &'a Results,
}

impl fmt::Display for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_in = |at: u32| {
            let index = self.first + at;
            let there = at < self.count && self.results[at as usize] & self.bit != 0;
            there && (self.of)(policy::row(index)) != Verdict::Refused && !is_not_there(index)
        };
        let mut separator = "";
        let mut at = 0;
        while at < self.count {
            let run = (at..).take_while(|at| is_in(*at)).count() as u32;
            if run != 0 {
                write!(f, "{separator}{:x}", self.first + at)?;
                if run != 1 {
                    write!(f, "-{:x}", self.first + at + run - 1)?;
                }
                separator = ",";
            }
            at += run.max(1);
        }
        if separator.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

impl Value for Runs<'_> {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}
