//! One EPT entry: its bits, what it means at its level, and when it is misconfigured.
//!
//! Source: Intel SDM vol. 3C (December 2024), "EPT Translation Mechanism", the tables "Format of an EPT PML5 Entry
//! (PML5E)" to "Format of an EPT Page-Table Entry that Maps a 4-KByte Page", and "EPT Misconfigurations". The
//! bit of sub-pages is `sub_pages`' to read.

use super::eptp::Eptp;
use crate::addr::Hpa;
use crate::mm::mtrr::MemoryType;
use crate::vmx::caps::Capabilities;
pub use crate::vmx::ept_entry::{ACCESSED, ADDRESS, DIRTY, LARGE};
use bitflags::bitflags;
use core::fmt;

const IGNORE_PAT: u64 = 1 << 6;
/// Bit 63 of an entry that maps a page or is not present: its violations are not converted to #VE.
pub const SUPPRESS_VE: u64 = 1 << 63;
/// Bit 61 of an entry that maps a page of 4 KiB: under sub-page write permissions, parts of it may be writable where the whole is not.
pub const SUB_PAGES: u64 = 1 << 61;
const RIGHTS: u64 = Rights::RWX.bits() as u64;
const ALL_RIGHTS: u64 = Rights::all().bits() as u64;

bitflags! {
    /// Access rights: bits 2:0 and 10 of an entry.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Rights: u16 {
        /// Data reads
        const READ = 1;
        /// Data writes
        const WRITE = 2;
        /// Instruction fetches; under mode-based execute control those from supervisor-mode linear addresses
        const EXECUTE = 4;
        /// Instruction fetches from user-mode linear addresses, under mode-based execute control; else the bit is ignored
        const USER_EXECUTE = 1 << 10;
    }
}

impl Rights {
    /// All that there is without mode-based execute control.
    pub const RWX: Self = Self::READ.union(Self::WRITE).union(Self::EXECUTE);

    /// The rights that one entry grants, if the processor looks at all of them.
    #[inline]
    pub const fn of(entry: u64) -> Self {
        Self::from_bits_truncate(entry as u16)
    }
}

/// The table an entry lies in. A leaf at [`Level::Pt`] maps 4 KiB, at [`Level::Pd`] 2 MiB, at [`Level::Pdpt`] 1 GiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum Level {
    /// Page table
    Pt = 1,
    /// Page directory
    Pd = 2,
    /// Page-directory-pointer table
    Pdpt = 3,
    /// PML4 table, the root of four levels
    Pml4 = 4,
    /// PML5 table, the root of five levels
    Pml5 = 5,
}

impl Level {
    /// From the highest root to the page.
    pub const DOWN: [Self; 5] = [Self::Pml5, Self::Pml4, Self::Pdpt, Self::Pd, Self::Pt];

    /// Bytes that one entry of this table covers.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The part of an address below an entry of this table.
    #[inline]
    pub const fn offset(self, address: u64) -> u64 {
        address & (self.bytes() - 1)
    }

    /// True when a table of this level, as the root, has an entry for `address`.
    #[inline(always)]
    pub const fn reaches(self, address: u64) -> bool {
        address >> (self.shift() + 9) == 0
    }

    /// Where the entry that translates `address` lies in its table, in bytes: 0 to 4088.
    #[inline]
    pub const fn entry_offset(self, address: u64) -> u64 {
        (address >> (9 * self as u32)) & 0xff8
    }

    /// The next table towards the page.
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Pml5 => Some(Self::Pml4),
            Self::Pml4 => Some(Self::Pdpt),
            Self::Pdpt => Some(Self::Pd),
            Self::Pd => Some(Self::Pt),
            Self::Pt => None,
        }
    }

    #[inline]
    const fn shift(self) -> u32 {
        3 + 9 * self as u32
    }
}

/// How accesses to a page are cached: bits 6:3 of a leaf, with a memory type that is not reserved.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Caching(u8);

impl Caching {
    const BITS: u64 = 0x78;
    /// Bit n is set for the memory types that exist: 0, 1, 4, 5, 6.
    const TYPES: u8 = 0b0111_0011;

    /// A memory type, which the guest's PAT may weaken.
    pub const fn with_pat(memory_type: MemoryType) -> Self {
        Self((memory_type as u8) << 3)
    }

    /// The same, and whether the guest's PAT is ignored.
    pub const fn set_ignore_pat(self, ignore: bool) -> Self {
        Self(self.0 & !(IGNORE_PAT as u8) | (ignore as u8) << 6)
    }

    /// The memory type.
    pub const fn memory_type(self) -> MemoryType {
        MemoryType::from_raw(self.0 >> 3 & 7)
    }

