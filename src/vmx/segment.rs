//! Segment registers as the VMCS holds them.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Guest Register State", table "Format of Access Rights".

use super::field::Field;
use crate::x86::descriptor::in_rights;
use crate::x86::descriptor::type_byte::{BUSY, LDT, READABLE_CODE, TSS, WRITABLE_DATA};
use x86_64::structures::gdt::DescriptorFlags as Flags;

/// A segment register with four fields in the guest-state area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Segment {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
    Ldtr = 6,
    Tr = 7,
}

macro_rules! segment_fields {
    ($($(#[$doc:meta])* $method:ident: $es:ident $cs:ident $ss:ident $ds:ident $fs:ident $gs:ident $ldtr:ident $tr:ident;)*) => {
        impl Segment { $(
            $(#[$doc])*
            pub const fn $method(self) -> Field {
                match self {
                    Segment::Es => Field::$es,
                    Segment::Cs => Field::$cs,
                    Segment::Ss => Field::$ss,
                    Segment::Ds => Field::$ds,
                    Segment::Fs => Field::$fs,
                    Segment::Gs => Field::$gs,
                    Segment::Ldtr => Field::$ldtr,
                    Segment::Tr => Field::$tr,
                }
            }
        )* }
    };
}

segment_fields! {
    /// The field of its selector.
    selector: GUEST_ES_SELECTOR GUEST_CS_SELECTOR GUEST_SS_SELECTOR GUEST_DS_SELECTOR
              GUEST_FS_SELECTOR GUEST_GS_SELECTOR GUEST_LDTR_SELECTOR GUEST_TR_SELECTOR;
    /// The field of its base.
    base: GUEST_ES_BASE GUEST_CS_BASE GUEST_SS_BASE GUEST_DS_BASE
          GUEST_FS_BASE GUEST_GS_BASE GUEST_LDTR_BASE GUEST_TR_BASE;
    /// The field of its limit.
    limit: GUEST_ES_LIMIT GUEST_CS_LIMIT GUEST_SS_LIMIT GUEST_DS_LIMIT
           GUEST_FS_LIMIT GUEST_GS_LIMIT GUEST_LDTR_LIMIT GUEST_TR_LIMIT;
    /// The field of its access rights.
    rights: GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES
            GUEST_FS_AR_BYTES GUEST_GS_AR_BYTES GUEST_LDTR_AR_BYTES GUEST_TR_AR_BYTES;
}

impl Segment {
    /// The register for a number in an instruction-information field (0 = ES .. 5 = GS).
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Es),
            1 => Some(Self::Cs),
            2 => Some(Self::Ss),
            3 => Some(Self::Ds),
            4 => Some(Self::Fs),
            5 => Some(Self::Gs),
            _ => None,
        }
    }
}

/// The access rights of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// Bit 16: the segment is unusable.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Bits 6:5: the privilege level of the descriptor; of SS, the CPL.
    pub const DPL: u32 = in_rights(Flags::DPL_RING_3);
    /// Data of 64 KiB, as after a reset.
    pub const DATA_16: Self = Self(WRITABLE_DATA as u32);
    /// Flat data.
    pub const DATA_32: Self = Self(WRITABLE_DATA as u32 | in_rights(Flags::DEFAULT_SIZE.union(Flags::GRANULARITY)));
    /// Flat 32-bit code.
    pub const CODE_32: Self = Self(READABLE_CODE as u32 | in_rights(Flags::DEFAULT_SIZE.union(Flags::GRANULARITY)));
    /// 64-bit code.
    pub const CODE_64: Self = Self(READABLE_CODE as u32 | in_rights(Flags::LONG_MODE.union(Flags::GRANULARITY)));
    /// A TSS that a task runs on.
    pub const BUSY_TSS: Self = Self(TSS as u32 | BUSY as u32);
    /// An LDT.
    pub const LOCAL_TABLE: Self = Self(LDT as u32);
    const RESERVED: u32 = 0xF00 | 0xFFFE_0000;

    /// Type, bits 3:0.
    pub const fn kind(self) -> u8 {
        self.0 as u8 & 0xF
    }
    /// S: a code or data segment.
    pub const fn is_code_or_data(self) -> bool {
        self.0 & in_rights(Flags::USER_SEGMENT) != 0
    }
    /// Descriptor privilege level, bits 6:5.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5) as u8 & 3
    }
    /// P
    pub const fn is_present(self) -> bool {
        self.0 & in_rights(Flags::PRESENT) != 0
    }
    /// L: 64-bit code, in CS only.
    pub const fn is_64_bit_code(self) -> bool {
        self.0 & in_rights(Flags::LONG_MODE) != 0
    }
    /// D/B: 32-bit operands and addresses, or a 32-bit upper bound of an expand-down segment.
    pub const fn is_32_bit(self) -> bool {
        self.0 & in_rights(Flags::DEFAULT_SIZE) != 0
    }
    /// G: the limit counts pages.
    pub const fn granularity(self) -> bool {
        self.0 & in_rights(Flags::GRANULARITY) != 0
    }
    /// The segment is unusable.
    pub const fn is_unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }
    /// Reserved bits: 11:8 and 31:17.
    pub const fn reserved(self) -> u32 {
        self.0 & Self::RESERVED
    }
    /// Type bit 0.
    pub const fn is_accessed(self) -> bool {
        self.0 & 1 != 0
    }
    /// Type bit 3.
    pub const fn is_code(self) -> bool {
        self.0 & 1 << 3 != 0
    }
    /// Code that may be read.
    pub const fn is_readable_code(self) -> bool {
        self.is_code() && self.0 & 1 << 1 != 0
    }
    /// Data that may be written.
    pub const fn is_writable_data(self) -> bool {
        !self.is_code() && self.0 & 1 << 1 != 0
    }
    /// Data that expands down: valid offsets lie above the limit.
    pub const fn is_expand_down(self) -> bool {
        !self.is_code() && self.0 & 1 << 2 != 0
    }
}
