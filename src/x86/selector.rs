//! Segment selectors.
//!
//! Source: Intel SDM vol. 3A, "Segment Selectors". `SegmentSelector` of the crate `x86_64` has index and RPL; it does not tell
//! which table a selector names, and its RPL is an enum
//! where a number is compared.

/// TI: the selector names an entry of the LDT.
const TI: u16 = 1 << 2;

/// RPL, 0 to 3.
pub const fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

/// True if the selector names an entry of the LDT, false for the GDT.
pub const fn is_local(selector: u16) -> bool {
    selector & TI != 0
}

/// True for the null selector, whatever its RPL is.
pub const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Where the descriptor is in its table, in bytes.
pub const fn offset(selector: u16) -> u32 {
    selector as u32 & !7
}

/// The selector as the error code of an exception has it: TI and index.
pub const fn error_code(selector: u16) -> u32 {
    selector as u32 & !3
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_64::structures::gdt::SegmentSelector;

    #[test]
    fn index_and_rpl_are_those_of_the_crate() {
        for selector in 0..=u16::MAX {
            let theirs = SegmentSelector(selector);
            assert_eq!(rpl(selector), theirs.rpl() as u8);
            assert_eq!(offset(selector), u32::from(theirs.index()) * 8);
            assert_eq!(error_code(selector), offset(selector) + u32::from(is_local(selector)) * 4);
            assert_eq!(is_null(selector), error_code(selector) == 0);
        }
    }
}
