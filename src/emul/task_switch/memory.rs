//! The memory of a task switch: descriptor tables and TSSs by linear address, as the processor itself accesses them.

use super::state::{SwitchFailure, TaskException};
use crate::mm::linear::{AccessError, DataAccess, Paging, Privilege};
use crate::mm::{GuestMemory, PhysMem};
use crate::vmx::event::vector;
use crate::x86::descriptor::type_byte::{ACCESSED, BUSY, CODE_OR_DATA, PRESENT};
use crate::x86::{Fault, selector};

/// The byte of a descriptor with its type.
const TYPE_AT: u32 = 5;

/// L2's memory under a task's paging.
pub struct Memory<'a, P> {
    guest: &'a GuestMemory<P>,
    /// Implicit accesses of the processor: EFLAGS.AC does not lift SMAP.
    paging: Paging,
}

/// A descriptor as it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Base
    pub const fn base(self) -> u32 {
        (self.0 >> 16 & 0xFF_FFFF) as u32 | (self.0 >> 32) as u32 & 0xFF00_0000
    }

    /// Limit in bytes
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xFFFF) as u32 | (self.0 >> 32) as u32 & 0xF_0000;
        if self.0 & 1 << 55 != 0 { limit << 12 | 0xFFF } else { limit }
    }

    const fn type_byte(self) -> u8 {
        (self.0 >> 40) as u8
    }

    /// Type
    pub const fn kind(self) -> u8 {
        self.type_byte() & 0xF
    }

    /// S: code or data
    pub const fn is_code_or_data(self) -> bool {
        self.type_byte() & CODE_OR_DATA != 0
    }

    /// P
    pub const fn is_present(self) -> bool {
        self.type_byte() & PRESENT != 0
    }

    /// As access rights of a VMCS.
    pub const fn rights(self) -> u32 {
        (self.0 >> 40) as u32 & 0xF0FF
    }
}

impl<'a, P: PhysMem> Memory<'a, P> {
    /// Memory under this paging.
    pub fn new(guest: &'a GuestMemory<P>, paging: Paging) -> Self {
        Self { guest, paging: Paging { rflags: 0, ..paging } }
    }

    /// Sees that an access will not fault.
    pub fn probe(&self, linear: u32, access: DataAccess) -> Result<(), SwitchFailure> {
        Ok(self.paging.translate(self.guest, linear.into(), access).map(drop)?)
    }

    /// Reads at most a page.
    pub fn read(&self, linear: u32, into: &mut [u8]) -> Result<(), SwitchFailure> {
        Ok(self.paging.read(self.guest, linear.into(), into)?)
    }

    /// Writes at most a page.
    pub fn write(&self, linear: u32, bytes: &[u8]) -> Result<(), SwitchFailure> {
        Ok(self.paging.write(self.guest, linear.into(), bytes)?)
    }

    /// Pushes for a task of that level, whose EFLAGS count.
    pub fn push(&self, linear: u32, bytes: &[u8], level: u8, eflags: u32) -> Result<(), SwitchFailure> {
        let paging = Paging { rflags: eflags.into(), ..self.paging };
        let privilege = if level == 3 { Privilege::User } else { Privilege::Supervisor };
        Ok(paging.write_as(self.guest, linear.into(), bytes, privilege)?)
    }

    /// The descriptor that `selector` names in a table, and its address; `None` beyond the table's limit.
    pub fn descriptor(&self, base: u32, limit: u32, selector: u16) -> Result<Option<(u32, Descriptor)>, SwitchFailure> {
        let offset = selector::offset(selector);
        if offset + 7 > limit {
            return Ok(None);
        }
        let at = base.wrapping_add(offset);
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(Some((at, Descriptor(u64::from_le_bytes(bytes)))))
    }

    /// Marks the descriptor of a code or data segment accessed.
    pub fn touch(&self, at: u32, descriptor: Descriptor) -> Result<(), SwitchFailure> {
        if descriptor.type_byte() & ACCESSED != 0 {
            return Ok(());
        }
        let gpa = self.paging.translate(self.guest, at.wrapping_add(TYPE_AT).into(), DataAccess::Write)?;
        self.guest.set_bits(gpa, ACCESSED).map_err(SwitchFailure::NotOwned)
    }

    /// Sees that the busy flag of the TSS descriptor at `at` can be written.
    pub fn probe_busy(&self, at: u32) -> Result<(), SwitchFailure> {
        self.probe(at.wrapping_add(TYPE_AT), DataAccess::Write)
    }

    /// Sets or clears the busy flag of the TSS descriptor at `at`.
    pub fn set_busy(&self, at: u32, busy: bool) -> Result<(), SwitchFailure> {
        let gpa = self.paging.translate(self.guest, at.wrapping_add(TYPE_AT).into(), DataAccess::Write)?;
        let changed = if busy { self.guest.set_bits(gpa, BUSY) } else { self.guest.clear_bits(gpa, BUSY) };
        changed.map_err(SwitchFailure::NotOwned)
    }
}

impl From<AccessError> for SwitchFailure {
    fn from(error: AccessError) -> Self {
        let of = |vector, error, linear| SwitchFailure::Exception(TaskException { vector, error, linear });
        match error {
            AccessError::NotOwned(at) => SwitchFailure::NotOwned(at),
            AccessError::Again => SwitchFailure::Again,
            AccessError::Fault(Fault::Page { error_code, linear }) => of(vector::PF, error_code, Some(linear)),
            // Paging raises nothing else.
            AccessError::Fault(_) => of(vector::GP, 0, None),
        }
    }
}
