//! CPUID of L2: the processor's answer, with VMX shown as nvmx offers it, without what nvmx refuses (`rules::hidden`), and
//! nvmx's own hypervisor leaves.
//!
//! The outer hypervisor's leaves (0x4000_0000 to 0x4FFF_FFFF) are hidden: its paravirtual interface would let L2 have L0
//! write into nvmx's memory. Source: SDM vol. 2A, "CPUID", table "Information Returned by CPUID Instruction".

use crate::cpu::{Cpu, others};
use crate::guest::operand;
use crate::hw::cpu::this as this_cpu;
use crate::hw::cpuid::cpuid_count;
use crate::hw::cr::cpuid_with_key_locker;
use crate::rules::hidden::CpuidRegister::{Eax, Ebx, Ecx, Edx};
use crate::rules::hidden::{EMPTY, shown};
use crate::vmcs::access::Description;
use crate::vmx::Field;
use crate::vmx::segment::AccessRights;
use crate::x86::{Cr4, cpuid};
use l2_protocol::abi::{
    BELOW, Counter, FRAMES_FREE, INTERFACE_VERSION, LEAF_COUNTERS, LEAF_CPUS, LEAF_INTERFACE, LEAF_MAX, LEAF_REFUSAL,
    LEAF_SIGNATURE, OF_ALL_CPUS, SIGNATURE, SNAPSHOT, STACK_USED,
};
use raw_cpuid::CpuIdResult as CpuidResult;

const HYPERVISOR_LEAVES: core::ops::RangeInclusive<u32> = 0x4000_0000..=0x4FFF_FFFF;

/// EBX bit 0 says that CR4.KL is 1 and firmware has activated Key Locker.
const LEAF_KEY_LOCKER: u32 = 0x19;
const LEAF_EXTENDED: u32 = 0x8000_0001;
/// Version of architectural performance monitoring: the last one whose counters have no address of their own.
const PERFMON: u32 = 5;
/// States that XSAVES does not have for L2.
const STATE_PT: u32 = 8;
const STATE_LBR: u32 = 15;
const NOTHING: CpuidResult = CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
const CR4_OSXSAVE: u64 = Cr4::OSXSAVE.bits();
const CR4_PKE: u64 = Cr4::PKE.bits();
const CR4_KL: u64 = Cr4::KL.bits();
/// Access rights of SS: the privilege level.
const SS_DPL: u64 = AccessRights::DPL as u64;

/// Handles a CPUID exit of L2.
#[inline(always)]
pub fn emulate(cpu: &mut Cpu) {
    let (leaf, subleaf) = (cpu.regs.gpr[0] as u32, cpu.regs.gpr[1] as u32);
    let answer = if HYPERVISOR_LEAVES.contains(&leaf) {
        hypervisor_leaf(cpu, leaf, subleaf)
    } else {
        let of_processor = match leaf {
            LEAF_KEY_LOCKER if cpu.vmx.read(Field::GUEST_CR4) & CR4_KL != 0 => cpuid_with_key_locker(leaf, subleaf),
            _ => cpuid_count(leaf, subleaf),
        };
        let mut answer = as_guest_sees_it(leaf, subleaf, of_processor, cpu.config.offered.physical_width, || {
            cpu.vmx.read(Field::GUEST_CR4)
        });
        // The processor tells of SYSCALL in 64-bit mode alone, in which nvmx always is.
        if leaf == LEAF_EXTENDED && !operand::is_64_bit_code(cpu) {
            answer.edx &= !cpuid::SYSCALL;
        }
        answer
    };
    cpu.regs.gpr[0] = answer.eax as u64;
    cpu.regs.gpr[3] = answer.ebx as u64;
    cpu.regs.gpr[1] = answer.ecx as u64;
    cpu.regs.gpr[2] = answer.edx as u64;
}

