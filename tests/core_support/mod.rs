//! A rich VMX machine and a vmcs12 that passes every check on it: what the tests of the pure core start from.
#![allow(dead_code)]

pub mod broken;
pub mod failing;

use nvmx::addr::{Gpa, Hpa};
use nvmx::rules::checks::{GuestContext, ReadsGuest};
use nvmx::rules::merge::ApicPages;
use nvmx::vmx::caps::{Capabilities, msr};
use nvmx::vmx::controls::Controls;
use nvmx::vmx::{EntryControls, ExitControls, Field, Fields, PinControls, PrimaryControls, SecondaryControls};
use std::collections::HashMap;

/// Bits of the default1 class that a TRUE capability MSR lets software clear.
const CLEARABLE_PRIMARY: u32 = 1 << 15 | 1 << 16;
const CLEARABLE_DEBUG: u32 = 1 << 2;

fn controls<C: Controls>(ones: u32) -> u64 {
    u64::from(C::all().bits() | C::DEFAULT1) << 32 | u64::from(ones)
}

/// Values of the capability MSRs of a machine that has every control that exists.
pub fn rich_msr(index: u32) -> u64 {
    match index {
        msr::IA32_VMX_BASIC => 0x11E5_7ED0 | 4096 << 32 | 6 << 50 | 1 << 54 | 1 << 55,
        msr::IA32_VMX_PINBASED_CTLS => controls::<PinControls>(PinControls::DEFAULT1),
        msr::IA32_VMX_PROCBASED_CTLS => controls::<PrimaryControls>(PrimaryControls::DEFAULT1),
        msr::IA32_VMX_EXIT_CTLS => controls::<ExitControls>(ExitControls::DEFAULT1),
        msr::IA32_VMX_ENTRY_CTLS => controls::<EntryControls>(EntryControls::DEFAULT1),
        msr::IA32_VMX_TRUE_PINBASED_CTLS => controls::<PinControls>(PinControls::DEFAULT1),
        msr::IA32_VMX_TRUE_PROCBASED_CTLS => {
            controls::<PrimaryControls>(PrimaryControls::DEFAULT1 & !CLEARABLE_PRIMARY)
        }
        msr::IA32_VMX_TRUE_EXIT_CTLS => controls::<ExitControls>(ExitControls::DEFAULT1 & !CLEARABLE_DEBUG),
        msr::IA32_VMX_TRUE_ENTRY_CTLS => controls::<EntryControls>(EntryControls::DEFAULT1 & !CLEARABLE_DEBUG),
        msr::IA32_VMX_PROCBASED_CTLS2 => controls::<SecondaryControls>(0),
        msr::IA32_VMX_MISC => 5 | 1 << 5 | 7 << 6 | 1 << 14 | 1 << 15 | 4 << 16 | 3 << 28 | 1 << 30 | 0x77 << 32,
        msr::IA32_VMX_CR0_FIXED0 => 0x8000_0021,
        msr::IA32_VMX_CR0_FIXED1 => 0xFFFF_FFFF,
        msr::IA32_VMX_CR4_FIXED0 => 0x2000,
        msr::IA32_VMX_CR4_FIXED1 => 0x08FF_7FFF,
        msr::IA32_VMX_VMCS_ENUM => 0x2A,
        msr::IA32_VMX_EPT_VPID_CAP => u64::MAX,
        msr::IA32_VMX_VMFUNC => 3,
        msr::IA32_VMX_PROCBASED_CTLS3 => u64::MAX,
        other => panic!("no such MSR: {other:#x}"),
    }
}

/// A machine that has every control that exists.
pub fn rich() -> Capabilities {
    Capabilities { counters: COUNTERS, ..Capabilities::read(rich_msr, 39, 48) }
}

/// Four general counters and three fixed ones.
pub const COUNTERS: u64 = 7 << 32 | 0xF;

/// A vmcs12 as an array.
#[derive(Clone, Debug)]
pub struct Vmcs([u64; Field::COUNT]);

impl Default for Vmcs {
    fn default() -> Self {
        Vmcs([0; Field::COUNT])
    }
}

impl Vmcs {
    pub fn set(&mut self, field: Field, value: u64) -> &mut Self {
        assert_eq!(value & !field.mask(), 0, "{field} cannot hold {value:#x}");
        self.0[field.index()] = value;
        self
    }
    pub fn or(&mut self, field: Field, bits: u64) -> &mut Self {
        self.set(field, self.get(field) | bits)
    }
    pub fn clear(&mut self, field: Field, bits: u64) -> &mut Self {
        self.set(field, self.get(field) & !bits)
    }
}

