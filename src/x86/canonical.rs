//! Canonical addresses.
//!
//! Source: Intel SDM vol. 1, "Canonical Addressing". The crate `x86_64` knows 48 bits alone: its `VirtAddr` answers for those, and nothing
//! else is made of it, since `new` panics on a guest's address and `new_truncate` makes another address of it.

use x86_64::VirtAddr;

/// True of an address of 48 bits.
pub fn is_canonical_48(address: u64) -> bool {
    VirtAddr::try_new(address).is_ok()
}

/// True of an address of so many bits: 57 with 5-level paging.
pub const fn is_canonical(address: u64, width: u32) -> bool {
    match 64u32.checked_sub(width) {
        None => true,
        Some(64) => false,
        Some(_) => sign_extend(address, width) == address,
    }
}

/// The address whose bits above so many (1 to 64) are copies of the highest of these.
pub const fn sign_extend(address: u64, width: u32) -> u64 {
    let unused = 64 - width;
    ((address << unused) as i64 >> unused) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_agree_on_48_bits(high in 0u64..=u64::MAX, shift in 0u32..64) {
            for address in [high, high >> shift, !(high >> shift), 1 << shift, !0 << shift, (1u64 << shift) - 1] {
                prop_assert_eq!(is_canonical_48(address), is_canonical(address, 48), "{:#x}", address);
            }
        }
    }

    #[test]
    fn of_57_bits_more_are_canonical() {
        assert!(is_canonical(0x00FF_FFFF_FFFF_FFFF, 57) && !is_canonical(0x0100_0000_0000_0000, 57));
        assert!(is_canonical(0xFF00_0000_0000_0000, 57) && !is_canonical(0xFE00_0000_0000_0000, 57));
        assert!(is_canonical(u64::MAX / 3, 64) && !is_canonical(1, 0));
    }
}
