//! The MTRRs that L2 sees: its own copy, which starts as firmware's.
//!
//! Under EPT the processor's MTRRs have no say in the type of a guest's accesses (SDM vol. 3C, "EPT and Memory Typing"):
//! ept01 has the types of the start. But they decide how nvmx's memory is cached while nvmx runs. So L2 reads back what it
//! writes, and the processor's stay as they are. What L2 may not write is refused as the processor would.
//!
//! Source: SDM vol. 3A, "Memory Type Range Registers (MTRRs)".

const DEF_TYPE: u32 = 0x2FF;
const CAP: u32 = 0xFE;
const VARIABLE: u32 = 0x200;
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F];
/// Registers of variable ranges that are kept: 32 pairs, as many as the policy on MSRs has.
const MOST: usize = 64;
const CAP_FIXED: u64 = 1 << 8;
/// IA32_MTRR_DEF_TYPE: type, fixed ranges on, all on.
const DEF_TYPE_BITS: u64 = 0xFF | 1 << 10 | 1 << 11;

/// L2's MTRRs on one processor.
#[derive(Clone, Debug)]
pub struct OwnMtrrs {
    /// `None` on a processor without.
    default_type: Option<u64>,
    fixed: Option<[u64; 11]>,
    variable: [u64; MOST],
    /// How many of `variable` there are.
    count: usize,
    /// Bits of a physical address.
    address: u64,
}

impl OwnMtrrs {
    /// Those of this processor. `present` is CPUID.1:EDX.MTRR.
    pub fn read(present: bool, physical_width: u32, rdmsr: impl Fn(u32) -> u64) -> Self {
        let cap = if present { rdmsr(CAP) } else { 0 };
        let count = (2 * (cap as usize & 0xFF)).min(MOST);
        let mut variable = [0; MOST];
        (VARIABLE..).zip(&mut variable[..count]).for_each(|(index, value)| *value = rdmsr(index));
        Self {
            default_type: present.then(|| rdmsr(DEF_TYPE)),
            fixed: (cap & CAP_FIXED != 0).then(|| FIXED.map(&rdmsr)),
            variable,
            count,
            address: 1u64.checked_shl(physical_width).unwrap_or(0).wrapping_sub(1),
        }
    }

    /// The register with this index, if the processor has it, and whether L2 may write `value` to it.
    fn register(&mut self, index: u32, value: u64) -> Option<(&mut u64, bool)> {
        let is_type = |byte: u8| matches!(byte, 0 | 1 | 4..=6);
        if index == DEF_TYPE {
            return self.default_type.as_mut().map(|r| (r, value & !DEF_TYPE_BITS == 0 && is_type(value as u8)));
        }
        if let Some(at) = FIXED.iter().position(|fixed| *fixed == index) {
            let fixed = self.fixed.as_mut()?.get_mut(at)?;
            return Some((fixed, value.to_le_bytes().into_iter().all(is_type)));
        }
        let at = index.checked_sub(VARIABLE)? as usize;
        let legal = match at % 2 {
            0 => value & 0xF00 == 0 && is_type(value as u8),
            _ => value & 0x7FF == 0,
        };
        self.variable.get_mut(..self.count)?.get_mut(at).map(|r| (r, legal && value & !self.address == 0))
    }

    /// What RDMSR yields; `None` for #GP.
    pub fn get(&self, index: u32) -> Option<u64> {
        // A copy: one function knows which registers there are.
        self.clone().register(index, 0).map(|(register, _)| *register)
    }

    /// WRMSR; false for #GP.
    pub fn set(&mut self, index: u32, value: u64) -> bool {
        match self.register(index, value) {
            Some((register, true)) => {
                *register = value;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A processor with two variable ranges and 39 bits of physical address.
    fn own() -> OwnMtrrs {
        OwnMtrrs::read(true, 39, |index| match index {
            CAP => 0x502,
            DEF_TYPE => 0xC06,
            0x200 => 6,
            _ => 0,
        })
    }

    #[test]
    fn the_guest_starts_with_firmware_s_and_reads_back_what_it_writes() {
        let mut own = own();
        assert_eq!((own.get(DEF_TYPE), own.get(0x200), own.get(0x203)), (Some(0xC06), Some(6), Some(0)));
        for (index, value) in
            [(DEF_TYPE, 0x800), (0x202, 0x7F_FFFF_F001), (0x203, 0x7F_FFFF_F800), (0x26F, 0x0605_0401_0006_0606)]
        {
            assert!(own.set(index, value), "{index:#x}");
            assert_eq!(own.get(index), Some(value));
        }
    }

    #[test]
    fn what_a_processor_refuses_changes_nothing() {
        let mut own = own();
        for (index, value) in [
            (DEF_TYPE, 0x902),
            (DEF_TYPE, 0x1000),
            (DEF_TYPE, 2),
            (0x200, 0x100),
            (0x200, 3),
            (0x200, 1 << 39),
            (0x201, 0x400),
            (0x201, 1 << 63),
            (0x250, 0x0706_0606_0606_0606),
            (0x204, 0),
            (0x251, 0),
        ] {
            let before = own.get(index);
            assert!(!own.set(index, value), "{index:#x} {value:#x}");
            assert_eq!(own.get(index), before);
        }
    }

    #[test]
    fn a_processor_without_has_none() {
        let mut none = OwnMtrrs::read(false, 36, |_| panic!("it would fault"));
        assert_eq!((none.get(DEF_TYPE), none.get(0x200), none.get(0x250)), (None, None, None));
        assert!(!none.set(DEF_TYPE, 0));
    }

    proptest! {
        #[test]
        fn each_register_keeps_its_own_value(writes in prop::collection::vec((0x1F0u32..0x310, any::<u64>()), 0..40)) {
            let mut own = own();
            let mut model = std::collections::HashMap::new();
            for (index, value) in writes {
                if own.set(index, value) {
                    model.insert(index, value);
                }
            }
            for (index, value) in model {
                prop_assert_eq!(own.get(index), Some(value));
            }
        }
    }
}
