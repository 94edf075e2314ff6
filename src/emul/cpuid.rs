//! CPUID of L2: the processor's answer, with VMX shown as nvmx offers it and nvmx's own hypervisor leaves.
//!
//! The outer hypervisor's leaves (0x4000_0000 to 0x4FFF_FFFF) are hidden: its paravirtual interface would let L2 have L0
//! write into nvmx's memory.

use crate::vcpu::Cpu;
use crate::vmx::Field;
use l2_protocol::abi::{
    Counter, INTERFACE_VERSION, LEAF_COUNTERS, LEAF_INTERFACE, LEAF_MAX, LEAF_SIGNATURE, SIGNATURE, SNAPSHOT,
};
use raw_cpuid::{CpuIdResult as CpuidResult, native_cpuid::cpuid_count};

const HYPERVISOR_LEAVES: core::ops::RangeInclusive<u32> = 0x4000_0000..=0x4FFF_FFFF;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_SMX: u32 = 1 << 6;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;

/// Handles a CPUID exit of L2.
#[inline]
pub fn emulate(cpu: &mut Cpu) {
    let (leaf, subleaf) = (cpu.regs.gpr[0] as u32, cpu.regs.gpr[1] as u32);
    let answer = if HYPERVISOR_LEAVES.contains(&leaf) {
        hypervisor_leaf(cpu, leaf, subleaf)
    } else {
        let mut answer = cpuid_count(leaf, subleaf);
        match (leaf, subleaf) {
            (1, _) => {
                // OSXSAVE mirrors CR4, and CPUID here ran under nvmx's CR4.
                let on = cpu.vmx.read(Field::GUEST_CR4) & CR4_OSXSAVE != 0;
                answer.ecx &= !(LEAF1_ECX_SMX | LEAF1_ECX_OSXSAVE);
                answer.ecx |= LEAF1_ECX_VMX | LEAF1_ECX_HYPERVISOR | if on { LEAF1_ECX_OSXSAVE } else { 0 };
            }
            (7, 0) => {
                let on = cpu.vmx.read(Field::GUEST_CR4) & CR4_PKE != 0;
                answer.ebx &= !LEAF7_EBX_SGX;
                answer.ecx &= !LEAF7_ECX_OSPKE;
                answer.ecx |= if on { LEAF7_ECX_OSPKE } else { 0 };
            }
            _ => {}
        }
        answer
    };
    cpu.regs.gpr[0] = answer.eax as u64;
    cpu.regs.gpr[3] = answer.ebx as u64;
    cpu.regs.gpr[1] = answer.ecx as u64;
    cpu.regs.gpr[2] = answer.edx as u64;
}

fn hypervisor_leaf(cpu: &mut Cpu, leaf: u32, subleaf: u32) -> CpuidResult {
    let word = |i: usize| SIGNATURE.iter().skip(4 * i).take(4).rev().fold(0, |w, b| w << 8 | *b as u32);
    match leaf {
        LEAF_SIGNATURE => CpuidResult { eax: LEAF_MAX, ebx: word(0), ecx: word(1), edx: word(2) },
        LEAF_INTERFACE => CpuidResult {
            eax: INTERFACE_VERSION,
            ebx: Counter::ALL.len() as u32,
            ecx: cpu.config.strategy as u32,
            edx: 0,
        },
        LEAF_COUNTERS => {
            cpu.vmx
                .counters
                .forget_exit_of_l2(crate::vmx::exit::ExitReason::exit(crate::vmx::exit::BasicReason::CPUID));
            if subleaf == SNAPSHOT {
                cpu.vmx.counters.take_snapshot();
                return CpuidResult { eax: 0, ebx: 1, ecx: 0, edx: 0 };
            }
            match cpu.vmx.counters.snapshot_value(subleaf) {
                Some(v) => CpuidResult { eax: v as u32, ebx: 1, ecx: 0, edx: (v >> 32) as u32 },
                None => CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
            }
        }
        _ => CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
    }
}
