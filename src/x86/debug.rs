//! Breakpoints on data, and the pending debug exceptions field.
//!
//! Source: Intel SDM vol. 3B (December 2024), "Debug Registers": "Debug Control Register (DR7)", "Breakpoint Field
//! Recognition"; vol. 3C, table "Format of Pending-Debug-Exceptions".

use super::DataAccess;

/// Bit 14 of the pending debug exceptions: a single step.
pub const PENDING_BS: u64 = 1 << 14;
/// Bit 12 of the pending debug exceptions: a breakpoint that was met is enabled.
pub const PENDING_ENABLED: u64 = 1 << 12;

/// IA32_DEBUGCTL: last-branch records
pub const DEBUGCTL_LBR: u64 = 1 << 0;
/// IA32_DEBUGCTL: single steps stop at branches alone.
pub const DEBUGCTL_BTF: u64 = 1 << 1;

/// L0 to G3 of DR7.
const ENABLES: u64 = 0xFF;

/// True if DR7 enables any breakpoint.
pub const fn any_enabled(dr7: u64) -> bool {
    dr7 & ENABLES != 0
}

/// What an access to `bytes` bytes from `linear` adds to the pending debug exceptions. The bytes do not wrap around the
/// address space.
///
/// With an enabled breakpoint the disabled ones whose conditions are met too are reported, as the SDM allows.
pub fn data_breakpoints(dr7: u64, addresses: [u64; 4], linear: u64, bytes: u64, access: DataAccess) -> u64 {
    const WRITES: u64 = 0b01;
    const READS_AND_WRITES: u64 = 0b11;
    let (mut met, mut enabled) = (0, false);
    for (number, address) in addresses.into_iter().enumerate() {
        let kind = dr7 >> (16 + 4 * number) & 3;
        let size: u64 = match dr7 >> (18 + 4 * number) & 3 {
            0b00 => 1,
            0b01 => 2,
            0b10 => 8,
            _ => 4,
        };
        let first = address & !(size - 1);
        let overlaps = bytes != 0 && linear.wrapping_sub(first) < size || first.wrapping_sub(linear) < bytes;
        if overlaps && (kind == READS_AND_WRITES || kind == WRITES && access == DataAccess::Write) {
            met |= 1 << number;
            enabled |= dr7 >> (2 * number) & 3 != 0;
        }
    }
    if enabled { met | PENDING_ENABLED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access(write: bool) -> DataAccess {
        if write { DataAccess::Write } else { DataAccess::Read }
    }

    /// What the SDM says of one breakpoint, byte by byte: its address, R/W, LEN, enables.
    fn byte_meets(address: u64, rw: u64, len: u64, byte: u64, write: bool) -> bool {
        let in_range = match len {
            0 => byte == address,
            1 => byte >> 1 == address >> 1,
            2 => byte >> 3 == address >> 3,
            _ => byte >> 2 == address >> 2,
        };
        in_range && (rw == 3 || rw == 1 && write)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn a_breakpoint_is_met_if_any_byte_of_the_access_is_in_its_range(
            addresses in prop::array::uniform4(0x1000u64..0x1030),
            settings in any::<u16>(), enables in any::<u8>(),
            linear in 0x1000u64..0x1030, bytes in prop::sample::select(vec![0u64, 1, 2, 4, 8, 16]), write: bool,
        ) {
            let dr7 = 0x400 | u64::from(enables) | u64::from(settings) << 16;
            let field = |number: usize| u64::from(settings) >> (4 * number) & 0xF;
            let met: Vec<usize> = (0..4)
                .filter(|&n| {
                    (linear..linear + bytes).any(|b| byte_meets(addresses[n], field(n) & 3, field(n) >> 2, b, write))
                })
                .collect();
            let enabled = met.iter().any(|n| enables >> (2 * n) & 3 != 0);
            let bits = met.iter().fold(1 << 12, |bits, n| bits | 1 << n);
            let expected = if enabled { bits } else { 0 };
            prop_assert_eq!(data_breakpoints(dr7, addresses, linear, bytes, access(write)), expected);
        }
    }

    #[test]
    fn breakpoints_at_the_edges_of_the_address_space() {
        // DR0: 8 bytes, reads and writes.
        let dr7 = 0b1011 << 16 | 1;
        let top = u64::MAX - 7;
        assert_eq!(data_breakpoints(dr7, [top, 0, 0, 0], u64::MAX, 1, DataAccess::Read), PENDING_ENABLED | 1);
        assert_eq!(data_breakpoints(dr7, [top, 0, 0, 0], 0, 16, DataAccess::Read), 0);
        assert_eq!(data_breakpoints(dr7, [0; 4], top, 8, DataAccess::Read), 0);
        assert_eq!(data_breakpoints(dr7, [0; 4], 7, 1, DataAccess::Read), PENDING_ENABLED | 1);
    }

    #[test]
    fn without_an_enable_nothing_is_pending() {
        assert_eq!(data_breakpoints(0xFFFF_0400, [0x1000; 4], 0x1000, 8, DataAccess::Write), 0);
        assert!(!any_enabled(0xFFFF_0400));
        for bit in 0..8 {
            assert!(any_enabled(0x400 | 1 << bit));
        }
    }
}
