//! Which fields a VMCS has: on each CPU the same.

use crate::{
    cpus,
    guest::{self, Guest},
};
use l2_kit::{
    Check, cpu,
    protocol::Hex,
    serial::Serial,
    setup::Controls,
    smp,
    vmx::{self, Outcome},
};

/// The VMCS travels, so that it is the same one that each CPU is asked about. What the fields are follows from the processor, and
/// is `vmxtest`'s to check.
pub fn all(_ids: &[u32]) {
    if cpu::cr4() & cpu::CR4_VMXE == 0 {
        smp::run_on_all(cpus(), |_| guest::enter_vmx());
    }
    vmx::vmclear(Guest::make(0, 0x77, Controls::default()).vcpu.vmcs);
    (0..cpus()).for_each(|index| smp::run_on(index, look));
    for index in 0..cpus() {
        let there = |group| smp::noted(index, group);
        let differs = (0..GROUPS).find_map(|group| {
            let bits = there(group) ^ smp::noted(0, group);
            (bits != 0).then(|| encoding(group, bits.trailing_zeros()))
        });
        Check::new(&mut Serial, "fields of a VMCS")
            .fact("cpu", index)
            .expect("some", (0..GROUPS).any(|group| there(group) != 0), true)
            .expect("unlike_cpu_0", Hex(differs.unwrap_or(NONE)), Hex(NONE))
            .end();
    }
    smp::clear_notes();
}

/// Widths and kinds of fields, and how many numbers are tried of each.
///
/// Source: Intel SDM vol. 3C, table "Structure of VMCS Component Encoding".
const GROUPS: usize = 16;
const NUMBERS: u32 = 64;
/// No encoding.
const NONE: u64 = u64::MAX;

fn encoding(group: usize, number: u32) -> u64 {
    let (width, kind) = (group as u64 >> 2, group as u64 & 3);
    width << 13 | kind << 10 | u64::from(number) << 1
}

/// Tries them all on this CPU.
fn look(index: usize) {
    let vmcs = guest::of(0).vcpu.vmcs;
    vmx::vmptrld(vmcs);
    for group in 0..GROUPS {
        let exists = |number: &u32| vmx::try_read(encoding(group, *number)).0 == Outcome::Succeed;
        smp::note(index, group, (0..NUMBERS).filter(exists).fold(0, |bits, number| bits | 1 << number));
    }
    vmx::vmclear(vmcs);
}
