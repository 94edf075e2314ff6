//! The CPUID leaves of nvmx in ring 3: a program sees that nvmx is there, and nothing of what others do. Alone on the machine
//! there are none, so there is nothing to compare with.

use core::arch::global_asm;
use l2_kit::{
    cpu,
    identity::Slot,
    pages,
    protocol::abi::{LEAF_COUNTERS, LEAF_CPUS, LEAF_INTERFACE, LEAF_MAX, LEAF_REFUSAL, LEAF_SIGNATURE},
    report, user,
};

global_asm!(
    ".pushsection .text.vmxtest_cpuid, \"ax\"",
    // RDI: where to, RSI: subleaf and leaf
    "vmxtest_cpuid:",
    "mov eax, esi",
    "mov rcx, rsi",
    "shr rcx, 32",
    "cpuid",
    "mov [rdi], eax",
    "mov [rdi + 4], ebx",
    "mov [rdi + 8], ecx",
    "mov [rdi + 12], edx",
    "int3",
    ".popsection",
);

unsafe extern "C" {
    fn vmxtest_cpuid();
}

/// All of it.
pub fn all() {
    if Slot::find() != Slot::Nvmx {
        return;
    }
    let page = core::ptr::from_mut(pages::page()).cast::<[u32; 4]>();
    let ring3 = |leaf: u32, subleaf: u32| {
        user::ring3(vmxtest_cpuid as *const () as u64, page as u64, u64::from(subleaf) << 32 | u64::from(leaf));
        // SAFETY: a page of ours.
        unsafe { page.read_volatile() }
    };
    let [own, seen] = [cpu::cpuid(LEAF_SIGNATURE, 0), ring3(LEAF_SIGNATURE, 0)];
    if own[0] != LEAF_MAX || seen[0] != LEAF_INTERFACE || own[1..] != seen[1..] {
        report::fail(format_args!("ring 3 sees {seen:x?} and ring 0 {own:x?} of the signature"));
    }
    if ring3(LEAF_INTERFACE, 0) != cpu::cpuid(LEAF_INTERFACE, 0) {
        report::fail(format_args!("ring 3 sees another interface"));
    }
    cpu::cpuid(LEAF_COUNTERS, u32::MAX);
    for leaf in [LEAF_COUNTERS, LEAF_REFUSAL, LEAF_CPUS, LEAF_MAX + 1] {
        for subleaf in [0, 1, 2, 0x100, 0x101, 0x200, 0x300, 0x8000_0000, u32::MAX] {
            let seen = ring3(leaf, subleaf);
            if seen != [0; 4] {
                report::fail(format_args!("ring 3 reads {seen:x?} of leaf {leaf:#x}, {subleaf:#x}"));
            }
        }
    }
    if cpu::cpuid(LEAF_COUNTERS, 0)[1] != 1 || cpu::cpuid(LEAF_CPUS, 0)[0] == 0 {
        report::fail(format_args!("ring 0 does not read the counters"));
    }
}
