//! Linear addresses of L2: its own paging, walked in software for the memory operands of VMX instructions.
//!
//! Supervisor-mode data accesses, since VMX instructions need CPL 0, and the one push of a task switch that user mode makes.
//! Accessed and dirty flags are set as the processor sets them: in the entry that was read and no other. If another CPU has
//! changed it meanwhile, nothing of the change is lost and the walk begins anew, at most [`WALKS`] times.
//! Source: Intel SDM vol. 3A, "Paging" (December 2024), tables "Format of a
//! Page-Table Entry ..." and figure "Page-Fault Error Code".

use crate::addr::Gpa;
use crate::mm::PhysMem;
use crate::mm::guest::{GuestMemory, NotOwned};
use crate::mm::plain_read::PlainRead;
use crate::x86::paging::{self, ACCESSED, ADDRESS, DIRTY, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE, error};
use crate::x86::{Cr0, Cr4, Fault, RFlags, efer};

/// Access-rights registers of protection keys: bit 2i refuses key i's data, bit 2i + 1 writes to it. They count where CR4.PKE and
/// CR4.PKS say so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keys {
    /// PKRU, for user-mode addresses
    pub user: u32,
    /// IA32_PKRS, for supervisor-mode addresses
    pub supervisor: u32,
}

impl Keys {
    /// No key refuses anything.
    pub const OPEN: Self = Self { user: 0, supervisor: 0 };
}

/// The registers that paging depends on.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0
    pub cr0: u64,
    /// CR3
    pub cr3: u64,
    /// CR4
    pub cr4: u64,
    /// IA32_EFER
    pub efer: u64,
    /// RFLAGS
    pub rflags: u64,
    /// The PDPTE registers, used with PAE paging.
    pub pdptes: [u64; 4],
    /// Protection keys
    pub keys: Keys,
    /// Physical-address width.
    pub physical_width: u32,
}

pub use crate::x86::DataAccess;

/// Who makes an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL below 3, or the processor itself.
    Supervisor,
    /// CPL 3.
    User,
}

/// What the guest's paging says of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageKind {
    /// A user-mode address
    pub user: bool,
    /// Writes are allowed
    pub writable: bool,
    /// Fetches are not
    pub execute_disable: bool,
}

/// Why an access did not happen.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessError {
    /// The guest gets this exception.
    Fault(Fault),
    /// The walk or the operand lies in memory that L2 does not own.
    NotOwned(NotOwned),
    /// Another CPU changes the entries again and again: the guest executes its instruction anew.
    Again,
}

/// How often a walk is begun anew because an entry changed between its reading and the setting of its flags.
pub const WALKS: u32 = 16;

impl From<NotOwned> for AccessError {
    fn from(e: NotOwned) -> Self {
        AccessError::NotOwned(e)
    }
}

/// How entries look: bytes of an entry and index bits of a level.
#[derive(Clone, Copy)]
struct Format {
    entry_bytes: u64,
    index_bits: u32,
}

const WIDE: Format = Format { entry_bytes: 8, index_bits: 9 };
const NARROW: Format = Format { entry_bytes: 4, index_bits: 10 };

impl Paging {
    /// The guest-physical address behind `linear` for a supervisor-mode data access.
    pub fn translate(
        &self,
        memory: &GuestMemory<impl PhysMem>,
        linear: u64,
        access: DataAccess,
    ) -> Result<Gpa, AccessError> {
        self.translate_as(memory, linear, access, Privilege::Supervisor)
    }

    /// The guest-physical address behind `linear` for a data access with that privilege.
    pub fn translate_as(
        &self,
        memory: &GuestMemory<impl PhysMem>,
        linear: u64,
        access: DataAccess,
        privilege: Privilege,
    ) -> Result<Gpa, AccessError> {
        self.page(memory, linear, access, privilege).map(|(gpa, _)| gpa)
    }

    /// [`Self::translate_as`], and the kind of the page. Without paging all of memory is user-mode and writable.
    pub fn page(
        &self,
        memory: &GuestMemory<impl PhysMem>,
        linear: u64,
        access: DataAccess,
        privilege: Privilege,
    ) -> Result<(Gpa, PageKind), AccessError> {
        if self.cr0 & Cr0::PG.bits() == 0 {
            let kind = PageKind { user: true, writable: true, execute_disable: false };
            return Ok((Gpa::new(linear & 0xFFFF_FFFF), kind));
        }
        let plain = access == DataAccess::Read && privilege == Privilege::Supervisor;
        if let Some(found) = if plain { self.plain_read().page(memory, linear) } else { None } {
            return Ok(found);
        }
        for _ in 0..WALKS {
            if let Some(found) = self.walk(memory, linear, access, privilege)? {
                return Ok(found);
            }
        }
        Err(AccessError::Again)
    }

