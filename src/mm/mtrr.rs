//! Memory types from the MTRRs.
//!
//! Source: Intel SDM vol. 3A, "Memory Type Range Registers (MTRRs)": tables "IA32_MTRR_DEF_TYPE MSR", "Address Mapping for
//! Fixed-Range MTRRs", and "MTRR Precedences".

use arrayvec::ArrayVec;

use crate::mm::Span;

/// A memory type, encoded as MTRRs, PAT and EPT entries encode it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum MemoryType {
    /// UC
    Uncacheable = 0,
    /// WC
    WriteCombining = 1,
    /// WT
    WriteThrough = 4,
    /// WP
    WriteProtected = 5,
    /// WB
    WriteBack = 6,
}

impl MemoryType {
    /// From the encoding; reserved encodings count as uncacheable, which is always safe.
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::WriteCombining,
            4 => Self::WriteThrough,
            5 => Self::WriteProtected,
            6 => Self::WriteBack,
            _ => Self::Uncacheable,
        }
    }

    /// What holds where two variable ranges overlap: UC wins, WT wins over WB, anything else is undefined: UC then.
    const fn overlapped_with(self, other: Self) -> Self {
        match (self, other) {
            (Self::WriteThrough, Self::WriteBack) | (Self::WriteBack, Self::WriteThrough) => Self::WriteThrough,
            (a, b) if a as u8 == b as u8 => a,
            _ => Self::Uncacheable,
        }
    }
}

/// Most variable ranges nvmx reads; IA32_MTRRCAP has room for 255, processors have 8 to 10.
pub const MAX_VARIABLE: usize = 32;

/// Index of IA32_MTRRCAP.
const IA32_MTRRCAP: u32 = 0xFE;
/// Index of IA32_MTRR_DEF_TYPE.
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// Index of IA32_MTRR_PHYSBASE0; PHYSBASEn is at twice n from here, PHYSMASKn is the one behind it.
const IA32_MTRR_PHYSBASE0: u32 = 0x200;
/// Indices of the fixed-range MTRRs in ascending order of address.
const IA32_MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F];

/// First address that fixed ranges do not describe.
const FIXED_END: u64 = 0x10_0000;

/// The MTRRs of the machine, as read once at boot.
#[derive(Clone, Debug)]
pub struct Mtrrs {
    default_type: u64,
    fixed: Option<[u64; 11]>,
    /// PHYSBASEn and PHYSMASKn of the valid ones.
    variable: ArrayVec<(u64, u64), MAX_VARIABLE>,
    /// Bits of PHYSMASKn that take part in the comparison: up to the physical-address width.
    address_bits: u64,
}

impl Mtrrs {
    /// Reads them with `rdmsr`. On a processor without MTRRs (CPUID.1:EDX bit 12) use [`Mtrrs::none`].
    pub fn read(max_phys_addr: u8, mut rdmsr: impl FnMut(u32) -> u64) -> Self {
        let cap = rdmsr(IA32_MTRRCAP);
        let fixed = (cap & 1 << 8 != 0).then(|| IA32_MTRR_FIXED.map(&mut rdmsr));
        let mut variable = ArrayVec::new();
        for n in 0..(cap as u32 & 0xFF).min(MAX_VARIABLE as u32) {
            let pair = (rdmsr(IA32_MTRR_PHYSBASE0 + 2 * n), rdmsr(IA32_MTRR_PHYSBASE0 + 2 * n + 1));
            if pair.1 & MASK_VALID != 0 {
                variable.push(pair);
            }
        }
        let address_bits = 1u64.checked_shl(max_phys_addr.into()).unwrap_or(0).wrapping_sub(1) & !0xFFF;
        Self { default_type: rdmsr(IA32_MTRR_DEF_TYPE), fixed, variable, address_bits }
    }

    /// A machine without MTRRs: everything is write-back.
    pub fn none() -> Self {
        let default_type = DEF_TYPE_ENABLE | MemoryType::WriteBack as u64;
        Self { default_type, fixed: None, variable: ArrayVec::new(), address_bits: 0 }
    }

    /// The one type of the naturally aligned block of `size` bytes (a power of two, at least 4 KiB) around `at`, or
    /// `None` when it is not all of one type. May say `None` for a block that happens to be of one type only because
    /// ranges complement each other; never for a single page.
    pub fn type_of(&self, at: u64, size: u64) -> Option<MemoryType> {
        let start = at & !(size - 1);
        if self.default_type & DEF_TYPE_ENABLE == 0 {
            return Some(MemoryType::Uncacheable);
        }
        if start < FIXED_END && self.default_type & DEF_TYPE_FIXED_ENABLE != 0 {
            if let Some(fixed) = &self.fixed {
                return self.fixed_type(fixed, Span::sized(start, size));
            }
        }
        self.variable_type(start, size)
    }

