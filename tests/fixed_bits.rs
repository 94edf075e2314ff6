//! Bits of CR0 and CR4: what IA32_VMX_CR0_FIXED0 to IA32_VMX_CR4_FIXED1 offer is what VMXON, MOV to a control register, the
//! host area and the guest area accept; bit by bit, whatever the processor has.

mod core_support;

use core_support::{CONTEXT, Memory, Vmcs, rich, valid_vmcs12};
use nvmx::emul::cr::{Mode, write_cr0, write_cr4};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{CheckId, check_guest, check_host};
use nvmx::vmx::caps::msr;
use nvmx::vmx::{Capabilities, Field, Fields};

const PE: u64 = 1 << 0;
const NW: u64 = 1 << 29;
const CD: u64 = 1 << 30;
const PG: u64 = 1 << 31;
const VMXE: u64 = 1 << 13;
const SMXE: u64 = 1 << 14;
const FRED: u64 = 1 << 32;

/// Processors whose CR4 has all bits, one bit less, SMXE alone beside what is needed, what a small one has.
fn processors() -> impl Iterator<Item = Capabilities> {
    let fixed1 = [rich().cr4_fixed1, !0, 0x27FF, 0x3767FF, 0x3727FF].into_iter();
    let one_less = (0..64).filter(|bit| *bit != 5 && *bit != 13).map(|bit| !(1 << bit));
    fixed1.chain(one_less).map(|cr4_fixed1| Capabilities { cr4_fixed1, ..rich() })
}

fn in_root(v: &Vmcs) -> Mode {
    Mode {
        cr0: v.get(Field::HOST_CR0),
        cr4: v.get(Field::HOST_CR4),
        cr3: 0,
        efer: 0x500,
        cs_long: true,
        tss_16: false,
        vmx_operation: true,
    }
}

#[test]
fn what_the_msrs_offer_is_the_processor_s() {
    for hardware in processors() {
        let caps = offered(&hardware);
        for (index, value) in [
            (msr::IA32_VMX_CR0_FIXED0, hardware.cr0_fixed0),
            (msr::IA32_VMX_CR0_FIXED1, hardware.cr0_fixed1),
            (msr::IA32_VMX_CR4_FIXED0, hardware.cr4_fixed0),
            // FRED is not offered.
            (msr::IA32_VMX_CR4_FIXED1, hardware.cr4_fixed1 & !FRED),
        ] {
            assert_eq!(caps.msr(index), Some(value), "{index:#x}");
        }
    }
}

#[test]
fn each_bit_of_cr4_is_accepted_by_all_or_by_none() {
    for hardware in processors() {
        let caps = offered(&hardware);
        let valid = valid_vmcs12(&caps);
        for bit in 0..64 {
            let (one, flipped) = (1u64 << bit, valid.get(Field::HOST_CR4) ^ 1 << bit);
            let sets = flipped & one != 0;
            let allowed = if sets { caps.cr4_fixed1 & one != 0 } else { caps.cr4_fixed0 & one == 0 };
            assert_eq!(caps.cr4_ok(flipped), allowed, "VMXON, bit {bit} of {:#x}", caps.cr4_fixed1);

            let host = set(&valid, Field::HOST_CR4, flipped);
            let refused = check_host(&host, &caps, true).err().map(|f| f.check) == Some(CheckId::HostCr4);
            assert_eq!(refused, !allowed, "host, bit {bit} of {:#x}", caps.cr4_fixed1);

            let guest = set(&valid, Field::GUEST_CR4, valid.get(Field::GUEST_CR4) ^ one);
            let sets = guest.get(Field::GUEST_CR4) & one != 0;
            let allowed = if sets { caps.cr4_fixed1 & one != 0 } else { caps.cr4_fixed0 & one == 0 };
            let check = check_guest(&guest, &caps, &CONTEXT, &Memory::default()).err().map(|f| f.check);
            assert_eq!(check == Some(CheckId::GuestCr4), !allowed, "guest, bit {bit} of {:#x}", caps.cr4_fixed1);

            // The instruction has rules of its own for what the mode needs: PAE and LA57 in IA-32e mode.
            let mode = in_root(&valid);
            let result = write_cr4(mode, mode.cr4 ^ one, caps.cr4_fixed1);
            let sets = (mode.cr4 ^ one) & one != 0;
            let allowed = if sets { caps.cr4_fixed1 & one != 0 } else { caps.cr4_fixed0 & one == 0 };
            let of_the_mode = [5, 12].contains(&bit);
            assert_eq!(result.is_ok(), allowed && !of_the_mode, "MOV, bit {bit} of {:#x}", caps.cr4_fixed1);
        }
    }
}

#[test]
fn smxe_goes_with_the_processor() {
    for has in [false, true] {
        let fixed1 = if has { !0 } else { !SMXE };
        let caps = offered(&Capabilities { cr4_fixed1: fixed1, ..rich() });
        let valid = valid_vmcs12(&caps);
        let mode = in_root(&valid);
        assert_eq!(write_cr4(mode, mode.cr4 | SMXE, caps.cr4_fixed1).is_ok(), has);
        assert_eq!(check_host(&set(&valid, Field::HOST_CR4, mode.cr4 | SMXE), &caps, true).is_ok(), has);
        assert_eq!(caps.cr4_ok(mode.cr4 | SMXE), has);
        assert!(!caps.cr4_ok(mode.cr4 & !VMXE));
    }
}

#[test]
fn each_bit_of_cr0_is_accepted_by_all_or_by_none() {
    let caps = offered(&rich());
    let valid = valid_vmcs12(&caps);
    for bit in 0..64 {
        let one = 1u64 << bit;
        let flipped = valid.get(Field::HOST_CR0) ^ one;
        let sets = flipped & one != 0;
        let allowed = if sets { caps.cr0_fixed1 & one != 0 } else { caps.cr0_fixed0 & one == 0 };
        assert_eq!(caps.cr0_ok(flipped), allowed, "VMXON, bit {bit}");
        let host = check_host(&set(&valid, Field::HOST_CR0, flipped), &caps, true).err().map(|f| f.check);
        assert_eq!(host == Some(CheckId::HostCr0), !allowed, "host, bit {bit}");
        let guest = set(&valid, Field::GUEST_CR0, valid.get(Field::GUEST_CR0) ^ one);
        let check = check_guest(&guest, &caps, &CONTEXT, &Memory::default()).err().map(|f| f.check);
        assert_eq!(check == Some(CheckId::GuestCr0), !allowed, "guest, bit {bit}");
        // NW without CD, and WP with shadow stacks, are the instruction's own rules.
        let mode = Mode { cr4: VMXE | 1 << 5, ..in_root(&valid) };
        let result = write_cr0(mode, mode.cr0 ^ one);
        let new = mode.cr0 ^ one;
        let own = new & NW != 0 && new & CD == 0;
        assert_eq!(result.is_ok(), allowed && !own, "MOV, bit {bit}");
    }
    assert_eq!(caps.cr0_fixed0 & (PE | PG), PE | PG);
}

fn set(v: &Vmcs, field: Field, value: u64) -> Vmcs {
    let mut v = v.clone();
    v.set(field, value);
    v
}