    /// The guest's PAT is ignored.
    pub const fn ignore_pat(self) -> bool {
        self.0 as u64 & IGNORE_PAT != 0
    }

    /// Of a leaf; `None` for the reserved types 2, 3 and 7.
    #[inline]
    const fn of(entry: u64) -> Option<Self> {
        if Self::TYPES >> (entry >> 3 & 7) & 1 != 0 { Some(Self((entry & Self::BITS) as u8)) } else { None }
    }
}

impl fmt::Debug for Caching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.memory_type(), if self.ignore_pat() { ", PAT ignored" } else { "" })
    }
}

/// What a processor allows in EPT entries: the real one, or the one that L2 sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptRules {
    /// Bits 51:MAXPHYADDR, which must be zero.
    reserved_address: u64,
    /// The bits of rights that count.
    rights: u64,
    /// Rights that are a misconfiguration without the right to read.
    never_alone: u64,
    /// Bit n is set when a leaf may stand in a table of level n.
    leaf_levels: u8,
}

impl EptRules {
    /// Rules for a physical-address width in bits (32 to 52; CPUID.80000008H:EAX\[7:0\]) and the bits "execute-only",
    /// "2-MByte pages" and "1-GByte pages" of IA32_VMX_EPT_VPID_CAP.
    pub const fn new(max_phys_addr: u32, execute_only: bool, pages_2m: bool, pages_1g: bool) -> Self {
        let width = if max_phys_addr > 52 { 52 } else { max_phys_addr };
        // Writable but not readable is wrong on every processor.
        let never_alone = if execute_only { Rights::WRITE.bits() as u64 } else { RIGHTS };
        let leaf_levels =
            1 << Level::Pt as u8 | (pages_2m as u8) << Level::Pd as u8 | (pages_1g as u8) << Level::Pdpt as u8;
        Self { reserved_address: ADDRESS & !((1 << width) - 1), rights: RIGHTS, never_alone, leaf_levels }
    }

    /// The same with or without mode-based execute control.
    #[inline]
    pub const fn mode_based(self, on: bool) -> Self {
        const USER: u64 = Rights::USER_EXECUTE.bits() as u64;
        if !on {
            return self;
        }
        // Bit 10 is to fetches of user mode what bit 2 is to all others.
        let never_alone = self.never_alone | if self.never_alone & RIGHTS == RIGHTS { USER } else { 0 };
        Self { rights: ALL_RIGHTS, never_alone, ..self }
    }

    /// The rules for the tables of a role.
    #[inline(always)]
    pub const fn of_role(self, role: Eptp) -> Self {
        self.mode_based(role.mode_based())
    }

    /// The bits of a leaf in a table of `level` that say what it maps and how.
    #[inline]
    pub const fn leaf_bits(&self, level: Level) -> u64 {
        ADDRESS | Caching::BITS | self.rights | if matches!(level, Level::Pt) { 0 } else { LARGE }
    }

    /// All rights that count.
    #[inline]
    pub const fn all_rights(&self) -> Rights {
        Rights::of(self.rights)
    }

    /// The rules of the processor with these capabilities.
    pub const fn of(capabilities: &Capabilities) -> Self {
        let ept = capabilities.ept_vpid;
        Self::new(capabilities.physical_width, ept.execute_only(), ept.pages_2m(), ept.pages_1g())
    }

    /// True when a leaf may stand in a table of this level.
    #[inline]
    pub const fn allows_leaf(&self, level: Level) -> bool {
        self.leaf_levels >> level as u8 & 1 != 0
    }

    /// True when no bit of `address` lies beyond the physical-address width.
    #[inline]
    pub const fn allows_address(&self, address: u64) -> bool {
        address & (self.reserved_address | !(ADDRESS | 0xfff)) == 0
    }
}

/// The rule that an entry breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Misconfig {
    /// Writable but not readable, or execute-only where that is not supported
    Rights,
    /// A reserved bit is set; an address beyond the physical-address width and a page that is not aligned are this too
    ReservedBit,
    /// A leaf with memory type 2, 3 or 7
    MemoryType,
}

/// What an entry means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meaning {
    /// No right is granted: nothing else in the entry matters but [`SUPPRESS_VE`].
    NotPresent,
    /// The address of the next table.
    Table(u64),
    /// A page.
    Leaf {
        /// Its physical address.
        address: u64,
        /// Its memory type.
        caching: Caching,
    },
    /// The processor would exit with an EPT misconfiguration.
    Misconfigured(Misconfig),
}

