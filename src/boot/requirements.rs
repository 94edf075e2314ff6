//! What the processor must have, and what it is.
//!
//! Source: Intel SDM vol. 3C, "Discovering Support for VMX" and "Enabling and Entering VMX Operation"; vol. 2A, "CPUID".

use core::fmt;

use arrayvec::{ArrayString, ArrayVec};
use raw_cpuid::{CpuId, CpuIdReader, Hypervisor};

use crate::vmx::caps::Capabilities;
use crate::x86::lam;
use crate::x86::msr::{FEATURE_LOCK, FEATURE_VMX, IA32_FEATURE_CONTROL, IA32_PERF_CAPABILITIES};

const IA32_TME_ACTIVATE: u32 = 0x982;

/// A requirement that the processor does not meet; its text is one line for a person.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// No VMX at all
    Vmx,
    /// VMX, but firmware has forbidden it
    EnabledByFirmware,
    /// No execute-disable pages
    NoExecute,
    /// Something that a capability MSR denies
    Capability(&'static str),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmx => f.write_str(
                "this CPU lacks VMX (CPUID.1:ECX.VMX = 0): nvmx needs an Intel CPU with VT-x; on KVM start with -cpu host \
                 and nested=1",
            ),
            Self::EnabledByFirmware => f.write_str(
                "firmware has disabled VMX (IA32_FEATURE_CONTROL is locked with bit 2 = 0): enable virtualization in the \
                 firmware's set-up",
            ),
            Self::NoExecute => {
                f.write_str("this CPU lacks execute-disable (CPUID.80000001H:EDX.NX = 0), or firmware has disabled it")
            }
            Self::Capability(what) => write!(f, "this CPU lacks {what}, which nvmx needs"),
        }
    }
}

/// What is known of the processor.
#[derive(Clone, Debug)]
pub struct FoundProcessor {
    /// Its name, as CPUID has it.
    pub brand: ArrayString<48>,
    /// What runs below nvmx: `bare`, or a hypervisor's name.
    pub below: &'static str,
    /// Its local APIC's id.
    pub apic_id: u32,
    /// Physical-address width in bits, without those that name a key of TME-MK: an address with one of these set is an alias
    /// of the memory without, which nobody may have of nvmx's.
    pub max_phys_addr: u8,
    /// Pages of 1 GiB in page tables.
    pub gib_pages: bool,
    /// It has MTRRs.
    pub mtrrs: bool,
    /// What VMX can do.
    pub vmx: Capabilities,
}

/// All requirements that are not met, at least one.
pub type MissingList = ArrayVec<Missing, 32>;

impl FoundProcessor {
    /// Examines this processor, and lists what it lacks: then only what does not need VMX is to be done on it. MSRs are read
    /// only when CPUID says that they exist.
    pub fn examine<R: CpuIdReader>(cpuid: &CpuId<R>, mut rdmsr: impl FnMut(u32) -> u64) -> (Self, MissingList) {
        let features = cpuid.get_feature_info();
        let extended = cpuid.get_extended_processor_and_feature_identifiers();
        let sizes = cpuid.get_processor_capacity_feature_info();
        let mut missing = MissingList::new();
        if !extended.as_ref().is_some_and(|e| e.has_execute_disable()) {
            missing.push(Missing::NoExecute);
        }
        let has_vmx = features.as_ref().is_some_and(|f| f.has_vmx());
        if !has_vmx {
            missing.push(Missing::Vmx);
        } else if rdmsr(IA32_FEATURE_CONTROL) & (FEATURE_LOCK | FEATURE_VMX) == FEATURE_LOCK {
            missing.push(Missing::EnabledByFirmware);
        }
        let encrypts = cpuid.get_extended_feature_info().is_some_and(|f| f.has_tme_en());
        let key_bits = if encrypts { key_bits(rdmsr(IA32_TME_ACTIVATE)) } else { 0 };
        let max_phys_addr = sizes.as_ref().map_or(36, |s| s.physical_address_bits()).saturating_sub(key_bits);
        let linear = sizes.as_ref().map_or(48, |s| s.linear_address_bits());
        let counters = counters(cpuid, &mut rdmsr);
        let capability = |index| if has_vmx { rdmsr(index) } else { 0 };
        let has_lam = cpuid.get_extended_feature_info().is_some_and(|f| f.has_lam());
        let vmx = Capabilities {
            cr3_flags: if has_lam { lam::CR3_FLAGS } else { 0 },
            counters,
            ..Capabilities::read(capability, max_phys_addr.into(), linear.into())
        };
        // Without VMX nothing else needs to be named.
        for what in vmx.missing_requirements().filter(|_| has_vmx) {
            if missing.try_push(Missing::Capability(what)).is_err() {
                break;
            }
        }
        let short_id = features.as_ref().map_or(0, |f| u32::from(f.initial_local_apic_id()));
        let long_id = cpuid.get_extended_topology_info().and_then(|mut levels| levels.next()).map(|l| l.x2apic_id());
        let processor = Self {
            brand: brand(cpuid),
            below: below(cpuid),
            apic_id: long_id.unwrap_or(short_id),
            max_phys_addr,
            gib_pages: extended.as_ref().is_some_and(|e| e.has_1gib_pages()),
            mtrrs: features.as_ref().is_some_and(|f| f.has_mtrr()),
            vmx,
        };
        (processor, missing)
    }

