//! The EPT pointer.
//!
//! Source: Intel SDM vol. 3C (December 2024), table "Format of Extended-Page-Table Pointer"; "Invalidating Cached
//! Translation Information" for EP4TA.

use super::entry::{ADDRESS, Level};
use crate::addr::{Gpa, Hpa};
use crate::mm::mtrr::MemoryType;
use crate::vmx::controls::SecondaryControls;

/// A value of the EPTP field. For L2's it is untrusted but for the checks of VM entry; the whole value is the role of
/// an ept02, together with [`Eptp::mode_based`] and [`Eptp::sub_pages`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Eptp(u64);

impl Eptp {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const WALK_LENGTH_4: u64 = 3 << 3;
    const WALK_LENGTH_5: u64 = 4 << 3;
    /// Not of the field, where these bits are reserved and no VM entry accepts them; in the order of the controls.
    const MODE_BASED: u64 = 1 << 10;
    const SUB_PAGES: u64 = 1 << 11;
    const ROLE: u64 = Self::MODE_BASED | Self::SUB_PAGES;

    /// Wraps a raw value.
    #[inline]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The same as a role under these controls, of which two give the entries another meaning: mode-based execute control and sub-page
    /// write permissions.
    #[inline(always)]
    pub const fn under(self, controls: SecondaryControls) -> Self {
        const SHIFT: u32 =
            SecondaryControls::MODE_BASED_EXECUTE_CONTROL.bits().trailing_zeros() - Eptp::MODE_BASED.trailing_zeros();
        const {
            assert!(
                Self::SUB_PAGES << SHIFT == SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS.bits() as u64,
                "one shift serves both"
            );
        }
        Self(self.0 & !Self::ROLE | controls.bits() as u64 >> SHIFT & Self::ROLE)
    }

    /// Sub-page write permissions are on.
    #[inline]
    pub const fn sub_pages(self) -> bool {
        self.0 & Self::SUB_PAGES != 0
    }

    /// The entries below are under mode-based execute control.
    #[inline]
    pub const fn mode_based(self) -> bool {
        self.0 & Self::MODE_BASED != 0
    }

    /// The pointer to a root table of nvmx, write-back, with as many levels and the flags that the role `of` has.
    #[inline]
    pub const fn for_root(root: Hpa, of: Self) -> Self {
        let length = if matches!(of.top(), Level::Pml5) { Self::WALK_LENGTH_5 } else { Self::WALK_LENGTH_4 };
        Self(root.get() & ADDRESS | length | MemoryType::WriteBack as u64 | of.0 & Self::ACCESSED_DIRTY)
    }

    /// The pointer to a root table of nvmx, write-back, with four levels.
    #[inline]
    pub const fn of_four_levels(root: Hpa, accessed_dirty: bool) -> Self {
        Self::for_root(root, Self(if accessed_dirty { Self::ACCESSED_DIRTY } else { 0 }))
    }

    /// The level of the root table. VM entry accepts walks of four and of five levels.
    #[inline(always)]
    pub const fn top(self) -> Level {
        if self.0 & Self::WALK_LENGTH_5 != 0 { Level::Pml5 } else { Level::Pml4 }
    }

    /// The raw value.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// L2's root table, for an EPTP of L2.
    #[inline]
    pub const fn guest_root(self) -> Gpa {
        Gpa::new(self.0 & ADDRESS)
    }

    /// L2's root table and its level, where a walk begins.
    #[inline(always)]
    pub const fn root(self) -> (Gpa, Level) {
        (self.guest_root(), self.top())
    }

    /// EP4TA, bits 51:12: what the processor tags cached translations with, so what single-context INVEPT goes by.
    #[inline]
    pub const fn ep4ta(self) -> u64 {
        self.0 & ADDRESS
    }

    /// Accessed and dirty flags are enabled.
    #[inline]
    pub const fn accessed_dirty(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }
}
