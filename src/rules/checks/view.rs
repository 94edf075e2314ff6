//! The fields of a vmcs12 as the rules want to see them.

use crate::vmx::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::event::EventInfo;
use crate::vmx::{Capabilities, Field, Fields};
use crate::x86::{Cr0, Cr4};

/// CR0.PE
pub const CR0_PE: u64 = Cr0::PE.bits();
/// CR0.WP
pub const CR0_WP: u64 = Cr0::WP.bits();
/// CR0.PG
pub const CR0_PG: u64 = Cr0::PG.bits();
/// CR4.PAE
pub const CR4_PAE: u64 = Cr4::PAE.bits();
/// CR4.PCIDE
pub const CR4_PCIDE: u64 = Cr4::PCIDE.bits();
/// CR4.CET
pub const CR4_CET: u64 = Cr4::CET.bits();

/// A vmcs12 and the machine it is to run on.
pub struct View<'a, F> {
    pub fields: &'a F,
    pub caps: &'a Capabilities,
}

impl<F: Fields> View<'_, F> {
    pub fn get(&self, field: Field) -> u64 {
        self.fields.get(field)
    }

    /// A 32-bit field.
    pub fn get32(&self, field: Field) -> u32 {
        self.fields.get(field) as u32
    }

    pub fn pin(&self) -> PinControls {
        PinControls::from_bits_retain(self.get32(Field::PIN_BASED_VM_EXEC_CONTROL))
    }

    pub fn primary(&self) -> PrimaryControls {
        PrimaryControls::from_bits_retain(self.get32(Field::CPU_BASED_VM_EXEC_CONTROL))
    }

    /// The secondary controls, which count as 0 unless the primary ones activate them.
    pub fn secondary(&self) -> SecondaryControls {
        if self.primary().contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            SecondaryControls::from_bits_retain(self.get32(Field::SECONDARY_VM_EXEC_CONTROL))
        } else {
            SecondaryControls::empty()
        }
    }

    pub fn exit(&self) -> ExitControls {
        ExitControls::from_bits_retain(self.get32(Field::VM_EXIT_CONTROLS))
    }

    pub fn entry(&self) -> EntryControls {
        EntryControls::from_bits_retain(self.get32(Field::VM_ENTRY_CONTROLS))
    }

    pub fn event(&self) -> EventInfo {
        EventInfo(self.get32(Field::VM_ENTRY_INTR_INFO_FIELD))
    }

    pub fn unrestricted(&self) -> bool {
        self.secondary().contains(SecondaryControls::UNRESTRICTED_GUEST)
    }

    pub fn canonical(&self, field: Field) -> bool {
        self.caps.is_canonical(self.get(field))
    }

    /// True if the field is a linear address of its mode: canonical in 64-bit mode, else of 32 bits.
    pub fn is_linear(&self, field: Field, in_64_bit_mode: bool) -> bool {
        if in_64_bit_mode { self.canonical(field) } else { self.get(field) >> 32 == 0 }
    }

    /// True if the field has no bit beyond the physical-address width.
    pub fn within_physical_width(&self, field: Field) -> bool {
        self.caps.physical_width >= 64 || self.get(field) >> self.caps.physical_width == 0
    }

    /// True if the field, a value of CR3, has no bit beyond the physical-address width but those of LAM.
    pub fn is_cr3(&self, field: Field) -> bool {
        self.caps.is_cr3(self.get(field))
    }

    /// True if the field is a pointer to a page of a VMX structure.
    pub fn is_page_pointer(&self, field: Field) -> bool {
        let address = self.get(field);
        address & 0xFFF == 0 && self.caps.is_physical(address)
    }
}

/// `a` implies `b`.
pub const fn implies(a: bool, b: bool) -> bool {
    !a || b
}

/// True if IA32_S_CET may hold the value, but for the address in it: bits 9:6 are reserved, SUPPRESS (10) and TRACKER (11) exclude each other.
pub fn is_s_cet(value: u64) -> bool {
    value & 0x3C0 == 0 && value & 0xC00 != 0xC00
}
