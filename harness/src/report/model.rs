//! What an event would cost in cycles: a model for machines that count instructions.
//!
//! An emulated processor takes no time for the switch of worlds, so its counts of instructions hide what an exit costs. The
//! model adds it: `instructions / IPC + exits * round trip + VMREAD, VMWRITE, ... * their cost`. Every constant is a range from
//! published figures; where none was found, it says so. Caches and TLBs are left out, so the model is on the low side. What
//! comes out is always labelled "model" and never stands beside measured cycles.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A figure with its uncertainty.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    /// The least that is plausible
    pub low: f64,
    /// What we would bet on
    pub mid: f64,
    /// The most
    pub high: f64,
}

impl Range {
    /// Three values.
    pub const fn new(low: f64, mid: f64, high: f64) -> Self {
        Range { low, mid, high }
    }

    /// One value without uncertainty.
    pub const fn exact(value: f64) -> Self {
        Range::new(value, value, value)
    }

    /// Both, end by end.
    pub fn plus(self, other: Self) -> Self {
        Range::new(self.low + other.low, self.mid + other.mid, self.high + other.high)
    }

    /// So many of it.
    pub fn times(self, n: f64) -> Self {
        Range::new(self.low * n, self.mid * n, self.high * n)
    }
}

/// A constant of the model.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    /// What it is
    pub what: &'static str,
    /// Cycles
    pub cycles: Range,
    /// Where it is from
    pub source: &'static str,
}

/// A VM exit and the entry after it, hardware alone.
pub const ROUND_TRIP: Constant = Constant {
    what: "VM exit and entry",
    cycles: Range::new(784.0, 1000.0, 1500.0),
    source: "784: Sandy Bridge, Agesen et al., USENIX ATC 2012, table 1; 1,000: Ben-Yehuda et al. (Turtles), OSDI 2010, section 4.3; \
             1,500: a null hypercall through KVM on Skylake, kvm list 2020, an upper bound",
};
/// VMREAD that does not exit.
pub const VMREAD: Constant = Constant {
    what: "VMREAD or VMWRITE that does not exit",
    cycles: Range::new(6.0, 30.0, 100.0),
    source: "6: derived from Linux commit 7952d769c29c (200 cycles for 36 fields); 100: texts on the web; 30: our assumption between them",
};
/// VMPTRLD or VMCLEAR.
pub const POINTER: Constant = Constant {
    what: "VMPTRLD or VMCLEAR",
    cycles: Range::new(100.0, 250.0, 500.0),
    source: "our assumption: no measured figure was found",
};
/// INVEPT or INVVPID.
pub const INVALIDATION: Constant = Constant {
    what: "INVEPT or INVVPID",
    cycles: Range::new(100.0, 250.0, 500.0),
    source: "our assumption: no measured figure was found",
};
/// RDTSC without an exit.
pub const RDTSC: Constant = Constant {
    what: "RDTSC",
    cycles: Range::new(20.0, 25.0, 40.0),
    source: "25: the usual figure, as in instruction tables for Skylake; the range is our assumption",
};
/// CPUID without an exit.
pub const CPUID: Constant = Constant {
    what: "CPUID",
    cycles: Range::new(70.0, 100.0, 250.0),
    source: "100: Turtles, OSDI 2010, section 4.3; the range is our assumption",
};
/// RDMSR or WRMSR without an exit.
pub const MSR: Constant = Constant {
    what: "RDMSR or WRMSR",
    cycles: Range::new(60.0, 120.0, 200.0),
    source: "120: RDMSR of a nested guest that passes, Linux commit ceef7d10dfb6; the range is our assumption",
};
/// SYSCALL and SYSRET with the least of a kernel between them.
pub const SYSCALL: Constant = Constant {
    what: "SYSCALL and SYSRET",
    cycles: Range::new(100.0, 150.0, 550.0),
    source: "150 and, with page-table isolation, 550: getpid in a guest, Huang et al. (PVM), SOSP 2023, table 2",
};
/// A step from ring to ring by a fault or IRET.
pub const RING_SWITCH: Constant = Constant {
    what: "fault, or IRET to another ring",
    cycles: Range::new(50.0, 100.0, 250.0),
    source: "our assumption: no measured figure was found",
};

/// All constants, for the list that goes with every modelled figure.
pub const CONSTANTS: [Constant; 9] =
    [ROUND_TRIP, VMREAD, POINTER, INVALIDATION, RDTSC, CPUID, MSR, SYSCALL, RING_SWITCH];

/// Cycles of a second on the processor that the model speaks of.
pub const HERTZ: f64 = 3e9;

/// What happened per event, all levels together.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Instructions
    pub instructions: f64,
    /// VM exits that the hardware made
    pub exits: f64,
    /// VMREAD and VMWRITE that did not exit
    pub accesses: f64,
    /// VMPTRLD and VMCLEAR
    pub pointers: f64,
    /// INVEPT and INVVPID
    pub invalidations: f64,
}

/// Cycles of an event. One instruction a cycle: what measures higher on hot loops measures lower where caches miss.
pub fn cycles(counts: &Counts) -> Range {
    [
        (Range::exact(1.0), counts.instructions),
        (ROUND_TRIP.cycles, counts.exits),
        (VMREAD.cycles, counts.accesses),
        (POINTER.cycles, counts.pointers),
        (INVALIDATION.cycles, counts.invalidations),
    ]
    .into_iter()
    .fold(Range::default(), |sum, (cost, n)| sum.plus(cost.times(n)))
}

/// A duration for people: "69 s", "20 min", "5.1 h".
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_sum_of_its_parts() {
        let counts = Counts { instructions: 100.0, exits: 2.0, accesses: 10.0, pointers: 1.0, invalidations: 1.0 };
        assert_eq!(cycles(&counts).mid, 100.0 + 2000.0 + 300.0 + 250.0 + 250.0);
        assert_eq!(cycles(&counts).low, 100.0 + 1568.0 + 60.0 + 100.0 + 100.0);
    }

    #[test]
    fn every_constant_is_a_range_with_a_source() {
        for constant in CONSTANTS {
            let Range { low, mid, high } = constant.cycles;
            assert!(0.0 < low && low <= mid && mid <= high, "{}", constant.what);
            assert!(!constant.source.is_empty());
        }
    }

    #[test]
    fn durations_read_easily() {
        let texts = [0.5, 2.0, 69.0, 1200.0, 18_360.0].map(duration);
        assert_eq!(texts, ["500 ms", "2.0 s", "69 s", "20 min", "5.1 h"]);
    }
}
