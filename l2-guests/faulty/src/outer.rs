//! Reaching past nvmx for the hypervisor below it: its MSRs make it write to memory that the guest names, nvmx's included.

use l2_kit::{
    cpu,
    protocol::{Hex, Kind},
    report,
};

/// KVM's wall clock and system time in their old and new places, asynchronous page faults, steal time, EOI, poll control;
/// Hyper-V's guest identity, hypercall page, reference TSC.
const MSRS: [u32; 13] = [
    0x11,
    0x12,
    0x4B56_4D00,
    0x4B56_4D01,
    0x4B56_4D02,
    0x4B56_4D03,
    0x4B56_4D04,
    0x4B56_4D05,
    0x4B56_4D06,
    0x4B56_4D07,
    0x4000_0000,
    0x4000_0001,
    0x4000_0021,
];
/// An enabled structure in the guest's own memory, well away from everything that it uses.
const WANTED: u64 = 0x80_0000 | 1;
const OUTER_LEAVES: [u32; 4] = [0x4000_0003, 0x4000_0100, 0x4000_0101, 0x4000_0010];

/// Passes if every MSR is refused and no leaf of another hypervisor shows.
pub fn reach(_: &str) {
    for msr in MSRS {
        let (read, write) = (cpu::try_rdmsr(msr).is_err(), cpu::try_wrmsr(msr, WANTED).is_err());
        report::record(
            Kind::Check,
            &[("name", &"msr"), ("msr", &Hex(msr.into())), ("read", &!read), ("written", &!write)],
        );
        if !read || !write {
            report::fail(format_args!("MSR {msr:#x} of the hypervisor below can be reached"));
        }
    }
    for leaf in OUTER_LEAVES {
        if cpu::cpuid(leaf, 0) != [0; 4] {
            report::fail(format_args!("CPUID leaf {leaf:#x} shows the hypervisor below"));
        }
    }
}
