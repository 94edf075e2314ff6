//! Events: the interruption information that goes into an entry and comes out of an exit.
//!
//! Source: Intel SDM vol. 3C (December 2024), tables "Format of the VM-Entry Interruption-Information Field", "Format of
//! the VM-Exit Interruption-Information Field", "Format of the IDT-Vectoring Information Field": one layout for three.

use crate::x86::Fault;
use core::fmt;

/// Interruption type, bits 10:8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum EventKind {
    ExternalInterrupt = 0,
    Reserved = 1,
    Nmi = 2,
    HardwareException = 3,
    SoftwareInterrupt = 4,
    /// INT1
    PrivilegedSoftwareException = 5,
    /// INT3, INTO
    SoftwareException = 6,
    /// On entry with vector 0: a pending MTF VM exit
    Other = 7,
}

/// Exception vectors: the numbers of the crate `x86_64` under the names of the SDM.
#[allow(missing_docs)]
pub mod vector {
    use x86_64::structures::idt::ExceptionVector as Vector;

    pub const DE: u8 = Vector::Division as u8;
    pub const DB: u8 = Vector::Debug as u8;
    pub const NMI: u8 = Vector::NonMaskableInterrupt as u8;
    pub const BP: u8 = Vector::Breakpoint as u8;
    pub const UD: u8 = Vector::InvalidOpcode as u8;
    pub const DF: u8 = Vector::Double as u8;
    pub const TS: u8 = Vector::InvalidTss as u8;
    pub const NP: u8 = Vector::SegmentNotPresent as u8;
    pub const SS: u8 = Vector::Stack as u8;
    pub const GP: u8 = Vector::GeneralProtection as u8;
    pub const PF: u8 = Vector::Page as u8;
    pub const AC: u8 = Vector::AlignmentCheck as u8;
    pub const MC: u8 = Vector::MachineCheck as u8;
    pub const VE: u8 = Vector::Virtualization as u8;
    pub const CP: u8 = Vector::ControlProtection as u8;
}

/// True if delivery of this hardware exception pushes an error code on processors without CET.
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC)
}

/// An interruption-information field.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct EventInfo(pub u32);

impl EventInfo {
    /// No event.
    pub const NONE: Self = Self(0);
    /// Bit 11: there is an error code, in a field of its own.
    pub const ERROR_CODE: u32 = 1 << 11;
    /// Bit 12 of the VM-exit field: an IRET had unblocked NMIs.
    pub const IRET_UNBLOCKED_NMIS: u32 = 1 << 12;
    /// Bit 31: the field holds an event.
    pub const VALID: u32 = 1 << 31;
    /// Bits that must be 0 on VM entry.
    pub const ENTRY_RESERVED: u32 = 0x7FFF_F000;

    /// A valid event.
    pub const fn new(kind: EventKind, vector: u8) -> Self {
        Self(Self::VALID | (kind as u32) << 8 | vector as u32)
    }

    /// The same event with an error code.
    pub const fn with_error_code(self) -> Self {
        Self(self.0 | Self::ERROR_CODE)
    }

    /// True if there is an event.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Vector, bits 7:0.
    #[inline]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Interruption type.
    #[inline]
    pub const fn kind(self) -> EventKind {
        match (self.0 >> 8) & 7 {
            0 => EventKind::ExternalInterrupt,
            1 => EventKind::Reserved,
            2 => EventKind::Nmi,
            3 => EventKind::HardwareException,
            4 => EventKind::SoftwareInterrupt,
            5 => EventKind::PrivilegedSoftwareException,
            6 => EventKind::SoftwareException,
            _ => EventKind::Other,
        }
    }

    /// True if there is an error code.
    #[inline]
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// True if this is a valid event of that type.
    #[inline]
    pub fn is(self, kind: EventKind) -> bool {
        self.is_valid() && self.kind() == kind
    }

    /// True if this is that hardware exception.
    #[inline]
    pub fn is_exception(self, vector: u8) -> bool {
        self.is(EventKind::HardwareException) && self.vector() == vector
    }

    /// True for the types whose injection uses the VM-entry instruction length.
    pub const fn has_instruction_length(self) -> bool {
        matches!(
            self.kind(),
            EventKind::SoftwareInterrupt | EventKind::PrivilegedSoftwareException | EventKind::SoftwareException
        )
    }

    /// What comes of a fault during the delivery of this event (SDM vol. 3A, table "Conditions for Generating a Double
    /// Fault").
    pub const fn then(self, fault: u8) -> After {
        const fn is_contributory(vector: u8) -> bool {
            matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP)
        }
        const fn is_page_fault(vector: u8) -> bool {
            matches!(vector, vector::PF | vector::VE)
        }
        let is_exception = self.is_valid() && matches!(self.kind(), EventKind::HardwareException);
        let serious = is_contributory(fault) || is_page_fault(fault);
        match self.vector() {
            _ if !is_exception || !serious => After::Itself,
            vector::DF => After::Shutdown,
            first if is_page_fault(first) => After::DoubleFault,
            first if is_contributory(first) && is_contributory(fault) => After::DoubleFault,
            _ => After::Itself,
        }
    }

    /// What to write into the VM-entry field to deliver again an event that an exit interrupted: only what both formats
    /// share.
    pub const fn to_entry(self) -> Self {
        if self.is_valid() { Self(self.0 & !Self::ENTRY_RESERVED) } else { Self::NONE }
    }
}