    /// In what another processor of the machine differs from this one, as far as nvmx takes them for equal.
    pub fn differences(&self, other: &Self) -> impl Iterator<Item = &'static str> + use<> {
        let others = [
            ("the width of physical addresses", self.max_phys_addr != other.max_phys_addr),
            ("the width of linear addresses", self.vmx.linear_width != other.vmx.linear_width),
            ("linear-address masking", self.vmx.cr3_flags != other.vmx.cr3_flags),
            ("performance counters", self.vmx.counters != other.vmx.counters),
            ("pages of 1 GiB", self.gib_pages != other.gib_pages),
            ("MTRRs", self.mtrrs != other.mtrrs),
        ];
        let others = others.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name);
        others.chain(self.vmx.differences(&other.vmx))
    }
}

/// IA32_TME_ACTIVATE: how many of the highest bits of a physical address are a key's number, those of TDX included. Firmware
/// has locked it, or there are none yet: L2 cannot write it.
///
/// Source: SDM vol. 4, table "IA-32 Architectural MSRs".
fn key_bits(tme_activate: u64) -> u8 {
    const ENABLED: u64 = 1 << 1;
    if tme_activate & ENABLED == 0 { 0 } else { (tme_activate >> 32 & 0xF) as u8 }
}

/// Of IA32_PERF_CAPABILITIES: IA32_PERF_METRICS exists.
const PERF_METRICS: u64 = 1 << 15;

/// The bits of IA32_PERF_GLOBAL_CTRL (SDM vol. 4): a general counter each from bit 0 on, a fixed one each from bit 32 on, and the
/// performance metrics. The MSR comes with version 2 of architectural
/// performance monitoring (SDM vol. 2A, CPUID leaf 0AH).
fn counters<R: CpuIdReader>(cpuid: &CpuId<R>, rdmsr: &mut impl FnMut(u32) -> u64) -> u64 {
    let first = |count: u8| if count < 32 { (1u64 << count) - 1 } else { u32::MAX.into() };
    let monitoring = cpuid.get_performance_monitoring_info().filter(|info| info.version_id() >= 2);
    let Some(info) = monitoring else { return 0 };
    let has_capabilities = cpuid.get_feature_info().is_some_and(|features| features.has_pdcm());
    let metrics = has_capabilities && rdmsr(IA32_PERF_CAPABILITIES) & PERF_METRICS != 0;
    first(info.number_of_counters()) | first(info.fixed_function_counters()) << 32 | u64::from(metrics) << 48
}

/// The brand string without the blanks that pad it, or the vendor.
fn brand<R: CpuIdReader>(cpuid: &CpuId<R>) -> ArrayString<48> {
    let text = |text: &str| ArrayString::from(text.trim()).unwrap_or_default();
    match (cpuid.get_processor_brand_string(), cpuid.get_vendor_info()) {
        (Some(brand), _) if !brand.as_str().trim().is_empty() => text(brand.as_str()),
        (_, Some(vendor)) => text(vendor.as_str()),
        _ => text("unknown"),
    }
}

/// What a processor has as `below` where that is KVM.
pub const KVM: &str = "KVM";

/// CPUID shows a hypervisor.
pub fn is_virtual<R: CpuIdReader>(cpuid: &CpuId<R>) -> bool {
    cpuid.get_feature_info().is_some_and(|f| f.has_hypervisor())
}

