//! What a VMX machine can do: the values of the IA32_VMX_* MSRs, typed.
//!
//! The same type describes the machine under nvmx and the machine that nvmx shows to L2 (`rules::caps`), so every
//! check that asks "may this be set?" is written once.
//!
//! Source: Intel SDM vol. 3D (December 2024), appendix "VMX Capability Reporting Facility"; field existence: vol. 3D,
//! appendix "Field Encoding in VMCS".

mod words;

pub use words::{Allowed, Basic, EptVpid, Misc};

use super::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls, TertiaryControls};
use super::field::{Field, Needs};
use crate::x86::canonical::is_canonical;

/// Addresses of the capability MSRs.
#[allow(missing_docs)]
pub mod msr {
    pub const IA32_VMX_BASIC: u32 = 0x480;
    pub const IA32_VMX_PINBASED_CTLS: u32 = 0x481;
    pub const IA32_VMX_PROCBASED_CTLS: u32 = 0x482;
    pub const IA32_VMX_EXIT_CTLS: u32 = 0x483;
    pub const IA32_VMX_ENTRY_CTLS: u32 = 0x484;
    pub const IA32_VMX_MISC: u32 = 0x485;
    pub const IA32_VMX_CR0_FIXED0: u32 = 0x486;
    pub const IA32_VMX_CR0_FIXED1: u32 = 0x487;
    pub const IA32_VMX_CR4_FIXED0: u32 = 0x488;
    pub const IA32_VMX_CR4_FIXED1: u32 = 0x489;
    pub const IA32_VMX_VMCS_ENUM: u32 = 0x48A;
    pub const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48B;
    pub const IA32_VMX_EPT_VPID_CAP: u32 = 0x48C;
    pub const IA32_VMX_TRUE_PINBASED_CTLS: u32 = 0x48D;
    pub const IA32_VMX_TRUE_PROCBASED_CTLS: u32 = 0x48E;
    pub const IA32_VMX_TRUE_EXIT_CTLS: u32 = 0x48F;
    pub const IA32_VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
    pub const IA32_VMX_VMFUNC: u32 = 0x491;
    pub const IA32_VMX_PROCBASED_CTLS3: u32 = 0x492;
    /// First and last of the range that nvmx answers for, the tertiary and second exit controls included.
    pub const FIRST: u32 = IA32_VMX_BASIC;
    pub const LAST: u32 = 0x493;
}

/// The values of all capability MSRs, and the two CPUID widths that the checks need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Capabilities {
    pub basic: Basic,
    /// The original MSRs: bits of the default1 class are reported as 1.
    pub pin_default: Allowed<PinControls>,
    pub primary_default: Allowed<PrimaryControls>,
    pub exit_default: Allowed<ExitControls>,
    pub entry_default: Allowed<EntryControls>,
    /// What VM entry checks against: the TRUE MSRs, or the original ones on a processor without them.
    pub pin: Allowed<PinControls>,
    pub primary: Allowed<PrimaryControls>,
    pub secondary: Allowed<SecondaryControls>,
    /// Those whose 1-setting is allowed; none must be 1.
    pub tertiary: TertiaryControls,
    pub exit: Allowed<ExitControls>,
    pub entry: Allowed<EntryControls>,
    pub misc: Misc,
    pub cr0_fixed0: u64,
    pub cr0_fixed1: u64,
    pub cr4_fixed0: u64,
    pub cr4_fixed1: u64,
    pub vmcs_enum: u64,
    pub ept_vpid: EptVpid,
    pub vmfunc: u64,
    /// Physical-address width (CPUID 80000008H: EAX bits 7:0).
    pub physical_width: u32,
    /// Linear-address width (CPUID 80000008H: EAX bits 15:8).
    pub linear_width: u32,
    /// Bits of CR3 that are flags above the physical-address width: [`crate::x86::lam::CR3_FLAGS`] where the processor has LAM, else 0.
    /// [`Self::read`] says 0: CPUID tells.
    pub cr3_flags: u64,
    /// Bits of IA32_PERF_GLOBAL_CTRL that enable a counter; 0 where there is no such MSR. [`Self::read`] says 0: CPUID tells.
    pub counters: u64,
}