/// A fault of an instruction as an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Interruption information
    pub info: EventInfo,
    /// Error code, if one is pushed
    pub error: Option<u32>,
    /// What delivery leaves in CR2, and an exit in its qualification
    pub address: Option<u64>,
}

impl Exception {
    /// In protected mode, or in real mode, which pushes no error codes.
    pub fn of(fault: Fault, protected: bool) -> Self {
        let (vector, error, address) = match fault {
            Fault::InvalidOpcode => (vector::UD, None, None),
            Fault::StackSegment(code) => (vector::SS, Some(u32::from(code)), None),
            Fault::GeneralProtection(code) => (vector::GP, Some(u32::from(code)), None),
            Fault::Page { error_code, linear } => (vector::PF, Some(error_code), Some(linear)),
        };
        let info = EventInfo::new(EventKind::HardwareException, vector);
        let error = error.filter(|_| protected);
        Self { info: if error.is_some() { info.with_error_code() } else { info }, error, address }
    }
}

/// What L2 asked for of L3's exceptions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExceptionControls {
    /// Exception bitmap
    pub bitmap: u32,
    /// Page-fault error-code mask
    pub mask: u32,
    /// Page-fault error-code match
    pub matches: u32,
}

impl ExceptionControls {
    /// Is the exception an exit? (SDM vol. 3C, "Exception Bitmap"; "Other Causes of VM Exits")
    pub const fn exits(&self, exception: &Exception) -> bool {
        let vector = exception.info.vector();
        let listed = self.bitmap >> (vector & 31) & 1 == 1;
        match exception.error {
            // Where error code and mask do not match, the bit means the opposite.
            Some(error) if vector == vector::PF => listed == (error & self.mask == self.matches),
            _ => listed,
        }
    }
}

/// What follows an event in whose delivery a fault came up.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// That fault.
    Itself,
    /// #DF
    DoubleFault,
    /// A triple fault.
    Shutdown,
}

/// What injects once more an event whose delivery an exit interrupted (SDM, "Information for VM Exits That Occur During
/// Event Delivery"; "VM-Entry Controls for Event Injection").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Redelivery {
    /// VM-entry interruption information.
    pub info: EventInfo,
    /// Error code, of an event that has one.
    pub error: Option<u32>,
    /// Instruction length, of an event that an instruction raised: its delivery pushes the address behind that.
    pub length: Option<u32>,
}

impl Redelivery {
    /// From what the exit says: IDT-vectoring information and error code, instruction length.
    pub fn of(vectoring: EventInfo, error: u32, length: u32) -> Self {
        let info = vectoring.to_entry();
        let valid = info.is_valid();
        Redelivery {
            info,
            error: (valid && info.has_error_code()).then_some(error),
            length: (valid && info.has_instruction_length()).then_some(length),
        }
    }
}

impl fmt::Debug for EventInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_valid() {
            return f.write_str("none");
        }
        let error = if self.has_error_code() { " with error code" } else { "" };
        write!(f, "{:?} {}{error}", self.kind(), self.vector())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn real_mode_pushes_no_error_codes() {
        let faults = [
            (Fault::InvalidOpcode, 6, None),
            (Fault::StackSegment(0), 12, Some(0)),
            (Fault::GeneralProtection(8), 13, Some(8)),
            (Fault::Page { error_code: 2, linear: 5 }, 14, Some(2)),
        ];
        for (fault, vector, error) in faults {
            let (protected, real) = (Exception::of(fault, true), Exception::of(fault, false));
            let code = if error.is_some() { 1 << 11 } else { 0 };
            assert_eq!((protected.info.0, protected.error), (1 << 31 | 3 << 8 | code | vector, error));
            assert_eq!((real.info.0, real.error), (1 << 31 | 3 << 8 | vector, None));
            assert_eq!(protected.address, (vector == 14).then_some(5));
        }
    }

    proptest! {
        #[test]
        fn the_bitmap_says_which_exceptions_exit_and_for_page_faults_mask_and_match_turn_it_round(
            bitmap: u32, mask in 0u32..32, matches in 0u32..32, error_code in 0u32..32,
        ) {
            let controls = ExceptionControls { bitmap, mask, matches };
            let bit = |n: u32| bitmap & 1 << n != 0;
            for (fault, vector) in
                [(Fault::InvalidOpcode, 6), (Fault::StackSegment(0), 12), (Fault::GeneralProtection(0), 13)]
            {
                prop_assert_eq!(controls.exits(&Exception::of(fault, true)), bit(vector));
            }
            // SDM: if (PFEC & PFEC_MASK) = PFEC_MATCH, as the bit says; else the other way round.
            let page = Exception::of(Fault::Page { error_code, linear: 0 }, true);
            let differs = (0..32).any(|n| mask >> n & 1 & (error_code >> n) != matches >> n & 1);
            prop_assert_eq!(controls.exits(&page), bit(14) != differs);
        }
    }
}
