//! Descriptors of segments and gates.
//!
//! Source: Intel SDM vol. 3A, "Segment Descriptors", figures "Format of TSS and LDT Descriptors in 64-bit Mode" and "64-Bit IDT Gate
//! Descriptors". The bits are those of the crate `x86_64`. Its tables do not serve: `Descriptor` is made for a TSS whose place the compiler
//! knows, and cannot be made of a guest's descriptor; `InterruptDescriptorTable` has its exceptions by name, where nvmx's stubs are
//! numbered, and reads CS to make a gate.

use x86_64::structures::gdt::DescriptorFlags;

/// nvmx's code segment, 64-bit.
pub const CODE_64: u64 = DescriptorFlags::KERNEL_CODE64.bits();
/// nvmx's data segment.
pub const DATA: u64 = DescriptorFlags::KERNEL_DATA.bits();

/// A flag where the VMCS holds it, in access rights: bits 47:40 and 55:52 of a descriptor are 7:0 and 15:12 there.
pub const fn in_rights(flag: DescriptorFlags) -> u32 {
    (flag.bits() >> 40) as u32
}

/// The byte of a descriptor that has type, S, DPL and P.
pub mod type_byte {
    use super::{DescriptorFlags as Flags, in_rights};

    /// P
    pub const PRESENT: u8 = in_rights(Flags::PRESENT) as u8;
    /// S: a code or data segment.
    pub const CODE_OR_DATA: u8 = in_rights(Flags::USER_SEGMENT) as u8;
    /// Type bit 0 of a code or data segment.
    pub const ACCESSED: u8 = in_rights(Flags::ACCESSED) as u8;
    /// Type bit 1 of a TSS.
    pub const BUSY: u8 = 1 << 1;
    /// An available 32-bit or 64-bit TSS, present.
    pub const TSS: u8 = PRESENT | 0x9;
    /// An LDT, present.
    pub const LDT: u8 = PRESENT | 0x2;
    /// Data that may be written, accessed and present.
    pub const WRITABLE_DATA: u8 = PRESENT | CODE_OR_DATA | in_rights(Flags::WRITABLE) as u8 | ACCESSED;
    /// Code that may be read, accessed and present.
    pub const READABLE_CODE: u8 = WRITABLE_DATA | in_rights(Flags::EXECUTABLE) as u8;
}

/// The 16-byte descriptor of an available TSS.
pub const fn tss(base: u64, limit: u16) -> [u64; 2] {
    let low = limit as u64 | (base & 0xFF_FFFF) << 16 | (type_byte::TSS as u64) << 40 | (base >> 24 & 0xFF) << 56;
    [low, base >> 32]
}

/// A present 64-bit interrupt gate for privilege level 0.
pub const fn interrupt_gate(selector: u16, offset: u64, ist: u64) -> [u64; 2] {
    const INTERRUPT_GATE: u64 = type_byte::PRESENT as u64 | 0xE;
    let low =
        offset & 0xFFFF | (selector as u64) << 16 | ist << 32 | INTERRUPT_GATE << 40 | (offset >> 16 & 0xFFFF) << 48;
    [low, offset >> 32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_64::VirtAddr;
    use x86_64::structures::gdt::Descriptor;
    use x86_64::structures::tss::TaskStateSegment;

    #[test]
    fn the_descriptor_of_a_tss_is_that_of_the_crate() {
        static TSS: TaskStateSegment = TaskStateSegment::new();
        let base = VirtAddr::from_ptr(&raw const TSS).as_u64();
        let Descriptor::SystemSegment(low, high) = Descriptor::tss_segment(&TSS) else { panic!("no system segment") };
        assert_eq!(tss(base, size_of::<TaskStateSegment>() as u16 - 1), [low, high]);
    }

    #[test]
    fn types_are_those_of_the_sdm() {
        use type_byte::*;
        assert_eq!([TSS, TSS | BUSY, LDT, WRITABLE_DATA, READABLE_CODE], [0x89, 0x8B, 0x82, 0x93, 0x9B]);
        let gate = interrupt_gate(8, 0x1234_5678_9ABC_DEF0, 2);
        assert_eq!(gate, [0x9ABC_8E02_0008_DEF0, 0x1234_5678]);
    }
}