    const fn plain_read(&self) -> PlainRead {
        PlainRead { cr3: self.cr3, cr4: self.cr4, efer: self.efer, physical_width: self.physical_width }
    }

    /// One walk; `None` if an entry changed before its flags were set.
    #[inline(never)]
    fn walk(
        &self,
        memory: &GuestMemory<impl PhysMem>,
        linear: u64,
        access: DataAccess,
        privilege: Privilege,
    ) -> Result<Option<(Gpa, PageKind)>, AccessError> {
        let is_user = privilege == Privilege::User;
        let fault = |code: u32| {
            let write = if access == DataAccess::Write { error::WRITE } else { 0 };
            let by_user = if is_user { error::USER } else { 0 };
            AccessError::Fault(Fault::Page { error_code: code | write | by_user, linear })
        };
        let long = self.efer & efer::LMA != 0;
        let (format, mut table, mut level) = match (long, self.cr4 & Cr4::PAE.bits() != 0) {
            (true, _) => (WIDE, self.cr3 & self.address(), if self.cr4 & Cr4::LA57.bits() != 0 { 5 } else { 4 }),
            (false, true) => {
                let pdpte = self.pdptes[(linear >> 30 & 3) as usize];
                if pdpte & PRESENT == 0 {
                    return Err(fault(0));
                }
                (WIDE, pdpte & self.address(), 2)
            }
            (false, false) => (NARROW, self.cr3 & 0xFFFF_F000, 2),
        };
        let (mut writable, mut user, mut execute_disable) = (true, true, false);
        loop {
            let shift = 12 + (level - 1) * format.index_bits;
            let index = linear >> shift & ((1 << format.index_bits) - 1);
            let at = Gpa::new(table | (index * format.entry_bytes));
            let entry = match format.entry_bytes {
                8 => memory.read_u64(at)?,
                _ => memory.read_u32(at)? as u64,
            };
            if entry & PRESENT == 0 {
                return Err(fault(0));
            }
            let large = entry & LARGE != 0 && level > 1 && self.large_allowed(format, level);
            if self.reserved(format, entry, level, large) {
                return Err(fault(error::PRESENT | error::RESERVED));
            }
            writable &= entry & WRITABLE != 0;
            user &= entry & USER != 0;
            // Without IA32_EFER.NXE the bit is reserved.
            execute_disable |= format.entry_bytes == 8 && entry & NO_EXECUTE != 0;
            let leaf = large || level == 1;
            if leaf {
                let protects = is_user || self.cr0 & Cr0::WP.bits() != 0;
                let denied = access == DataAccess::Write && !writable && protects || is_user && !user;
                let smap = !is_user
                    && user
                    && self.cr4 & Cr4::SMAP.bits() != 0
                    && self.rflags & RFlags::ALIGNMENT_CHECK.bits() == 0;
                let by_key = self.refused_by_key(entry, user, access, protects);
                if denied || smap || by_key {
                    return Err(fault(error::PRESENT | if by_key { error::KEY } else { 0 }));
                }
            }
            let flags = ACCESSED | if leaf && access == DataAccess::Write { DIRTY } else { 0 };
            if entry & flags != flags {
                let set = match format.entry_bytes {
                    8 => memory.compare_exchange_u64(at, entry, entry | flags)?,
                    _ => memory.compare_exchange_u32(at, entry as u32, (entry | flags) as u32)?,
                };
                if !set {
                    return Ok(None);
                }
            }
            if leaf {
                let offset = linear & ((1 << shift) - 1);
                let gpa = Gpa::new(self.frame(format, entry, shift) | offset);
                return Ok(Some((gpa, PageKind { user, writable, execute_disable })));
            }
            table = entry & if format.entry_bytes == 8 { self.address() } else { 0xFFFF_F000 };
            level -= 1;
        }
    }

    /// The protection key in the entry of a page refuses the access (SDM vol. 3A, "Protection Keys").
    #[inline(never)]
    fn refused_by_key(&self, leaf: u64, user_page: bool, access: DataAccess, protects: bool) -> bool {
        let (on, register) =
            if user_page { (Cr4::PKE.bits(), self.keys.user) } else { (Cr4::PKS.bits(), self.keys.supervisor) };
        if self.efer & efer::LMA == 0 || self.cr4 & on == 0 {
            return false;
        }
        let rights = register >> (2 * (leaf >> 59 & 0xF));
        rights & 0b01 != 0 || rights & 0b10 != 0 && access == DataAccess::Write && protects
    }

    const fn address(&self) -> u64 {
        paging::address(self.physical_width)
    }

    fn large_allowed(&self, format: Format, level: u32) -> bool {
        if format.entry_bytes == 4 { self.cr4 & Cr4::PSE.bits() != 0 } else { level <= 3 }
    }