/// The processor's answer under nvmx's CR4, as it would be under L2's, without what nvmx does not offer. `width` is L2's
/// physical-address width.
#[inline(always)]
fn as_guest_sees_it(
    leaf: u32,
    subleaf: u32,
    mut answer: CpuidResult,
    width: u32,
    cr4: impl FnOnce() -> u64,
) -> CpuidResult {
    match (leaf, subleaf) {
        (1, _) => {
            let on = cr4() & CR4_OSXSAVE != 0;
            answer.ecx &= const { shown((1, 0), Ecx) } & !cpuid::OSXSAVE;
            answer.ecx |= cpuid::VMX | cpuid::HYPERVISOR | if on { cpuid::OSXSAVE } else { 0 };
            answer.edx &= const { shown((1, 0), Edx) };
        }
        (6, _) => {
            answer.eax &= const { shown((6, 0), Eax) };
            answer.ecx &= const { shown((6, 0), Ecx) };
            answer.edx &= const { shown((6, 0), Edx) };
        }
        (7, 0) => {
            let on = cr4() & CR4_PKE != 0;
            answer.ebx &= const { shown((7, 0), Ebx) };
            answer.ecx &= const { shown((7, 0), Ecx) } & !cpuid::OSPKE;
            answer.ecx |= if on { cpuid::OSPKE } else { 0 };
            answer.edx &= const { shown((7, 0), Edx) };
        }
        (7, 1) => {
            answer.eax &= const { shown((7, 1), Eax) };
            answer.edx &= const { shown((7, 1), Edx) };
        }
        (7, 2) => answer.edx &= const { shown((7, 2), Edx) },
        (0xA, _) => answer.eax = answer.eax & !0xFF | (answer.eax & 0xFF).min(PERFMON),
        (0xD, 1) => answer.ecx &= const { shown((0xD, 1), Ecx) },
        (0xD, STATE_PT | STATE_LBR) => answer = NOTHING,
        (0x8000_0008, _) => answer.eax = answer.eax & !0xFF | width & 0xFF,
        _ if EMPTY.iter().any(|(empty, _)| *empty == leaf) => answer = NOTHING,
        _ => {}
    }
    answer
}

fn hypervisor_leaf(cpu: &mut Cpu, leaf: u32, subleaf: u32) -> CpuidResult {
    // Counters and refusals tell a program what others do: to one that may not read them they are not there.
    let private = !cpu.config.user_counters && cpu.vmx.read(Field::GUEST_SS_AR_BYTES) & SS_DPL != 0;
    let last = if private { LEAF_INTERFACE } else { LEAF_MAX };
    if leaf >= LEAF_SIGNATURE + BELOW && !private {
        return below(leaf - BELOW, subleaf);
    }
    if leaf > last {
        return NOTHING;
    }
    match leaf {
        LEAF_SIGNATURE => CpuidResult { eax: last, ..own_signature() },
        LEAF_INTERFACE => {
            let Description { strategy, vmcs } = cpu.config.access.description();
            CpuidResult {
                eax: INTERFACE_VERSION,
                ebx: Counter::ALL.len() as u32,
                ecx: strategy as u32,
                edx: vmcs as u32,
            }
        }
        LEAF_COUNTERS => {
            cpu.vmx
                .counters
                .forget_guest_exit(crate::vmx::exit::ExitReason::exit(crate::vmx::exit::BasicReason::CPUID));
            if subleaf == SNAPSHOT {
                cpu.vmx.counters.set(Counter::L1Ticks, cpu.regs.ticks);
                cpu.vmx.counters.set(Counter::Ept02Evictions, cpu.ept02.stats().evictions);
                cpu.vmx.counters.take_snapshot(others::totals());
                return CpuidResult { eax: 0, ebx: 1, ecx: 0, edx: 0 };
            }
            let value = match subleaf {
                FRAMES_FREE => Some(cpu.frames.available() as u64),
                STACK_USED => Some(this_cpu().stack_used()),
                _ if subleaf & OF_ALL_CPUS != 0 => others::totals().get(subleaf - OF_ALL_CPUS),
                _ => cpu.vmx.counters.snapshot_value(subleaf),
            };
            match value {
                Some(v) => CpuidResult { eax: v as u32, ebx: 1, ecx: 0, edx: (v >> 32) as u32 },
                None => NOTHING,
            }
        }
        LEAF_CPUS => CpuidResult { eax: others::used_cpus(), ebx: this_cpu().index(), ecx: 0, edx: 0 },
        LEAF_REFUSAL => {
            let [eax, ebx, ecx, edx] = cpu.nested.refusals.leaf(subleaf);
            CpuidResult { eax, ebx, ecx, edx }
        }
        _ => NOTHING,
    }
}

fn own_signature() -> CpuidResult {
    let word = |i: usize| SIGNATURE.iter().skip(4 * i).take(4).rev().fold(0, |w, b| w << 8 | *b as u32);
    CpuidResult { eax: LEAF_MAX, ebx: word(0), ecx: word(1), edx: word(2) }
}