    fn variable_type(&self, start: u64, size: u64) -> Option<MemoryType> {
        let within = size - 1;
        let mut found: Option<MemoryType> = None;
        for (base, mask) in &self.variable {
            let mask = mask & self.address_bits;
            // Bits above the block decide whether any of it can match, bits within whether all of it does.
            if (start ^ base) & mask & !within != 0 {
                continue;
            }
            if mask & within != 0 {
                return None;
            }
            let this = MemoryType::from_raw(*base as u8);
            found = Some(found.map_or(this, |f| f.overlapped_with(this)));
        }
        Some(found.unwrap_or(MemoryType::from_raw(self.default_type as u8)))
    }

    fn fixed_type(&self, fixed: &[u64; 11], block: Span) -> Option<MemoryType> {
        let mut found: Option<MemoryType> = None;
        let mut at = block.start();
        while at < block.end().min(FIXED_END) {
            let (register, byte) = fixed_slot(at);
            let this = MemoryType::from_raw((fixed.get(register)? >> (8 * byte)) as u8);
            match found {
                Some(f) if f != this => return None,
                _ => found = Some(this),
            }
            at += 0x1000;
        }
        if block.end() > FIXED_END {
            // The block reaches above the first MiB: halve it, the upper part belongs to the variable ranges.
            let mut start = FIXED_END;
            while start < block.end() {
                if Some(self.variable_type(start, start)?) != found {
                    return None;
                }
                start *= 2;
            }
        }
        found
    }
}

const MASK_VALID: u64 = 1 << 11;
const DEF_TYPE_ENABLE: u64 = 1 << 11;
const DEF_TYPE_FIXED_ENABLE: u64 = 1 << 10;

