//! Values of MSRs that nvmx answers: what is written is read back, and what a processor refuses is refused.

use l2_kit::{
    Check, cpu,
    identity::Slot,
    protocol::{Hex, Value},
    serial::Serial,
};

const MTRRCAP: u32 = 0xFE;
const MTRR_DEF_TYPE: u32 = 0x2FF;
const XSS: u32 = 0xDA0;
const MISC_ENABLE: u32 = 0x1A0;

pub(super) fn all() {
    mtrrs();
    xss();
    under_nvmx();
}

/// Writes, reads back, and puts the old value back: the value read, or that it was refused.
fn try_value(msr: u32, value: u64) -> Option<u64> {
    let before = cpu::try_rdmsr(msr).ok()?;
    let read = cpu::try_wrmsr(msr, value).ok().map(|()| cpu::rdmsr(msr));
    cpu::wrmsr(msr, before);
    read
}

struct Read(Option<u64>);

impl Value for Read {
    fn write_to(&self, out: &mut dyn core::fmt::Write) -> core::fmt::Result {
        match self.0 {
            Some(value) => Hex(value).write_to(out),
            None => out.write_str("#GP"),
        }
    }
}

/// The last variable range, which is not in use, the fixed ranges of the BIOS, the default type.
fn mtrrs() {
    let Ok(cap) = cpu::try_rdmsr(MTRRCAP) else {
        Check::new(&mut Serial, "MTRRs").fact("present", false).end();
        return;
    };
    let last = 0x200 + 2 * (cap as u32 & 0xFF) - 2;
    let width = cpu::cpuid(0x8000_0008, 0)[0] & 0xFF;
    let beyond = 1u64.checked_shl(width).unwrap_or(0);
    let legal = [
        (last, 0x8000_0004),
        (last, 6),
        (last + 1, 0xF_C000_0000),
        (0x26F, 0x0505_0505_0505_0505),
        (MTRR_DEF_TYPE, 0xC00),
    ];
    for (msr, value) in legal {
        Check::new(&mut Serial, format_args!("MTRR {msr:#x}: {value:#x}"))
            .expect("read_back", try_value(msr, value) == Some(value), true)
            .end();
    }
    let illegal = [
        (last, 2),
        (last, 0x106),
        (last, beyond | 6),
        (last + 1, 0x400),
        (last + 1, beyond | 0x800),
        (0x26F, 0x0705_0505_0505_0505),
        (MTRR_DEF_TYPE, 0xC02),
        (MTRR_DEF_TYPE, 0x1C06),
        (MTRR_DEF_TYPE, 1 << 32 | 0xC06),
    ];
    for (msr, value) in illegal {
        Check::new(&mut Serial, format_args!("MTRR {msr:#x}: {value:#x} is refused"))
            .expect("refused", try_value(msr, value).is_none(), true)
            .end();
    }
}

/// Each bit of IA32_XSS alone.
fn xss() {
    // Without XSAVES the MSR is not there; Bochs ignores writes to an MSR that it does not have.
    const XSAVES: u32 = 1 << 3;
    if cpu::cpuid(0, 0)[0] < 0xD || cpu::cpuid(0xD, 1)[0] & XSAVES == 0 {
        return;
    }
    for bit in 0..64 {
        Check::new(&mut Serial, format_args!("IA32_XSS bit {bit}"))
            .fact("read_back", Read(try_value(XSS, 1 << bit)))
            .end();
    }
}

/// What only nvmx refuses: the machine that knows the MSR takes it.
fn under_nvmx() {
    let refused = |msr: u32, value: u64| Slot::find() != Slot::Nvmx || try_value(msr, value).is_none();
    Check::new(&mut Serial, "MSRs that nvmx must keep from its guest")
        .expect("execute_disable", refused(MISC_ENABLE, 1 << 34), true)
        .expect("intel_pt_by_xrstors", refused(XSS, 1 << 8), true)
        .expect("lbrs_by_xrstors", refused(XSS, 1 << 15), true)
        .end();
}
