//! The state in which a loader hands the CPU over: 32-bit protected mode, flat segments, no paging, and what firmware
//! would have done to its MSRs.
//!
//! Source: Multiboot Specification 0.6.96, "Machine state"; Intel SDM vol. 3A, "Memory Type Range Registers (MTRRs)".

use crate::multiboot::{MAGIC, Start};
use anyhow::{Context, Result, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd};

const CR0_PE: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, everything write-back.
const ALL_WRITE_BACK: u64 = 1 << 11 | 6;

/// Prepares one of so many vCPUs, by the id of its local APIC. The first one is what starts; the others wait for its message.
///
/// # Errors
/// What KVM refuses.
pub fn prepare(kvm: &Kvm, vcpu: &VcpuFd, id: u32, cpus: u32, start: Start) -> Result<()> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM names no CPUID leaves")?;
    cpuid.as_mut_slice().iter_mut().for_each(|entry| place(entry, id, cpus));
    // KVM does not name the CPU's brand.
    for function in 0x8000_0002..=0x8000_0004 {
        let leaf = raw_cpuid::native_cpuid::cpuid_count(function, 0);
        if !cpuid.as_slice().iter().any(|e| e.function == function) {
            let entry = kvm_cpuid_entry2 {
                function,
                eax: leaf.eax,
                ebx: leaf.ebx,
                ecx: leaf.ecx,
                edx: leaf.edx,
                ..Default::default()
            };
            cpuid.push(entry).context("KVM takes no more CPUID leaves")?;
        }
    }
    vcpu.set_cpuid2(&cpuid).context("KVM does not take its own CPUID leaves")?;

    let entry = kvm_msr_entry { index: IA32_MTRR_DEF_TYPE, data: ALL_WRITE_BACK, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).context("a list of one MSR is too long")?;
    ensure!(vcpu.set_msrs(&msrs)? == 1, "KVM refuses memory types");
    connect(vcpu)?;
    if id != 0 {
        return Ok(());
    }

    let flat = |kind: u8| kvm_segment {
        limit: u32::MAX,
        // As Linux wants them; multiboot leaves them open.
        selector: if kind & 8 != 0 { 0x10 } else { 0x18 },
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = flat(0xB);
    let data = flat(0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= CR0_PE;
    vcpu.set_sregs(&sregs).context("KVM refuses protected mode")?;
    vcpu.set_regs(&kvm_regs {
        rax: MAGIC.into(),
        rbx: start.info.into(),
        // Linux looks here, a multiboot image there.
        rsi: start.info.into(),
        rip: start.entry.into(),
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// Lets the others reach this CPU's local APIC. KVM keeps a table of who has which id, makes it anew when the state of an APIC is
/// set or the guest switches one on, and not when there is one more CPU. Until then messages to that one are lost: an INIT too, which
/// the guest may send while all its APICs are as they are after reset.
fn connect(vcpu: &VcpuFd) -> Result<()> {
    let state = vcpu.get_lapic().context("KVM does not tell the state of an APIC")?;
    vcpu.set_lapic(&state).context("KVM refuses the state of an APIC that it told")
}

/// A leaf as this CPU has it: one package of so many cores, of which it is the one with this id.
///
/// Source: Intel SDM vol. 2A, CPUID, leaves 1, 4, 0BH, 1FH.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32) {
    const HYPERVISOR: u32 = 1 << 31;
    const SEVERAL: u32 = 1 << 28;
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xFFFF | cpus << 16 | id << 24;
            // KVM leaves it to the VMM to tell the guest that there is a hypervisor.
            entry.ecx |= HYPERVISOR;
            entry.edx = if cpus > 1 { entry.edx | SEVERAL } else { entry.edx & !SEVERAL };
        }
        // Each cache is said to be one core's own.
        4 if cpus > 1 => entry.eax = entry.eax & 0x3FFF | (cpus.next_power_of_two() - 1) << 26,
        0xB | 0x1F => {
            entry.edx = id;
            if cpus > 1 {
                // Threads of a core, cores of the package: bits of the id below the next level, and how many there are.
                (entry.eax, entry.ebx) = match entry.index {
                    0 => (0, 1),
                    1 => (cpus.next_power_of_two().trailing_zeros(), cpus),
                    _ => {
                        // No level: only the index stays.
                        entry.ecx &= 0xFF;
                        (0, 0)
                    }
                };
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cpu_finds_itself_among_the_others() {
        let placed = |function, index, id, cpus| {
            let mut entry = kvm_cpuid_entry2 { function, index, ebx: 0x1234, ..Default::default() };
            place(&mut entry, id, cpus);
            entry
        };
        let one = placed(1, 0, 0, 1);
        assert_eq!((one.ebx, one.ecx, one.edx), (0x0001_1234, 1 << 31, 0));
        let third = placed(1, 0, 2, 3);
        assert_eq!((third.ebx, third.edx), (0x0203_1234, 1 << 28));
        let cores = placed(0xB, 1, 2, 3);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        assert_eq!((placed(0xB, 0, 2, 3).ebx, placed(4, 0, 0, 3).eax), (1, 3 << 26));
    }
}