/// What `entry` means in a table of `level`.
#[inline(always)] // A handful of instructions once the level is a constant.
pub const fn decode(entry: u64, level: Level, rules: &EptRules) -> Meaning {
    // The usual entry for a table, told by one comparison: all rights, and no bit that could be wrong.
    if entry & (rules.reserved_address | 0xff) == RIGHTS && !matches!(level, Level::Pt) {
        return Meaning::Table(entry & ADDRESS);
    }
    if entry & rules.rights == 0 {
        return Meaning::NotPresent;
    }
    if entry & Rights::READ.bits() as u64 == 0 && entry & rules.never_alone != 0 {
        return Meaning::Misconfigured(Misconfig::Rights);
    }
    if entry & rules.reserved_address != 0 {
        return Meaning::Misconfigured(Misconfig::ReservedBit);
    }
    if is_leaf(entry, level) {
        if !matches!(level, Level::Pt) && (!rules.allows_leaf(level) || level.offset(entry & ADDRESS) != 0) {
            return Meaning::Misconfigured(Misconfig::ReservedBit);
        }
        return match Caching::of(entry) {
            Some(caching) => Meaning::Leaf { address: entry & ADDRESS, caching },
            None => Meaning::Misconfigured(Misconfig::MemoryType),
        };
    }
    // Bits 6:3 are reserved in an entry that references a table; bit 7 is clear in PDPTEs and PDEs here, but not in
    // PML4Es and PML5Es.
    if entry & 0xf8 != 0 {
        return Meaning::Misconfigured(Misconfig::ReservedBit);
    }
    Meaning::Table(entry & ADDRESS)
}

/// True when a present entry ends the walk: each entry of a page table, and one with bit 7 where pages can be large.
#[inline]
pub const fn is_leaf(entry: u64, level: Level) -> bool {
    matches!(level, Level::Pt) || (entry & LARGE != 0 && !matches!(level, Level::Pml4 | Level::Pml5))
}

/// True when an entry of nvmx's own grants any right.
#[inline]
pub const fn is_present(entry: u64) -> bool {
    entry & ALL_RIGHTS != 0
}

/// True for what [`table_entry`] makes, in a table of any level but the last.
#[inline]
pub const fn is_own_table(entry: u64) -> bool {
    entry & (LARGE | RIGHTS) == RIGHTS
}

/// 1 when an entry of nvmx's own grants any right, else 0: to be summed up over many.
#[inline]
pub const fn present_bit(entry: u64) -> u64 {
    (entry | entry >> 1 | entry >> 2 | entry >> Rights::USER_EXECUTE.bits().trailing_zeros()) & 1
}

/// The entry that references a table, with all rights: in nvmx's tables rights stand in the leaves alone.
#[inline]
pub const fn table_entry(table: Hpa) -> u64 {
    table.get() & ADDRESS | ALL_RIGHTS
}

/// Bits 62:52 and 11 of an entry that references a table: the processor ignores them.
const NUMBER: u64 = 0x7ff << 52 | 1 << 11;
/// The largest [`number`].
pub const MAX_NUMBER: u16 = 0xfff;

/// An entry that references a table, with a number for nvmx's own use; at most [`MAX_NUMBER`].
#[inline]
pub const fn with_number(entry: u64, number: u16) -> u64 {
    entry & !NUMBER | (number as u64) << 52 & (0x7ff << 52) | number as u64 & 1 << 11
}

/// The number in an entry that references a table; 0 if it has none.
#[inline]
pub const fn number(entry: u64) -> u16 {
    (entry >> 52 & 0x7ff | entry & 1 << 11) as u16
}

/// The memory type in a leaf of nvmx's own.
pub const fn memory_type(leaf: u64) -> MemoryType {
    MemoryType::from_raw((leaf >> 3) as u8 & 7)
}

/// The entry that maps a page.
#[inline]
pub const fn leaf_entry(page: Hpa, level: Level, rights: Rights, caching: Caching) -> u64 {
    let large = if matches!(level, Level::Pt) { 0 } else { LARGE };
    page.get() & ADDRESS | large | caching.0 as u64 | rights.bits() as u64
}

/// True when both map the same, whatever flags a processor has set.
#[inline]
pub const fn is_same(old: u64, new: u64) -> bool {
    (old ^ new) & !(ACCESSED | DIRTY) == 0
}

/// True when `new` differs from the leaf `old` by more rights at most, whatever flags a processor has set. The violation itself made the processor forget
/// `old` for this address; at other addresses of the page the old rights may stay cached, and cost no more than another
/// violation.
#[inline]
pub const fn is_upgrade(old: u64, new: u64) -> bool {
    (old ^ new) & !(ALL_RIGHTS | ACCESSED | DIRTY) == 0 && old & !new & ALL_RIGHTS == 0
}