/// The answer of the nvmx below, if it is one: another hypervisor's leaves stay hidden.
#[cold]
fn below(leaf: u32, subleaf: u32) -> CpuidResult {
    let found = cpuid_count(LEAF_SIGNATURE, 0);
    let own = own_signature();
    if (found.ebx, found.ecx, found.edx) != (own.ebx, own.ecx, own.edx) {
        return NOTHING;
    }
    cpuid_count(leaf, subleaf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::hidden::HIDDEN;

    const ALL: CpuidResult = CpuidResult { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX };
    const WIDTH: u32 = 0xFF;

    fn seen(leaf: u32, subleaf: u32, answer: CpuidResult, cr4: u64) -> CpuidResult {
        as_guest_sees_it(leaf, subleaf, answer, WIDTH, || cr4)
    }

    #[test]
    fn leaf_1_shows_vmx_and_a_hypervisor_and_hides_smx_and_debug_stores() {
        assert_eq!(seen(1, 0, NOTHING, 0).ecx, 1 << 5 | 1 << 31);
        let hidden = CpuidResult { ecx: !(1 << 6 | 1 << 2 | 1 << 4), edx: !(1 << 21), ..ALL };
        assert_eq!(seen(1, 0, ALL, CR4_OSXSAVE), hidden);
    }

    #[test]
    fn bits_that_mirror_cr4_follow_the_guest_s_cr4() {
        for (leaf, bit, mirror) in [(1, 27, CR4_OSXSAVE), (7, 4, CR4_PKE)] {
            for answer in [NOTHING, ALL] {
                assert_eq!(seen(leaf, 0, answer, mirror).ecx >> bit & 1, 1, "leaf {leaf}");
                assert_eq!(seen(leaf, 0, answer, !mirror).ecx >> bit & 1, 0, "leaf {leaf}");
            }
        }
    }

    #[test]
    fn what_is_hidden_is_not_there_and_everything_else_is() {
        let mut leaves: Vec<_> = HIDDEN.iter().map(|hidden| hidden.leaf).collect();
        leaves.dedup();
        for (leaf, subleaf) in leaves {
            let seen = seen(leaf, subleaf, ALL, u64::MAX);
            for (register, bits) in [(Eax, seen.eax), (Ebx, seen.ebx), (Ecx, seen.ecx), (Edx, seen.edx)] {
                let rows = HIDDEN.iter().filter(|row| row.leaf == (leaf, subleaf) && row.register == register);
                assert_eq!(!bits, rows.fold(0, |all, row| all | row.bits), "leaf {leaf:#x}.{subleaf} {register:?}");
            }
        }
        for (leaf, name) in EMPTY {
            assert_eq!([seen(*leaf, 0, ALL, 0), seen(*leaf, 2, ALL, 0)], [NOTHING; 2], "{name}");
        }
        assert_eq!([seen(0xD, 8, ALL, 0), seen(0xD, 15, ALL, 0)], [NOTHING; 2], "states that go with them");
    }

    #[test]
    fn performance_monitoring_ends_before_counters_with_addresses_of_their_own() {
        for (version, shown) in [(0, 0), (2, 2), (5, 5), (6, 5)] {
            let answer = CpuidResult { eax: 0x0730_0800 | version, ..NOTHING };
            assert_eq!(seen(0xA, 0, answer, 0).eax, 0x0730_0800 | shown);
        }
    }

    #[test]
    fn the_physical_address_width_is_the_guest_s() {
        let answer = CpuidResult { eax: 0x3034, ..ALL };
        assert_eq!(as_guest_sees_it(0x8000_0008, 0, answer, 46, || 0), CpuidResult { eax: 0x302E, ..ALL });
    }

    #[test]
    fn where_no_nvmx_is_below_its_leaves_are_empty() {
        // A host that runs tests is no guest of nvmx.
        assert_eq!(below(LEAF_COUNTERS, SNAPSHOT), NOTHING);
    }

    #[test]
    fn other_leaves_are_the_processor_s() {
        for (leaf, subleaf) in
            [(0, 0), (2, 0), (7, 3), (0xD, 0), (0xD, 2), (0x13, 0), (0x8000_0001, 0), (0x8000_0008, 0)]
        {
            assert_eq!(seen(leaf, subleaf, ALL, u64::MAX), ALL, "{leaf:#x}");
        }
    }
}
