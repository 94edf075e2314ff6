//! VMCS regions.
//!
//! Source: SDM vol. 3C, "Format of the VMCS Region".

use super::phys::DirectMap;
use crate::addr::{Hpa, PAGE_SIZE};
use crate::mm::{Frame, PhysMem};
use crate::vmx::field::{Field, Width};

/// A frame that holds a VMCS, or the VMXON region, and nothing else for as long as it is in use. The address is copied; the frame
/// goes back to its pool only once the VMCS is clear and nobody keeps the region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region(Hpa);

impl Region {
    /// Makes one of a frame of nvmx's, with the revision identifier.
    pub fn new(frame: &Frame, phys: &DirectMap, revision: u32) -> Self {
        let region = Region(frame.hpa());
        region.mark(phys, revision);
        region
    }

    /// Writes a value of this width to it, `offset` bytes in: to a field of a VMCS that the hypervisor below keeps in memory.
    #[inline]
    pub fn write(self, phys: &DirectMap, offset: u64, width: Width, value: u64) {
        let at = Hpa::new(self.0.get() + offset.min(PAGE_SIZE - 8));
        match width {
            Width::W64 | Width::Natural => phys.poke_u64(at, value),
            Width::W32 => phys.poke_bytes(at, &(value as u32).to_le_bytes()),
            Width::W16 => phys.poke_bytes(at, &(value as u16).to_le_bytes()),
        }
    }

    /// Reads a field of a VMCS that the hypervisor below keeps in memory, `offset` bytes in.
    #[inline]
    pub fn read(self, phys: &DirectMap, offset: u64, field: Field) -> u64 {
        phys.read_u64(Hpa::new(self.0.get() + offset)) & field.mask()
    }

    /// Where it is.
    #[inline(always)]
    pub const fn at(self) -> Hpa {
        self.0
    }

    /// What VMPTRLD and VMCLEAR take: where its address stands.
    #[cfg(target_os = "none")]
    #[inline(always)]
    pub(super) const fn operand(&self) -> &Hpa {
        &self.0
    }

    /// Writes its first word: the revision identifier, with the shadow-VMCS indicator or without. The VMCS is not active, or the
    /// hypervisor below keeps it in memory.
    #[inline(always)]
    pub fn mark(self, phys: &DirectMap, word: u32) {
        phys.poke_u64(self.0, word.into());
    }
}