impl Capabilities {
    /// In which MSRs another processor of the same machine differs from this one.
    pub fn differences(&self, other: &Self) -> impl Iterator<Item = &'static str> + use<> {
        let controls = [
            ("IA32_VMX_PINBASED_CTLS", self.pin_default != other.pin_default || self.pin != other.pin),
            ("IA32_VMX_PROCBASED_CTLS", self.primary_default != other.primary_default || self.primary != other.primary),
            ("IA32_VMX_PROCBASED_CTLS2", self.secondary != other.secondary),
            ("IA32_VMX_EXIT_CTLS", self.exit_default != other.exit_default || self.exit != other.exit),
            ("IA32_VMX_ENTRY_CTLS", self.entry_default != other.entry_default || self.entry != other.entry),
        ];
        let words = [
            ("IA32_VMX_BASIC", self.basic.0, other.basic.0),
            ("IA32_VMX_MISC", self.misc.0, other.misc.0),
            ("IA32_VMX_CR0_FIXED0", self.cr0_fixed0, other.cr0_fixed0),
            ("IA32_VMX_CR0_FIXED1", self.cr0_fixed1, other.cr0_fixed1),
            ("IA32_VMX_CR4_FIXED0", self.cr4_fixed0, other.cr4_fixed0),
            ("IA32_VMX_CR4_FIXED1", self.cr4_fixed1, other.cr4_fixed1),
            ("IA32_VMX_VMCS_ENUM", self.vmcs_enum, other.vmcs_enum),
            ("IA32_VMX_EPT_VPID_CAP", self.ept_vpid.0, other.ept_vpid.0),
            ("IA32_VMX_VMFUNC", self.vmfunc, other.vmfunc),
        ]
        .map(|(name, one, another)| (name, one != another));
        controls.into_iter().chain(words).filter(|(_, differs)| *differs).map(|(name, _)| name)
    }

    /// Reads the MSRs by `rdmsr`, which is called only for those that exist on this processor.
    pub fn read(mut rdmsr: impl FnMut(u32) -> u64, physical_width: u32, linear_width: u32) -> Self {
        let basic = Basic(rdmsr(msr::IA32_VMX_BASIC));
        let pin = rdmsr(msr::IA32_VMX_PINBASED_CTLS);
        let primary = rdmsr(msr::IA32_VMX_PROCBASED_CTLS);
        let exit = rdmsr(msr::IA32_VMX_EXIT_CTLS);
        let entry = rdmsr(msr::IA32_VMX_ENTRY_CTLS);
        let mut or_true = |index, value| if basic.has_true_controls() { rdmsr(index) } else { value };
        let true_pin = or_true(msr::IA32_VMX_TRUE_PINBASED_CTLS, pin);
        let true_primary = or_true(msr::IA32_VMX_TRUE_PROCBASED_CTLS, primary);
        let true_exit = or_true(msr::IA32_VMX_TRUE_EXIT_CTLS, exit);
        let true_entry = or_true(msr::IA32_VMX_TRUE_ENTRY_CTLS, entry);

        let primary_allowed = Allowed::<PrimaryControls>::from_msr(true_primary);
        let mut when = |exists: bool, index| if exists { rdmsr(index) } else { 0 };
        let secondary = Allowed::<SecondaryControls>::from_msr(when(
            primary_allowed.allows(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS),
            msr::IA32_VMX_PROCBASED_CTLS2,
        ));
        let tertiary =
            when(primary_allowed.allows(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS), msr::IA32_VMX_PROCBASED_CTLS3);
        let has_ept_or_vpid =
            secondary.allows(SecondaryControls::ENABLE_EPT) || secondary.allows(SecondaryControls::ENABLE_VPID);
        let ept_vpid = EptVpid(when(has_ept_or_vpid, msr::IA32_VMX_EPT_VPID_CAP));
        let vmfunc = when(secondary.allows(SecondaryControls::ENABLE_VM_FUNCTIONS), msr::IA32_VMX_VMFUNC);

        Self {
            basic,
            pin_default: Allowed::from_msr(pin),
            primary_default: Allowed::from_msr(primary),
            exit_default: Allowed::from_msr(exit),
            entry_default: Allowed::from_msr(entry),
            pin: Allowed::from_msr(true_pin),
            primary: primary_allowed,
            secondary,
            tertiary: TertiaryControls::from_bits_retain(tertiary),
            exit: Allowed::from_msr(true_exit),
            entry: Allowed::from_msr(true_entry),
            misc: Misc(rdmsr(msr::IA32_VMX_MISC)),
            cr0_fixed0: rdmsr(msr::IA32_VMX_CR0_FIXED0),
            cr0_fixed1: rdmsr(msr::IA32_VMX_CR0_FIXED1),
            cr4_fixed0: rdmsr(msr::IA32_VMX_CR4_FIXED0),
            cr4_fixed1: rdmsr(msr::IA32_VMX_CR4_FIXED1),
            vmcs_enum: rdmsr(msr::IA32_VMX_VMCS_ENUM),
            ept_vpid,
            vmfunc,
            physical_width,
            linear_width,
            cr3_flags: 0,
            counters: 0,
        }
    }

    /// The value of a capability MSR, or `None` if this machine has no such MSR (RDMSR gives #GP(0)).
    pub fn msr(&self, index: u32) -> Option<u64> {
        let if_true = |value| self.basic.has_true_controls().then_some(value);
        let secondary = |controls| self.has_secondary_controls() && self.secondary.allows(controls);
        match index {
            msr::IA32_VMX_BASIC => Some(self.basic.0),
            msr::IA32_VMX_PINBASED_CTLS => Some(self.pin_default.to_msr()),
            msr::IA32_VMX_PROCBASED_CTLS => Some(self.primary_default.to_msr()),
            msr::IA32_VMX_EXIT_CTLS => Some(self.exit_default.to_msr()),
            msr::IA32_VMX_ENTRY_CTLS => Some(self.entry_default.to_msr()),
            msr::IA32_VMX_MISC => Some(self.misc.0),
            msr::IA32_VMX_CR0_FIXED0 => Some(self.cr0_fixed0),
            msr::IA32_VMX_CR0_FIXED1 => Some(self.cr0_fixed1),
            msr::IA32_VMX_CR4_FIXED0 => Some(self.cr4_fixed0),
            msr::IA32_VMX_CR4_FIXED1 => Some(self.cr4_fixed1),
            msr::IA32_VMX_VMCS_ENUM => Some(self.vmcs_enum),
            msr::IA32_VMX_PROCBASED_CTLS2 => self.has_secondary_controls().then_some(self.secondary.to_msr()),
            msr::IA32_VMX_EPT_VPID_CAP => {
                let exists = secondary(SecondaryControls::ENABLE_EPT) || secondary(SecondaryControls::ENABLE_VPID);
                exists.then_some(self.ept_vpid.0)
            }
            msr::IA32_VMX_TRUE_PINBASED_CTLS => if_true(self.pin.to_msr()),
            msr::IA32_VMX_TRUE_PROCBASED_CTLS => if_true(self.primary.to_msr()),
            msr::IA32_VMX_TRUE_EXIT_CTLS => if_true(self.exit.to_msr()),
            msr::IA32_VMX_TRUE_ENTRY_CTLS => if_true(self.entry.to_msr()),
            msr::IA32_VMX_VMFUNC => secondary(SecondaryControls::ENABLE_VM_FUNCTIONS).then_some(self.vmfunc),
            msr::IA32_VMX_PROCBASED_CTLS3 => {
                let exists = self.primary.allows(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS);
                exists.then_some(self.tertiary.bits())
            }
            _ => None,
        }
    }

    /// True if the secondary processor-based controls can be activated.
    pub fn has_secondary_controls(&self) -> bool {
        self.primary.allows(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
    }

    /// True if VMREAD of this field works on this machine.
    pub fn has_field(&self, field: Field) -> bool {
        let any = |may: u32, bits: u32| may & bits != 0;
        let secondary = if self.has_secondary_controls() { self.secondary.may_be_one() } else { 0 };
        match field.needs() {
            Needs::Always => true,
            Needs::Pin(bit) => any(self.pin.may_be_one(), 1 << bit),
            Needs::Primary(bit) => any(self.primary.may_be_one(), 1 << bit),
            Needs::Secondary(bit) => any(secondary, 1 << bit),
            Needs::Tertiary(bit) => {
                self.primary.allows(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS) && self.tertiary.bits() >> bit & 1 != 0
            }
            Needs::ExitOrEntry(exit, entry) => any(self.exit.may_be_one(), exit) || any(self.entry.may_be_one(), entry),
            Needs::VmFunc(bit) => {
                any(secondary, SecondaryControls::ENABLE_VM_FUNCTIONS.bits()) && self.vmfunc >> bit & 1 != 0
            }
        }
    }

    /// The value of IA32_VMX_VMCS_ENUM that fits the fields of this machine: the highest index, in bits 9:1.
    pub fn vmcs_enum_of_fields(&self) -> u64 {
        Field::ALL.iter().filter(|f| self.has_field(**f)).map(|f| u64::from(f.encoding() & 0x3FE)).max().unwrap_or(0)
    }

    /// True if `address` has no bit beyond what a pointer in a VMCS may have on this machine.
    pub fn is_physical(&self, address: u64) -> bool {
        let width = if self.basic.addresses_limited_to_32_bits() { 32 } else { self.physical_width };
        width >= 64 || address >> width == 0
    }

    /// True if CR3 may hold `value`: an address, and the flags of LAM.
    pub fn is_cr3(&self, value: u64) -> bool {
        self.physical_width >= 64 || (value & !self.cr3_flags) >> self.physical_width == 0
    }

    /// True if `address` is canonical on this machine.
    pub fn is_canonical(&self, address: u64) -> bool {
        is_canonical(address, self.linear_width)
    }

    /// True if CR0 may hold `value` in VMX operation.
    pub fn cr0_ok(&self, value: u64) -> bool {
        value & self.cr0_fixed0 == self.cr0_fixed0 && value & !self.cr0_fixed1 == 0
    }

    /// True if CR4 may hold `value` in VMX operation.
    pub fn cr4_ok(&self, value: u64) -> bool {
        value & self.cr4_fixed0 == self.cr4_fixed0 && value & !self.cr4_fixed1 == 0
    }
}