/// The hypervisor that CPUID shows, if any.
fn below<R: CpuIdReader>(cpuid: &CpuId<R>) -> &'static str {
    if !is_virtual(cpuid) {
        return "bare";
    }
    let leaf = cpuid.get_hypervisor_info();
    match leaf.as_ref().map(|info| info.identify()) {
        Some(Hypervisor::KVM) => KVM,
        Some(Hypervisor::QEMU) => "QEMU",
        Some(Hypervisor::Xen) => "Xen",
        Some(Hypervisor::HyperV) => "Hyper-V",
        Some(Hypervisor::VMware) => "VMware",
        Some(Hypervisor::Bhyve) => "bhyve",
        Some(Hypervisor::Unknown(ebx, ecx, edx)) => {
            let signature = [ebx, ecx, edx].map(u32::to_le_bytes);
            if signature.as_flattened() == l2_protocol::abi::SIGNATURE { "nvmx" } else { "hypervisor" }
        }
        _ => "hypervisor",
    }
}

#[cfg(test)]
mod tests {
    use raw_cpuid::CpuIdResult;

    use super::*;

    const VMX: u32 = 1 << 5;
    const NX: u32 = 1 << 20;

    fn examine(ecx: u32, edx: u32, feature_control: u64, msr: u64) -> (FoundProcessor, MissingList) {
        let leaves = move |leaf: u32, _: u32| {
            let (eax, ebx, ecx, edx) = match leaf {
                0 => (0x16, u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ntel"), u32::from_le_bytes(*b"ineI")),
                1 => (0x806C1, 7 << 24, ecx, 0),
                0x4000_0000 => (
                    0x4000_0000,
                    u32::from_le_bytes(*b"nvmx"),
                    u32::from_le_bytes(*b"nvmx"),
                    u32::from_le_bytes(*b"nvmx"),
                ),
                0x8000_0000 => (0x8000_0008, 0, 0, 0),
                0x8000_0001 => (0, 0, 0, edx),
                0x8000_0008 => (39 | 48 << 8, 0, 0, 0),
                _ => (0, 0, 0, 0),
            };
            CpuIdResult { eax, ebx, ecx, edx }
        };
        let rdmsr = |index| {
            assert!(ecx & VMX != 0, "no MSR of VMX may be read without VMX");
            if index == IA32_FEATURE_CONTROL { feature_control } else { msr }
        };
        FoundProcessor::examine(&CpuId::with_cpuid_reader(leaves), rdmsr)
    }

    fn texts((_, missing): (FoundProcessor, MissingList)) -> Vec<String> {
        missing.iter().map(Missing::to_string).collect()
    }

    #[test]
    fn a_processor_without_vmx_is_named_in_one_line() {
        let texts = texts(examine(0, NX, 0, 0));
        assert_eq!(texts.len(), 1);
        assert!(texts[0].starts_with("this CPU lacks VMX (CPUID.1:ECX.VMX = 0): nvmx needs an Intel CPU with VT-x"));
    }

    #[test]
    fn every_missing_requirement_is_listed() {
        let texts = texts(examine(VMX, 0, FEATURE_LOCK, 0));
        assert!(texts[0].contains("execute-disable"), "{texts:?}");
        assert!(texts[1].contains("firmware has disabled VMX"), "{texts:?}");
        assert!(texts.iter().any(|t| t.starts_with("this CPU lacks extended page tables")), "{texts:?}");
        assert!(texts.iter().any(|t| t.starts_with("this CPU lacks unrestricted guest")), "{texts:?}");
    }

    /// The width of a processor that has all that nvmx needs, with this IA32_TME_ACTIVATE; without the MSR if `tme` is not set.
    fn width(tme: bool, activate: u64) -> u8 {
        let leaves = move |leaf: u32, _: u32| {
            let (eax, ebx, ecx, edx) = match leaf {
                0 => (0x16, u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ntel"), u32::from_le_bytes(*b"ineI")),
                1 => (0x806C1, 0, VMX, 0),
                7 => (0, 0, u32::from(tme) << 13, 0),
                0x8000_0000 => (0x8000_0008, 0, 0, 0),
                0x8000_0001 => (0, 0, 0, NX),
                0x8000_0008 => (46 | 48 << 8, 0, 0, 0),
                _ => (0, 0, 0, 0),
            };
            CpuIdResult { eax, ebx, ecx, edx }
        };
        let all = 0xFFFF_FFFFu64 << 32;
        let rdmsr = |index| match index {
            IA32_TME_ACTIVATE => {
                assert!(tme, "the MSR does not exist");
                activate
            }
            0x480 => 6 << 50 | 0x1000 << 32 | 1 << 55,
            0x481..=0x484 | 0x48B | 0x48D..=0x490 => all,
            0x48C => u64::MAX,
            _ => 0,
        };
        let (processor, missing) = FoundProcessor::examine(&CpuId::with_cpuid_reader(leaves), rdmsr);
        assert!(missing.is_empty(), "{missing:?}");
        let width = processor.max_phys_addr;
        assert_eq!(processor.vmx.physical_width, u32::from(width), "addresses in a VMCS go by it too");
        width
    }

    #[test]
    fn bits_of_an_address_that_name_a_key_are_not_the_guest_s() {
        assert_eq!(width(false, u64::MAX), 46);
        assert_eq!(width(true, 0), 46, "without encryption");
        assert_eq!(width(true, 1), 46, "locked, off");
        assert_eq!(width(true, 6 << 32 | 1), 46, "off");
        assert_eq!(width(true, 0b11), 46, "one key for all memory");
        assert_eq!(width(true, 6 << 32 | 0b11), 40);
        // Three of the six are TDX's: they are among the six.
        assert_eq!(width(true, 3 << 36 | 6 << 32 | 0b11), 40);
    }

    #[test]
    fn cr3_has_flags_where_cpuid_has_linear_address_masking() {
        for (eax, flags) in [(0, 0), (1 << 26, 3 << 61), (!(1 << 26), 0)] {
            let leaves = move |leaf: u32, subleaf: u32| match (leaf, subleaf) {
                (0, _) => CpuIdResult { eax: 7, ebx: 0, ecx: 0, edx: 0 },
                (7, 1) => CpuIdResult { eax, ebx: 0, ecx: 0, edx: 0 },
                _ => CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
            };
            let (processor, _) = FoundProcessor::examine(&CpuId::with_cpuid_reader(leaves), |_| 0);
            assert_eq!(processor.vmx.cr3_flags, flags, "{eax:#x}");
        }
    }

    #[test]
    fn counters_are_those_that_cpuid_lists_from_version_2_on() {
        const PDCM: u32 = 1 << 15;
        for (eax, edx, ecx, capabilities, bits) in [
            (0x0830_0805, 0x8604, 0, u64::MAX, 0xF_0000_00FF),
            (0x0830_0805, 0x8604, PDCM, 1 << 15, 0x1_000F_0000_00FF),
            (0x0830_0805, 0x8604, PDCM, !(1 << 15), 0xF_0000_00FF),
            (0x0830_0802, 0, 0, 0, 0xFF),
            (0x0830_0801, 4, PDCM, u64::MAX, 0),
            (0, 4, 0, 0, 0),
            (0xFF02, 31, 0, 0, 0x7FFF_FFFF_FFFF_FFFF),
        ] {
            let leaves = move |leaf: u32, _: u32| {
                let (eax, ecx, edx) = match leaf {
                    0 => (0xA, 0, 0),
                    1 => (0, ecx, 0),
                    0xA => (eax, 0, edx),
                    _ => (0, 0, 0),
                };
                CpuIdResult { eax, ebx: 0, ecx, edx }
            };
            let rdmsr = |index| if index == IA32_PERF_CAPABILITIES { capabilities } else { 0 };
            let (processor, _) = FoundProcessor::examine(&CpuId::with_cpuid_reader(leaves), rdmsr);
            assert_eq!(processor.vmx.counters, bits, "{eax:#x} {capabilities:#x}");
        }
    }

    #[test]
    fn a_processor_that_differs_from_the_first_one_is_told_by_what() {
        let (first, _) = examine(VMX, NX, 0, u64::MAX);
        assert_eq!(first.differences(&first.clone()).count(), 0);
        let (without, _) = examine(VMX, NX, 0, u64::MAX);
        let mut vmx = without.vmx;
        vmx.misc.0 ^= 1 << 8;
        vmx.vmfunc = 0;
        let other = FoundProcessor { vmx, gib_pages: !without.gib_pages, ..without };
        let said: Vec<_> = first.differences(&other).collect();
        assert_eq!(said, ["pages of 1 GiB", "IA32_VMX_MISC", "IA32_VMX_VMFUNC"]);
        // All words of the capability MSRs: none is passed over.
        let (none, _) = examine(VMX, NX, 0, 0);
        assert!(first.differences(&none).count() >= 10);
    }

    #[test]
    fn vmx_that_firmware_left_unlocked_is_fine() {
        assert!(!texts(examine(VMX, NX, 0, 0)).iter().any(|t| t.contains("firmware has disabled")));
        assert!(!texts(examine(VMX, NX, 5, 0)).iter().any(|t| t.contains("firmware has disabled")));
    }
}