/// The register (index into [`IA32_MTRR_FIXED`]) and the byte in it for an address below 1 MiB.
const fn fixed_slot(at: u64) -> (usize, u64) {
    match at {
        0..0x8_0000 => (0, at >> 16),
        0x8_0000..0xC_0000 => (1 + ((at - 0x8_0000) >> 17) as usize, (at >> 14) & 7),
        _ => (3 + ((at - 0xC_0000) >> 15) as usize, (at >> 12) & 7),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const ENABLED: u64 = DEF_TYPE_ENABLE | DEF_TYPE_FIXED_ENABLE;

    /// The usual PC: WB by default, a UC hole from 3 to 4 GiB, UC video memory and WP ROM below 1 MiB.
    fn pc() -> Mtrrs {
        let mut msrs: HashMap<u32, u64> = HashMap::new();
        msrs.insert(IA32_MTRRCAP, 0x508);
        msrs.insert(IA32_MTRR_DEF_TYPE, ENABLED | 6);
        msrs.insert(0x200, 0xC000_0000);
        msrs.insert(0x201, 0xF_C000_0800);
        for (i, index) in IA32_MTRR_FIXED.iter().enumerate() {
            let value = [6, 6, 0, 5, 5, 5, 5, 5, 5, 5, 5][i];
            msrs.insert(*index, 0x0101_0101_0101_0101 * value);
        }
        Mtrrs::read(36, |index| msrs.get(&index).copied().unwrap_or(0))
    }

    #[test]
    fn a_pc_has_the_expected_types() {
        let mtrrs = pc();
        assert_eq!(mtrrs.type_of(0x7_F000, 0x1000), Some(MemoryType::WriteBack));
        assert_eq!(mtrrs.type_of(0x9_F000, 0x1000), Some(MemoryType::WriteBack));
        assert_eq!(mtrrs.type_of(0xA_0000, 0x1000), Some(MemoryType::Uncacheable));
        assert_eq!(mtrrs.type_of(0xC_0000, 0x1000), Some(MemoryType::WriteProtected));
        assert_eq!(mtrrs.type_of(0xF_F000, 0x1000), Some(MemoryType::WriteProtected));
        assert_eq!(mtrrs.type_of(0x10_0000, 0x1000), Some(MemoryType::WriteBack));
        assert_eq!(mtrrs.type_of(0, 0x20_0000), None);
        assert_eq!(mtrrs.type_of(0x20_0000, 0x20_0000), Some(MemoryType::WriteBack));
        assert_eq!(mtrrs.type_of(0x4000_0000, 0x4000_0000), Some(MemoryType::WriteBack));
        assert_eq!(mtrrs.type_of(0xFEE0_0000, 0x4000_0000), Some(MemoryType::Uncacheable));
        assert_eq!(mtrrs.type_of(0x8000_0000, 0x8000_0000), None);
    }

    /// A server with 2 TiB, 46 bits wide: UC by default, and ten ranges that make memory of it: 2 GiB below the hole for devices,
    /// and what lies above 4 GiB up to 2 TiB and 2 GiB, but for a UC piece for 64-bit devices.
    fn server() -> Mtrrs {
        let gib = |n: u64| n << 30;
        let mask = |size: u64| ((1u64 << 46) - size) | MASK_VALID;
        let ranges = [
            (0, gib(2), 6u64),
            (gib(4), gib(4), 6),
            (gib(8), gib(8), 6),
            (gib(16), gib(16), 6),
            (gib(32), gib(32), 6),
            (gib(64), gib(64), 6),
            (gib(128), gib(128), 6),
            (gib(256), gib(256), 6),
            (gib(512), gib(512), 6),
            (gib(1024), gib(1024), 6),
            (gib(2048), gib(2), 6),
            (gib(1536), gib(1), 0),
        ];
        Mtrrs::read(46, |index| match index {
            IA32_MTRRCAP => ranges.len() as u64,
            IA32_MTRR_DEF_TYPE => DEF_TYPE_ENABLE,
            0x200.. if (index as usize - 0x200) / 2 < ranges.len() => {
                let (base, size, kind) = ranges[(index as usize - 0x200) / 2];
                if index % 2 == 0 { base | kind } else { mask(size) }
            }
            _ => 0,
        })
    }

    #[test]
    fn a_machine_with_2_tib_has_write_back_memory_in_the_largest_pages() {
        const GIB: u64 = 1 << 30;
        let mtrrs = server();
        let kind = |gib: u64| match gib {
            0..=1 | 4..=1535 | 1537..=2049 => MemoryType::WriteBack,
            _ => MemoryType::Uncacheable,
        };
        for gib in 0..2060 {
            assert_eq!(mtrrs.type_of(gib * GIB, GIB), Some(kind(gib)), "GiB {gib}");
            assert_eq!(mtrrs.type_of(gib * GIB + 0x1F_F000, 0x1000), Some(kind(gib)), "in GiB {gib}");
        }
        // Half of the address space: not of one type.
        assert_eq!(mtrrs.type_of(0, 1 << 45), None);
        assert_eq!(mtrrs.type_of(1 << 45, GIB), Some(MemoryType::Uncacheable));
    }

    #[test]
    fn disabled_mtrrs_mean_uncacheable() {
        let mtrrs = Mtrrs::read(36, |index| if index == IA32_MTRR_DEF_TYPE { 6 } else { 0 });
        assert_eq!(mtrrs.type_of(0x10_0000, 0x1000), Some(MemoryType::Uncacheable));
    }

    #[test]
    fn where_ranges_overlap_uncacheable_wins_and_write_through_beats_write_back() {
        let with = |a: u64, b: u64| {
            let value = move |index| match index {
                IA32_MTRRCAP => 2,
                IA32_MTRR_DEF_TYPE => DEF_TYPE_ENABLE | 5,
                0x200 => a,
                0x202 => b,
                _ => MASK_VALID,
            };
            Mtrrs::read(36, value).type_of(0x20_0000, 0x1000)
        };
        assert_eq!(with(6, 0), Some(MemoryType::Uncacheable));
        assert_eq!(with(6, 4), Some(MemoryType::WriteThrough));
        assert_eq!(with(6, 6), Some(MemoryType::WriteBack));
        assert_eq!(with(6, 1), Some(MemoryType::Uncacheable));
    }

    proptest! {
        #[test]
        fn every_page_of_a_block_has_the_type_of_the_block(
            fixed in prop::array::uniform11(prop::sample::select(vec![0u64, 0x0606_0606_0606_0606, 0x0606_0606_0000_0000])),
            variable in prop::collection::vec((0u64..0x800, 0u32..12, prop::sample::select(vec![0u64, 1, 4, 5, 6])), 0..5),
            default in prop::sample::select(vec![0u64, 6]),
            block in 0u64..0x800, order in 0u32..10,
        ) {
            let value = |index: u32| match index {
                IA32_MTRRCAP => 0x100 | variable.len() as u64,
                IA32_MTRR_DEF_TYPE => ENABLED | default,
                0x200..0x210 => variable.get((index as usize - 0x200) / 2).map_or(0, |(page, order, kind)| {
                    if index % 2 == 0 { page << 12 | kind } else { (u64::MAX << (order + 12)) & 0xF_FFFF_F000 | MASK_VALID }
                }),
                _ => IA32_MTRR_FIXED.iter().position(|i| *i == index).map_or(0, |i| fixed[i]),
            };
            let mtrrs = Mtrrs::read(36, value);
            let size = 0x1000u64 << order;
            let start = (block << 12) & !(size - 1);
            let pages: Vec<_> = (0..1 << order).map(|i| mtrrs.type_of(start + i * 0x1000, 0x1000)).collect();
            prop_assert!(pages.iter().all(Option::is_some));
            if let Some(kind) = mtrrs.type_of(start, size) {
                prop_assert!(pages.iter().all(|p| *p == Some(kind)));
            }
        }
    }
}
