//! MSRs that nvmx answers itself: the VMX capability MSRs, IA32_FEATURE_CONTROL, and what belongs to the outer hypervisor.
//!
//! Writes of L2 to the tracked MSRs (`vcpu::tracked`) exit too. All others go to the processor directly, by the MSR bitmap
//! of vmcs01. Source: SDM vol. 4,
//! "Model-Specific Registers (MSRs)", and vol. 3D, appendix "VMX Capability Reporting Facility".

use crate::error::Fault;
use crate::vcpu::Cpu;
use crate::vmx::Field;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::caps::msr::{FIRST, LAST};

const IA32_FEATURE_CONTROL: u32 = 0x3A;
/// KVM's first clock MSRs (wall clock, system time): inside the bitmap's range, writes make L0 write to memory.
const KVM_CLOCK_OLD: core::ops::RangeInclusive<u32> = 0x11..=0x12;

/// IA32_FEATURE_CONTROL: lock, VMX outside SMX.
pub const FEATURE_LOCK: u64 = 1 << 0;
/// VMXON outside SMX operation is allowed.
pub const FEATURE_VMX: u64 = 1 << 2;

/// MSRs that nvmx answers itself and never lets a guest, or an MSR area of a guest, reach.
pub fn is_emulated(index: u32) -> bool {
    index == IA32_FEATURE_CONTROL
        || (FIRST..=LAST).contains(&index)
        || KVM_CLOCK_OLD.contains(&index)
        || MsrBitmap::index(index, Access::Read).is_none()
}

/// Sets what nvmx must see in an MSR bitmap.
pub fn intercept(bitmap: &mut MsrBitmap) {
    for index in (FIRST..=LAST).chain(KVM_CLOCK_OLD).chain([IA32_FEATURE_CONTROL]) {
        bitmap.set(index, Access::Read, true);
        bitmap.set(index, Access::Write, true);
    }
}

/// IA32_PAT: nvmx sees L3 write it, and so knows it at every exit.
pub const IA32_PAT: u32 = 0x277;

/// The guest-state field that holds an MSR while VM exits switch it.
pub fn vmcs_field(index: u32) -> Option<Field> {
    Some(match index {
        0x174 => Field::GUEST_SYSENTER_CS,
        0x175 => Field::GUEST_SYSENTER_ESP,
        0x176 => Field::GUEST_SYSENTER_EIP,
        0x1D9 => Field::GUEST_IA32_DEBUGCTL,
        0x277 => Field::GUEST_IA32_PAT,
        0xC000_0080 => Field::GUEST_IA32_EFER,
        0xC000_0100 => Field::GUEST_FS_BASE,
        0xC000_0101 => Field::GUEST_GS_BASE,
        _ => return None,
    })
}

/// RDMSR of an emulated MSR.
pub fn read(cpu: &mut Cpu) -> Result<(), Fault> {
    let index = cpu.regs.gpr[1] as u32;
    let value = match index {
        IA32_FEATURE_CONTROL => cpu.feature_control,
        _ => cpu.config.offered.msr(index).ok_or(Fault::GeneralProtection(0))?,
    };
    cpu.regs.gpr[0] = value & 0xFFFF_FFFF;
    cpu.regs.gpr[2] = value >> 32;
    Ok(())
}

/// WRMSR of L2 that exited; vmcs01 is current.
pub fn write_of_l2(cpu: &mut Cpu) -> Result<(), Fault> {
    let (index, value) = written(cpu);
    let canonical = cpu.config.offered.is_canonical(value);
    cpu.tracked.wrmsr(&mut cpu.vmx, index, value, canonical).unwrap_or_else(|| write(cpu))
}

/// WRMSR to an emulated MSR.
pub fn write(cpu: &mut Cpu) -> Result<(), Fault> {
    let (index, value) = written(cpu);
    // L2 may set what the machine has without SMX and SGX, until it sets the lock.
    let known = FEATURE_LOCK | FEATURE_VMX;
    if index == IA32_FEATURE_CONTROL && cpu.feature_control & FEATURE_LOCK == 0 && value & !known == 0 {
        cpu.feature_control = value;
        return Ok(());
    }
    Err(Fault::GeneralProtection(0))
}

/// ECX and EDX:EAX.
pub fn written(cpu: &Cpu) -> (u32, u64) {
    let [rax, rcx, rdx, ..] = cpu.regs.gpr;
    (rcx as u32, (rdx & 0xFFFF_FFFF) << 32 | rax & 0xFFFF_FFFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What nvmx keeps for itself, as ranges: the old KVM clock, feature control, VMX capabilities, and everything that an
    /// MSR bitmap cannot let through.
    const OWN: [core::ops::RangeInclusive<u32>; 5] =
        [0x11..=0x12, 0x3A..=0x3A, 0x480..=0x493, 0x2000..=0xBFFF_FFFF, 0xC000_2000..=0xFFFF_FFFF];

    fn is_own(index: u32) -> bool {
        OWN.iter().any(|range| range.contains(&index))
    }

    #[test]
    fn each_msr_in_reach_of_a_bitmap_is_emulated_exactly_if_it_is_intercepted() {
        let mut bitmap = MsrBitmap::PASS_ALL;
        intercept(&mut bitmap);
        for index in (0..=0x1FFF).chain(0xC000_0000..=0xC000_1FFF) {
            assert_eq!(is_emulated(index), is_own(index), "{index:#x}");
            for access in [Access::Read, Access::Write] {
                assert_eq!(bitmap.exits(index, access), is_own(index), "{index:#x} {access:?}");
            }
        }
    }

    #[test]
    fn the_edges_of_the_ranges_are_emulated() {
        for range in &OWN {
            for index in [range.start().wrapping_sub(1), *range.start(), *range.end(), range.end().wrapping_add(1)] {
                assert_eq!(is_emulated(index), is_own(index), "{index:#x}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_msr_beyond_the_bitmaps_is_ever_let_through(index: u32) {
            prop_assert_eq!(is_emulated(index), is_own(index));
        }
    }
}
