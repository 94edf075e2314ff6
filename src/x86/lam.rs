//! Linear-address masking (LAM): bits of a pointer to data that the processor does not look at. A pointer says by its bit 63
//! whose rules hold for it: 0 the user's, in CR3, 1 the supervisor's, in CR4. Masking comes before the check that an address is
//! canonical, and is for data alone: not for code, nor for addresses that INVVPID invalidates.
//!
//! Source: Intel SDM vol. 3A, "Linear-Address Masking (LAM)", vol. 1, "Linear-Address Masking". The crate `x86_64` has none of it.

use super::Cr4;
use super::canonical::sign_extend;

/// CR3: pointers of the user have 57 bits; it wins over [`CR3_U48`].
pub const CR3_U57: u64 = 1 << 61;
/// CR3: pointers of the user have 48 bits.
pub const CR3_U48: u64 = 1 << 62;
/// The bits of CR3 that are no address where the processor has LAM.
pub const CR3_FLAGS: u64 = CR3_U57 | CR3_U48;

/// Which pointers are masked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Masking {
    /// CR3
    pub cr3: u64,
    /// CR4
    pub cr4: Cr4,
}

impl Masking {
    /// None is, as where the processor has no LAM.
    pub const OFF: Self = Self { cr3: 0, cr4: Cr4::empty() };

    /// The address that a pointer to data means in 64-bit mode.
    pub const fn address(self, pointer: u64) -> u64 {
        const SIGN: u64 = 1 << 63;
        let supervisor = pointer & SIGN != 0;
        let bits = match (supervisor, self.cr4.contains(Cr4::LAM_SUP), self.cr4.contains(Cr4::LA57)) {
            (true, true, true) => 57,
            (true, true, false) => 48,
            (false, _, _) if self.cr3 & CR3_U57 != 0 => 57,
            (false, _, _) if self.cr3 & CR3_U48 != 0 => 48,
            _ => return pointer,
        };
        sign_extend(pointer, bits) & !SIGN | pointer & SIGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit: which one each bit of the address is a copy of.
    fn expected(pointer: u64, cr3: u64, cr4: Cr4) -> u64 {
        let bit = |number: u32| pointer >> number & 1;
        let top = match bit(63) {
            0 if cr3 >> 61 & 1 == 1 => 56,
            0 if cr3 >> 62 & 1 == 1 => 47,
            1 if cr4.bits() >> 28 & 1 == 1 => {
                if cr4.bits() >> 12 & 1 == 1 {
                    56
                } else {
                    47
                }
            }
            _ => 63,
        };
        (0..64).fold(0, |address, number| address | bit(if number == 63 { 63 } else { number.min(top) }) << number)
    }

    #[test]
    fn each_bit_of_a_masked_pointer_is_its_own_or_a_copy_of_the_highest_that_counts() {
        let cr4s = [Cr4::empty(), Cr4::LAM_SUP, Cr4::LA57, Cr4::LAM_SUP | Cr4::LA57];
        for cr3 in [0, CR3_U57, CR3_U48, CR3_U57 | CR3_U48, 0x1000] {
            for cr4 in cr4s {
                for bit in 0..64 {
                    for pointer in [0u64, !0, 1 << 63, 0x0000_7FFF_FFFF_FFFF, 0xFF00_0000_0000_1000] {
                        let pointer = pointer ^ 1 << bit;
                        assert_eq!(
                            Masking { cr3, cr4 }.address(pointer),
                            expected(pointer, cr3, cr4),
                            "{pointer:#x} {cr3:#x} {cr4:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_pointer_with_a_tag_means_the_address_without_it() {
        let masked = |pointer, cr3, cr4| Masking { cr3, cr4 }.address(pointer);
        assert_eq!(masked(0x7E00_1234_5678_9ABC, CR3_U57, Cr4::empty()), 0x0000_1234_5678_9ABC);
        assert_eq!(masked(0x7FFF_1234_5678_9ABC, CR3_U48, Cr4::empty()), 0x0000_1234_5678_9ABC);
        assert_eq!(masked(0x8123_8234_5678_9ABC, 0, Cr4::LAM_SUP), 0xFFFF_8234_5678_9ABC);
        // The highest bit is no tag: the address is not canonical.
        assert_eq!(masked(0x8123_1234_5678_9ABC, 0, Cr4::LAM_SUP), 0x8000_1234_5678_9ABC);
        assert_eq!(masked(0x8123_8234_5678_9ABC, CR3_FLAGS, Cr4::empty()), 0x8123_8234_5678_9ABC);
    }
}
