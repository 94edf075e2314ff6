//! VMXON and what it refuses (SDM "VMXON—Enter VMX Operation").

use crate::expect::{GP, INVALID, SUCCEED, expect, got};
use l2_kit::{
    cpu::{self, CR0_NE, FEATURE_CONTROL},
    log, pages, setup, vmx,
};

/// Before IA32_FEATURE_CONTROL is locked, VMXON is refused. Firmware may have locked it, so this is no record.
pub fn unlocked() {
    if cpu::rdmsr(FEATURE_CONTROL) & 1 == 0 {
        cpu::set_cr4(cpu::cr4() | cpu::CR4_VMXE);
        let region = setup::region();
        log!("VMXON before IA32_FEATURE_CONTROL is locked: {}", got(|| vmx::vmxon(region)));
        cpu::set_cr4(cpu::cr4() & !cpu::CR4_VMXE);
    } else {
        log!("IA32_FEATURE_CONTROL is locked: {:#x}", cpu::rdmsr(FEATURE_CONTROL));
    }
}

/// The first address that is too wide.
pub fn too_wide() -> u64 {
    1 << (cpu::cpuid(0x8000_0008, 0)[0] & 0xFF)
}

/// Everything that is refused outside VMX operation; returns a good region.
pub fn errors() -> u64 {
    let region = setup::region();
    expect("vmxon misaligned", got(|| vmx::vmxon(region + 8)), INVALID);
    expect("vmxon beyond the address width", got(|| vmx::vmxon(region | too_wide())), INVALID);
    expect("vmxon with bit 63", got(|| vmx::vmxon(region | 1 << 63)), INVALID);
    // SAFETY: the region is ours; VMX is off.
    let words = unsafe { pages::at(region) };
    for (name, revision) in [
        ("vmxon with a wrong revision", u64::from(setup::revision() ^ 1)),
        ("vmxon with bit 31 of the revision", u64::from(setup::revision()) | 1 << 31),
    ] {
        words[0] = revision;
        expect(name, got(|| vmx::vmxon(region)), INVALID);
    }
    words[0] = setup::revision().into();
    let cr0 = cpu::cr0();
    cpu::set_cr0(cr0 & !CR0_NE);
    expect("vmxon without CR0.NE", got(|| vmx::vmxon(region)), GP);
    cpu::set_cr0(cr0);
    let locked = cpu::rdmsr(FEATURE_CONTROL);
    expect(
        "write to the locked IA32_FEATURE_CONTROL",
        got(|| {
            cpu::wrmsr(FEATURE_CONTROL, locked ^ 0b100);
            vmx::Outcome::Succeed
        }),
        GP,
    );
    region
}

/// Into VMX operation, and what is refused there.
pub fn enter(region: u64) {
    expect("vmxon", got(|| vmx::vmxon(region)), SUCCEED);
    // Without a current VMCS there is no place for error 15.
    expect("vmxon again without a VMCS", got(|| vmx::vmxon(region)), INVALID);
    expect("vmxon misaligned again", got(|| vmx::vmxon(region + 1)), INVALID);
}
