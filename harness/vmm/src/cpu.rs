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

/// Prepares the vCPU.
///
/// # Errors
/// What KVM refuses.
pub fn prepare(kvm: &Kvm, vcpu: &VcpuFd, start: Start) -> Result<()> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM names no CPUID leaves")?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // One CPU, its local APIC has id 0.
            1 => {
                entry.ebx = entry.ebx & 0xFFFF | 1 << 16;
                // KVM leaves it to the VMM to tell the guest that there is a hypervisor.
                entry.ecx |= 1 << 31;
            }
            0xB | 0x1F => entry.edx = 0,
            _ => {}
        }
    }
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

    let entry = kvm_msr_entry { index: IA32_MTRR_DEF_TYPE, data: ALL_WRITE_BACK, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).context("a list of one MSR is too long")?;
    ensure!(vcpu.set_msrs(&msrs)? == 1, "KVM refuses memory types");
    Ok(())
}
