//! Features of the processor that CPUID does not show to L2: those whose MSRs or instructions nvmx refuses.
//!
//! Source: SDM vol. 2A, "CPUID", table "Information Returned by CPUID Instruction".

/// A register of CPUID's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use CpuidRegister::{Eax, Ebx, Ecx, Edx};

/// Bits that read as 0.
#[derive(Clone, Copy, Debug)]
pub struct Hidden {
    /// EAX and ECX of the CPUID.
    pub leaf: (u32, u32),
    /// The register.
    pub register: CpuidRegister,
    /// The bits.
    pub bits: u32,
    /// What they announce.
    pub name: &'static str,
    /// Where the policy on MSRs refuses the feature: one of its MSRs.
    pub msr: Option<u32>,
}

const fn hide(leaf: (u32, u32), register: CpuidRegister, bits: u32, name: &'static str, msr: Option<u32>) -> Hidden {
    Hidden { leaf, register, bits, name, msr }
}

/// All of them.
pub const HIDDEN: &[Hidden] = &[
    hide((1, 0), Ecx, 1 << 2 | 1 << 4, "DTES64, DS-CPL", Some(0x600)),
    hide((1, 0), Ecx, 1 << 6, "SMX", None),
    hide((1, 0), Edx, 1 << 21, "DS", Some(0x600)),
    hide((6, 0), Eax, 1 << 19 | 1 << 23, "hardware feedback interface, thread director", Some(0x17D0)),
    hide((6, 0), Ecx, 0xFF << 8, "classes of the thread director", Some(0x17D4)),
    hide((6, 0), Edx, u32::MAX, "capabilities of the hardware feedback interface", Some(0x17D0)),
    hide((7, 0), Ebx, 1 << 2, "SGX", Some(0x8C)),
    hide((7, 0), Ebx, 1 << 14, "MPX", Some(0xD90)),
    hide((7, 0), Ebx, 1 << 25, "Intel PT", Some(0x570)),
    hide((7, 0), Ecx, 1 << 13, "TME", Some(0x982)),
    hide((7, 0), Ecx, 1 << 30, "SGX launch control", Some(0x8C)),
    hide((7, 0), Edx, 1 << 18, "PCONFIG", Some(0x982)),
    hide((7, 0), Edx, 1 << 19, "architectural LBRs", Some(0x14CE)),
    hide((7, 0), Edx, 1 << 30, "IA32_CORE_CAPABILITIES", Some(0xCF)),
    hide((7, 1), Eax, 1 << 8, "performance monitoring by leaf 23H", Some(0x1900)),
    hide((7, 1), Eax, 1 << 17, "FRED", Some(0x1D4)),
    hide((7, 1), Eax, 1 << 27, "RDMSRLIST, WRMSRLIST", None),
    hide((7, 1), Edx, 1 << 15, "URDMSR, UWRMSR", Some(0x1C)),
    hide((7, 2), Edx, 1 << 6, "UC-lock disable", Some(0x33)),
    hide((0xD, 1), Ecx, 1 << 8, "state of Intel PT", Some(0x570)),
    hide((0xD, 1), Ecx, 1 << 15, "state of architectural LBRs", Some(0x14CE)),
];

/// Leaves of such features: they read as 0.
pub const EMPTY: &[(u32, &str)] = &[
    (0x12, "SGX"),
    (0x14, "Intel PT"),
    (0x1B, "PCONFIG"),
    (0x1C, "architectural LBRs"),
    (0x23, "performance monitoring, version 6"),
];

/// The bits that a register of a leaf shows.
pub const fn shown(leaf: (u32, u32), register: CpuidRegister) -> u32 {
    let (mut bits, mut i) = (u32::MAX, 0);
    while i < HIDDEN.len() {
        let row = &HIDDEN[i];
        if row.leaf.0 == leaf.0 && row.leaf.1 == leaf.1 && row.register as u8 == register as u8 {
            bits &= !row.bits;
        }
        i += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::CpuidRegister::{Eax, Ebx, Ecx, Edx};
    use super::*;

    /// The table a second time, by the numbers of the bits.
    #[test]
    fn exactly_these_bits_are_hidden() {
        let hidden: [((u32, u32), CpuidRegister, &[u32]); 11] = [
            ((1, 0), Ecx, &[2, 4, 6]),
            ((1, 0), Edx, &[21]),
            ((6, 0), Eax, &[19, 23]),
            ((6, 0), Ecx, &[8, 9, 10, 11, 12, 13, 14, 15]),
            ((7, 0), Ebx, &[2, 14, 25]),
            ((7, 0), Ecx, &[13, 30]),
            ((7, 0), Edx, &[18, 19, 30]),
            ((7, 1), Eax, &[8, 17, 27]),
            ((7, 1), Edx, &[15]),
            ((7, 2), Edx, &[6]),
            ((0xD, 1), Ecx, &[8, 15]),
        ];
        for leaf in (0..0x30).flat_map(|leaf| [(leaf, 0), (leaf, 1), (leaf, 2)]) {
            for register in [Eax, Ebx, Ecx, Edx] {
                let row = hidden.iter().find(|row| (row.0, row.1) == (leaf, register));
                let bits = row.map_or(0, |row| row.2.iter().map(|bit| 1 << bit).sum());
                let bits = if (leaf, register) == ((6, 0), Edx) { u32::MAX } else { bits };
                assert_eq!(!shown(leaf, register), bits, "leaf {leaf:x?} {register:?}");
            }
        }
    }
}