    /// Reserved bits that are set.
    fn reserved(&self, format: Format, entry: u64, level: u32, large: bool) -> bool {
        if format.entry_bytes == 4 {
            // PSE-36: bits 20:13 of a 4 MiB PDE are address bits 39:32, as far as the processor has them; the rest up to
            // bit 21 is reserved.
            let address_bits = self.physical_width.clamp(32, 40) - 32;
            let reserved = 0x1FF << 13 & !(((1 << address_bits) - 1) << 13);
            return large && entry & reserved != 0;
        }
        let beyond = !self.address() & ADDRESS;
        let no_nx = if self.efer & efer::NXE == 0 { NO_EXECUTE } else { 0 };
        // Without long mode bits 62:52 are reserved as well.
        let ignored = if self.efer & efer::LMA == 0 { 0x7FF0_0000_0000_0000 } else { 0 };
        let size = match (large, level) {
            (true, _) => ((1u64 << (12 + (level - 1) * 9)) - 1) & !0x1FFF,
            (false, 4 | 5) => LARGE,
            (false, _) => 0,
        };
        entry & (beyond | no_nx | ignored | size) != 0
    }

    fn frame(&self, format: Format, entry: u64, shift: u32) -> u64 {
        if format.entry_bytes == 4 && shift == 22 {
            return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32;
        }
        entry & self.address() & !((1 << shift) - 1)
    }

    /// An operand (at most a page long) as addresses and lengths before and behind the page boundary; a length may be 0.
    pub fn pieces(&self, linear: u64, bytes: usize) -> [(u64, usize); 2] {
        let split = split_at_page(linear, bytes);
        [(linear, split), (self.further(linear, split), bytes - split)]
    }

    /// `bytes` behind `linear`: addresses wrap at 4 GiB outside of IA-32e mode.
    fn further(&self, linear: u64, bytes: usize) -> u64 {
        let sum = linear.wrapping_add(bytes as u64);
        if self.efer & efer::LMA != 0 { sum } else { sum & 0xFFFF_FFFF }
    }

    /// Reads bytes at a linear address, page by page.
    pub fn read(&self, memory: &GuestMemory<impl PhysMem>, linear: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let split = split_at_page(linear, into.len());
        let (first, second) = into.split_at_mut(split);
        let a = self.translate(memory, linear, DataAccess::Read)?;
        let b = match second.is_empty() {
            true => a,
            false => self.translate(memory, self.further(linear, split), DataAccess::Read)?,
        };
        memory.read_bytes(a, first)?;
        Ok(memory.read_bytes(b, second)?)
    }

    /// Writes bytes at a linear address; nothing is written unless all of it can be.
    pub fn write(&self, memory: &GuestMemory<impl PhysMem>, linear: u64, bytes: &[u8]) -> Result<(), AccessError> {
        self.write_as(memory, linear, bytes, Privilege::Supervisor)
    }

    /// [`write`](Self::write) with that privilege.
    pub fn write_as(
        &self,
        memory: &GuestMemory<impl PhysMem>,
        linear: u64,
        bytes: &[u8],
        privilege: Privilege,
    ) -> Result<(), AccessError> {
        let split = split_at_page(linear, bytes.len());
        let (first, second) = bytes.split_at(split);
        let a = self.translate_as(memory, linear, DataAccess::Write, privilege)?;
        let b = match second.is_empty() {
            true => a,
            false => self.translate_as(memory, self.further(linear, split), DataAccess::Write, privilege)?,
        };
        memory.owns(a, first.len() as u64)?;
        memory.write_bytes(b, second)?;
        Ok(memory.write_bytes(a, first)?)
    }
}

/// The PDPTEs of a guest that loads them from the table at `cr3` (PAE paging). Where L2 owns no memory they read as all ones,
/// which no rule on them accepts.
pub fn fetch_pdptes(memory: &GuestMemory<impl PhysMem>, cr3: u64) -> [u64; 4] {
    let table = cr3 & 0xFFFF_FFE0;
    [0, 8, 16, 24].map(|offset| memory.read_u64(Gpa::new(table + offset)).unwrap_or(u64::MAX))
}

/// True unless a present entry has a reserved bit set (SDM vol. 3A, table "Format of a PAE
/// Page-Directory-Pointer-Table Entry (PDPTE)"). `limit` is the first address beyond the physical width.
pub fn pdptes_are_valid(entries: &[u64; 4], limit: u64) -> bool {
    /// Bits 2:1 and 8:5.
    const RESERVED: u64 = 0x1E6;
    entries.iter().all(|entry| entry & PRESENT == 0 || entry & RESERVED == 0 && *entry < limit)
}

/// Bytes of an operand (at most a page long) before the page boundary.
fn split_at_page(linear: u64, len: usize) -> usize {
    len.min((0x1000 - (linear & 0xFFF)) as usize)
}
