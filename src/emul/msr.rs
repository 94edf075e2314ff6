//! MSRs that nvmx answers itself: the VMX capability MSRs, IA32_FEATURE_CONTROL, and what belongs to the outer hypervisor.
//!
//! Writes of L2 to the tracked MSRs (`vcpu::tracked`) and to IA32_APIC_BASE exit too. All others go to the processor
//! directly, by the MSR bitmap of vmcs01. Source: SDM vol. 4, "Model-Specific Registers (MSRs)", vol. 3A, "Advanced
//! Programmable Interrupt Controller (APIC)", and vol. 3D, appendix "VMX Capability Reporting Facility".

use crate::error::Fault;
use crate::hw::apic;
use crate::mm::GuestMemory;
use crate::vcpu::Cpu;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::caps::msr::{FIRST, LAST};
use crate::vmx::{Capabilities, Field};
use apic::IA32_APIC_BASE;

const IA32_FEATURE_CONTROL: u32 = 0x3A;
/// KVM's first clock MSRs (wall clock, system time): inside the bitmap's range, writes make L0 write to memory.
const KVM_CLOCK_OLD: core::ops::RangeInclusive<u32> = 0x11..=0x12;

/// IA32_FEATURE_CONTROL: lock, VMX outside SMX.
pub const FEATURE_LOCK: u64 = 1 << 0;
/// VMXON outside SMX operation is allowed.
pub const FEATURE_VMX: u64 = 1 << 2;

/// Accesses that nvmx answers itself and never lets a guest, or an MSR area of a guest, make.
pub fn is_emulated(index: u32, access: Access) -> bool {
    index == IA32_FEATURE_CONTROL
        || (FIRST..=LAST).contains(&index)
        || KVM_CLOCK_OLD.contains(&index)
        || index == IA32_APIC_BASE && access == Access::Write
        || MsrBitmap::index(index, access).is_none()
}

/// True if an MSR area of a guest may have the processor load this value.
pub fn may_load<P>(index: u32, value: u64, memory: &GuestMemory<P>) -> bool {
    match index {
        IA32_APIC_BASE => apic::may_move_to(value, memory),
        _ => !is_emulated(index, Access::Write),
    }
}

/// Sets what nvmx must see in an MSR bitmap.
pub fn intercept(bitmap: &mut MsrBitmap) {
    for index in (FIRST..=LAST).chain(KVM_CLOCK_OLD).chain([IA32_FEATURE_CONTROL]) {
        bitmap.set(index, Access::Read, true);
        bitmap.set(index, Access::Write, true);
    }
    bitmap.set(IA32_APIC_BASE, Access::Write, true);
}

/// IA32_PAT: nvmx sees L3 write it, and so knows it at every exit.
pub const IA32_PAT: u32 = 0x277;
/// IA32_EFER
pub const IA32_EFER: u32 = 0xC000_0080;

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

/// What RDMSR of an emulated MSR yields in L2; `None` if it is a #GP.
pub fn answer(offered: &Capabilities, feature_control: u64, index: u32) -> Option<u64> {
    match index {
        IA32_FEATURE_CONTROL => Some(feature_control),
        _ => offered.msr(index),
    }
}

/// RDMSR of an emulated MSR.
pub fn read(cpu: &mut Cpu) -> Result<(), Fault> {
    let index = cpu.regs.gpr[1] as u32;
    let value = answer(&cpu.config.offered, cpu.feature_control, index).ok_or(Fault::GeneralProtection(0))?;
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
    if index == IA32_APIC_BASE {
        return apic::set_base(value, &cpu.guest);
    }
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
    use crate::addr::PAGE_SIZE;
    use crate::mm::Span;
    use proptest::prelude::*;

    /// What nvmx keeps for itself, as ranges: the old KVM clock, feature control, VMX capabilities, and everything that an
    /// MSR bitmap cannot let through.
    const OWN: [core::ops::RangeInclusive<u32>; 5] =
        [0x11..=0x12, 0x3A..=0x3A, 0x480..=0x493, 0x2000..=0xBFFF_FFFF, 0xC000_2000..=0xFFFF_FFFF];

    fn is_own(index: u32, access: Access) -> bool {
        OWN.iter().any(|range| range.contains(&index)) || index == 0x1B && access == Access::Write
    }

    #[test]
    fn each_msr_in_reach_of_a_bitmap_is_emulated_exactly_if_it_is_intercepted() {
        let mut bitmap = MsrBitmap::PASS_ALL;
        intercept(&mut bitmap);
        for index in (0..=0x1FFF).chain(0xC000_0000..=0xC000_1FFF) {
            for access in [Access::Read, Access::Write] {
                assert_eq!(is_emulated(index, access), is_own(index, access), "{index:#x} {access:?}");
                assert_eq!(bitmap.exits(index, access), is_own(index, access), "{index:#x} {access:?}");
            }
        }
    }

    #[test]
    fn the_edges_of_the_ranges_are_emulated() {
        for range in &OWN {
            for index in [range.start().wrapping_sub(1), *range.start(), *range.end(), range.end().wrapping_add(1)] {
                assert_eq!(is_emulated(index, Access::Read), is_own(index, Access::Read), "{index:#x}");
            }
        }
    }

    const NVMX: Span = Span::new(0x4000_0000, 0x4020_0000);
    const WIDTH: u8 = 39;

    proptest! {
        #[test]
        fn no_msr_beyond_the_bitmaps_is_ever_let_through(index: u32) {
            prop_assert_eq!(is_emulated(index, Access::Read), is_own(index, Access::Read));
            prop_assert_eq!(is_emulated(index, Access::Write), is_own(index, Access::Write));
        }

        /// Whatever the mode and the other bits are: a base that does no harm while the APIC is off, or in x2APIC mode, would
        /// do it as soon as that changes.
        #[test]
        fn the_apic_moves_anywhere_but_into_nvmx(page in prop_oneof![0x3_FFF0u64..0x4_0210, any::<u64>()], low in 0u64..0x1000) {
            let base = (page << 12) & ((1 << 52) - 1);
            let memory = GuestMemory::new((), NVMX, WIDTH);
            let harmless = !NVMX.overlaps(Span::new(base, base + PAGE_SIZE)) && base >> WIDTH == 0;
            prop_assert_eq!(may_load(IA32_APIC_BASE, base | low, &memory), harmless);
        }
    }
}
