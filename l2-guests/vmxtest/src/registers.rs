//! Control registers and MSRs in VMX operation (SDM "Restrictions on VMX Operation", "VMX Capability Reporting Facility").

use crate::expect::{GP, Got, SUCCEED, expect, got};
use l2_kit::{
    Check,
    arrayvec::ArrayString,
    cpu::{self, CR0_AM, CR0_NE, CR0_PE, CR0_PG, CR4_PAE, CR4_TSD, CR4_VMXE},
    serial::Serial,
    setup,
    vmx::Outcome,
};

/// All of it.
pub fn all() {
    control_registers();
    each_bit("in VMX operation");
    capability_msrs();
}

fn try_cr0(value: u64) -> Got {
    got(|| {
        cpu::set_cr0(value);
        Outcome::Succeed
    })
}

fn try_cr4(value: u64) -> Got {
    got(|| {
        cpu::set_cr4(value);
        Outcome::Succeed
    })
}

fn control_registers() {
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    expect("CR0.NE off", try_cr0(cr0 & !CR0_NE), GP);
    expect("CR0.PG off", try_cr0(cr0 & !CR0_PG), GP);
    expect("CR0.PE off", try_cr0(cr0 & !CR0_PE), GP);
    expect("CR0.PE and PG off", try_cr0(cr0 & !(CR0_PE | CR0_PG)), GP);
    expect("CR0 with bit 32", try_cr0(cr0 | 1 << 32), GP);
    expect("CR4.VMXE off", try_cr4(cr4 & !CR4_VMXE), GP);
    expect("CR4.PAE off", try_cr4(cr4 & !CR4_PAE), GP);
    expect("CR4 with bit 63", try_cr4(cr4 | 1 << 63), GP);
    expect("CR0.AM on", try_cr0(cr0 | CR0_AM), SUCCEED);
    expect("CR4.TSD on", try_cr4(cr4 | CR4_TSD), SUCCEED);
    let seen = (cpu::cr0() ^ cr0, cpu::cr4() ^ cr4);
    cpu::set_cr0(cr0);
    cpu::set_cr4(cr4);
    Check::new(&mut Serial, "CR0 and CR4 after all this")
        .expect("cr0_changed", seen.0, CR0_AM)
        .expect("cr4_changed", seen.1, CR4_TSD)
        .expect("vmxe", cr4 & CR4_VMXE != 0, true)
        .end();
}

/// LASS of CR4, under which this program, at low addresses, cannot go on: each fetch faults, that of the fault's handler too.
const LASS: u32 = 27;

/// Each bit of CR0 and of CR4 changed alone: `+` if it changes, `=` if it does not, `#` where that is #GP(0), `?` if another bit
/// changes too or something else comes, `-` if it is left out; bit 0 first.
pub fn each_bit(when: &str) {
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    let report = |name: &str, seen: &str| {
        Check::new(&mut Serial, format_args!("each bit of {name} {when}"))
            .fact("low", &seen[..32])
            .fact("high", &seen[32..])
            .end();
    };
    let bits = |set: fn(u64) -> Got, read: fn() -> u64, own: u64, left_out: Option<u32>| {
        let mut seen = ArrayString::<64>::new();
        for bit in 0..64 {
            if left_out == Some(bit) {
                seen.push('-');
                continue;
            }
            let got = set(own ^ 1 << bit);
            let changed = read() ^ own;
            let _ = set(own);
            seen.push(match got {
                SUCCEED if changed == 1 << bit => '+',
                SUCCEED if changed == 0 => '=',
                GP if changed == 0 => '#',
                _ => '?',
            });
        }
        seen
    };
    report("CR0", &bits(try_cr0, cpu::cr0, cr0, None));
    report("CR4", &bits(try_cr4, cpu::cr4, cr4, Some(LASS)));
}

/// Each capability MSR that the others say exists can be read; none can be written.
fn capability_msrs() {
    let has_true_controls = cpu::rdmsr(setup::VMX_BASIC) & 1 << 55 != 0;
    for msr in 0x480..=0x490 {
        if msr >= 0x48D && !has_true_controls {
            continue;
        }
        let read = cpu::try_rdmsr(msr);
        let write = cpu::try_wrmsr(msr, read.unwrap_or(0));
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("MSR {msr:#x}")).expect("read", read.is_ok(), true).expect(
            "write",
            write.err().map_or(SUCCEED, Got::from),
            GP,
        );
        match msr {
            // The revision and the size of a region
            0x480 => check
                .expect("bit31", read.unwrap_or(0) >> 31 & 1, 0)
                .expect("size_fits", (1..=4096).contains(&(read.unwrap_or(0) >> 32 & 0x1FFF)), true)
                .end(),
            // Fixed bits: what must be 1 may be 1
            0x487 | 0x489 => {
                let fixed0 = cpu::rdmsr(msr - 1);
                check.expect("fixed0_is_allowed", fixed0 & !read.unwrap_or(0), 0).end();
            }
            // Controls: what must be 1 may be 1
            0x481..=0x484 | 0x48B | 0x48D..=0x490 => {
                let value = read.unwrap_or(0);
                check.expect("must_is_allowed", (value as u32) & !((value >> 32) as u32), 0).end();
            }
            _ => check.end(),
        }
    }
}