impl Fields for Vmcs {
    fn get(&self, field: Field) -> u64 {
        self.0[field.index()]
    }
}

/// Translated pages for a virtual APIC.
pub const APIC_PAGES: ApicPages =
    ApicPages { virtual_apic: Hpa::new(0xD000), apic_access: Hpa::new(0xE000), posted_descriptor: Hpa::new(0xF040) };

pub const CURRENT: Gpa = Gpa::new(0x1_0000);
pub const CONTEXT: GuestContext = GuestContext { current_vmptr: CURRENT };

/// L2's memory: the given words, zero elsewhere below 16 MiB, nothing above.
#[derive(Clone, Default)]
pub struct Memory(pub HashMap<u64, u64>);

impl ReadsGuest for Memory {
    fn read_u32(&self, address: Gpa) -> Option<u32> {
        self.read_u64(address).map(|value| value as u32)
    }
    fn read_u64(&self, address: Gpa) -> Option<u64> {
        (address.get() < 16 << 20).then(|| self.0.get(&address.get()).copied().unwrap_or(0))
    }
}

/// The smallest values that `caps` accept in the control fields, plus 64-bit host and guest with EPT and VPID.
pub fn valid_vmcs12(caps: &Capabilities) -> Vmcs {
    use Field::*;
    let mut v = Vmcs::default();
    let primary = PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID;
    let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER | ExitControls::LOAD_PAT;
    let entry = EntryControls::IA32E_MODE_GUEST
        | EntryControls::LOAD_EFER
        | EntryControls::LOAD_PAT
        | EntryControls::LOAD_DEBUG_CONTROLS;
    v.set(PIN_BASED_VM_EXEC_CONTROL, caps.pin.with_required(PinControls::empty()).bits().into())
        .set(CPU_BASED_VM_EXEC_CONTROL, caps.primary.with_required(primary).bits().into())
        .set(SECONDARY_VM_EXEC_CONTROL, caps.secondary.with_required(secondary).bits().into())
        .set(VM_EXIT_CONTROLS, caps.exit.with_required(exit).bits().into())
        .set(VM_ENTRY_CONTROLS, caps.entry.with_required(entry).bits().into())
        .set(VIRTUAL_PROCESSOR_ID, 1)
        .set(EPT_POINTER, 0x20_0000 | 3 << 3 | 6)
        .set(VMCS_LINK_POINTER, u64::MAX);

    for field in [HOST_CR0, GUEST_CR0] {
        v.set(field, 0x8005_0033);
    }
    for field in [HOST_CR4, GUEST_CR4] {
        v.set(field, 0x2020);
    }
    for field in [HOST_IA32_EFER, GUEST_IA32_EFER] {
        v.set(field, 0xD01);
    }
    for field in [HOST_IA32_PAT, GUEST_IA32_PAT] {
        v.set(field, 0x0007_0406_0007_0406);
    }
    v.set(HOST_CR3, 0x1000).set(HOST_RIP, 0x10_0000).set(HOST_RSP, 0x9000);
    v.set(HOST_CS_SELECTOR, 8).set(HOST_SS_SELECTOR, 16).set(HOST_TR_SELECTOR, 24);

    v.set(GUEST_CR3, 0x3000).set(GUEST_RIP, 0x40_0000).set(GUEST_RFLAGS, 2).set(GUEST_DR7, 0x400);
    v.set(GUEST_CS_SELECTOR, 8).set(GUEST_CS_AR_BYTES, 0xA09B).set(GUEST_CS_LIMIT, 0xFFFF_FFFF);
    for (selector, rights, limit) in [
        (GUEST_SS_SELECTOR, GUEST_SS_AR_BYTES, GUEST_SS_LIMIT),
        (GUEST_DS_SELECTOR, GUEST_DS_AR_BYTES, GUEST_DS_LIMIT),
        (GUEST_ES_SELECTOR, GUEST_ES_AR_BYTES, GUEST_ES_LIMIT),
        (GUEST_FS_SELECTOR, GUEST_FS_AR_BYTES, GUEST_FS_LIMIT),
        (GUEST_GS_SELECTOR, GUEST_GS_AR_BYTES, GUEST_GS_LIMIT),
    ] {
        v.set(selector, 16).set(rights, 0xC093).set(limit, 0xFFFF_FFFF);
    }
    v.set(GUEST_TR_SELECTOR, 24).set(GUEST_TR_AR_BYTES, 0x8B).set(GUEST_TR_LIMIT, 0x67);
    v.set(GUEST_LDTR_AR_BYTES, 0x1_0000);
    v.set(GUEST_GDTR_LIMIT, 0x27).set(GUEST_IDTR_LIMIT, 0xFFF);
    v
}
