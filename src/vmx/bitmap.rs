//! The bitmaps that decide what exits: MSRs, VMREAD and VMWRITE. I/O bitmaps are L2's own, used where they lie.
//!
//! Source: Intel SDM vol. 3C (December 2024), "MSR-Bitmap Address", "VMREAD-Bitmap Address and
//! VMWRITE-Bitmap Address", and "Instructions That Cause VM Exits Conditionally".

use super::caps::Capabilities;
use super::field::{Area, Field, Home, Width};
use super::lent::Loan;
use arrayvec::ArrayVec;

/// A page of bits, as the processor reads it.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct BitmapPage(pub [u64; 512]);

impl BitmapPage {
    /// All bits 0.
    pub const CLEAR: Self = Self([0; 512]);
    /// All bits 1.
    pub const SET: Self = Self([u64::MAX; 512]);

    /// The bit at `index` of 0..32768; an index beyond the page reads as 1, the side that exits.
    #[inline]
    pub fn get(&self, index: u16) -> bool {
        let word = self.0.get(usize::from(index / 64));
        word.is_none_or(|word| word >> (index % 64) & 1 != 0)
    }

    /// Sets or clears the bit at `index`; nothing happens beyond the page.
    pub fn put(&mut self, index: u16, value: bool) {
        if let Some(word) = self.0.get_mut(usize::from(index / 64)) {
            let bit = 1 << (index % 64);
            if value { *word |= bit } else { *word &= !bit }
        }
    }
}

/// How many words a [`Words`] has room for.
const WORDS: usize = 64;

/// The words of a page that differ from the rest of it: all there is to merge into another page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Words(ArrayVec<(u16, u64), WORDS>);

impl Words {
    /// The words of `page` that are not `rest`. Pages of nvmx's own have few: one with too many is a mistake that a test
    /// of the page finds, and panics here.
    pub fn that_differ(page: &BitmapPage, rest: u64) -> Self {
        Self((0..).zip(page.0).filter(|(_, word)| *word != rest).collect())
    }

    /// Each word with its byte offset in the page.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(index, word)| (u64::from(*index) * 8, *word))
    }
}

/// The two directions of an access that a bitmap knows apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// RDMSR, VMREAD
    Read,
    /// WRMSR, VMWRITE
    Write,
}

/// An MSR bitmap: 1 KiB each for reads of low, reads of high, writes of low, writes of high MSRs.
#[derive(Clone, PartialEq, Eq)]
#[repr(transparent)]
pub struct MsrBitmap(pub BitmapPage);

impl MsrBitmap {
    /// 64-bit words: half of them for reads, half for writes, each half for low MSRs first.
    pub const WORDS: usize = 512;
    /// Nothing in its ranges exits.
    pub const PASS_ALL: Self = Self(BitmapPage::CLEAR);

    /// Index of the bit for an access, or `None` for an MSR outside of both ranges, which always exits.
    #[inline]
    pub const fn index(msr: u32, access: Access) -> Option<u16> {
        let high = match msr {
            0..=0x1FFF => 0,
            0xC000_0000..=0xC000_1FFF => 0x2000,
            _ => return None,
        };
        let write = match access {
            Access::Read => 0,
            Access::Write => 0x4000,
        };
        Some(write | high | (msr & 0x1FFF) as u16)
    }

    /// True if the access exits.
    #[inline]
    pub fn exits(&self, msr: u32, access: Access) -> bool {
        Self::index(msr, access).is_none_or(|index| self.0.get(index))
    }

    /// Makes an access exit or pass; an MSR outside of both ranges exits whatever is asked.
    pub fn set(&mut self, msr: u32, access: Access, exits: bool) {
        if let Some(index) = Self::index(msr, access) {
            self.0.put(index, exits);
        }
    }
}

/// Index of the bit for a field encoding in the VMREAD and VMWRITE bitmaps: bits 14:0. `None` if a higher bit is set: then
/// the access always exits.
#[inline]
pub const fn shadow_index(encoding: u64) -> Option<u16> {
    if encoding >> 15 == 0 { Some(encoding as u16) } else { None }
}

/// True if L2 may reach the field in vmcs02 by itself.
pub fn is_shadowed(field: Field, access: Access, offered: &Capabilities) -> bool {
    if !offered.has_field(field) {
        return false;
    }
    match (access, field.home()) {
        (_, Home::Cache) => false,
        (Access::Read, Home::Vmcs02 | Home::Watched) => true,
        (Access::Write, Home::Watched) => false,
        // A write to an exit-information field is an error to be reported to L2, never a write.
        (Access::Write, Home::Vmcs02) => !matches!(field.area(), Area::ExitInfo),
    }
}

/// Opens what L2 is lent (`hw::host_area::Lent`), in its VMREAD or VMWRITE bitmap.
pub fn open_lent(page: &mut BitmapPage, loan: Loan) {
    for field in loan.fields() {
        if let Some(index) = shadow_index(u64::from(field.encoding())) {
            page.put(index, false);
        }
    }
}

/// Builds the VMREAD or VMWRITE bitmap for L2: a clear bit for each field that it may reach in vmcs02 by itself, and for
/// the "high" access to a 64-bit field as well.
pub fn shadow_bitmap(page: &mut BitmapPage, access: Access, offered: &Capabilities) {
    page.0.fill(u64::MAX);
    for &field in Field::ALL {
        if !is_shadowed(field, access, offered) {
            continue;
        }
        if let Some(index) = shadow_index(u64::from(field.encoding())) {
            page.put(index, false);
            if field.width() == Width::W64 {
                page.put(index | 1, false);
            }
        }
    }
}
