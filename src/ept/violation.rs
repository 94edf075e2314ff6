//! The exit qualification of an EPT violation.
//!
//! Source: Intel SDM vol. 3C (December 2024), table "Exit Qualification for EPT Violations".

use super::entry::Rights;
use bitflags::bitflags;

bitflags! {
    /// Exit qualification of an EPT violation. Bits without a name are kept.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Qualification: u64 {
        /// The access was a data read.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// The translation of the guest-physical address is readable.
        const READABLE = 1 << 3;
        /// The translation is writable.
        const WRITABLE = 1 << 4;
        /// The translation is executable (for supervisor-mode linear addresses under mode-based execute control).
        const EXECUTABLE = 1 << 5;
        /// The translation is executable for user-mode linear addresses.
        const USER_EXECUTABLE = 1 << 6;
        /// The guest linear-address field is valid.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the translation of a linear address; clear: to a guest paging-structure entry.
        const LINEAR_TRANSLATED = 1 << 8;
        /// Advanced information: user-mode linear address.
        const USER_LINEAR = 1 << 9;
        /// Advanced information: read/write linear page.
        const WRITABLE_LINEAR = 1 << 10;
        /// Advanced information: execute-disable linear page.
        const NO_EXECUTE_LINEAR = 1 << 11;
        /// NMI unblocking due to IRET.
        const NMI_UNBLOCKING = 1 << 12;
        /// Shadow-stack access.
        const SHADOW_STACK = 1 << 13;
        /// Supervisor shadow-stack page.
        const SUPERVISOR_SHADOW_STACK = 1 << 14;
        /// Guest-paging verification.
        const GUEST_PAGING_VERIFICATION = 1 << 15;
        /// Asynchronous to instruction execution.
        const ASYNCHRONOUS = 1 << 16;
    }
}

impl Qualification {
    /// Bits about the access alone: no table has a say in them.
    const OF_THE_ACCESS: Self = Self::READ
        .union(Self::WRITE)
        .union(Self::FETCH)
        .union(Self::LINEAR_VALID)
        .union(Self::LINEAR_TRANSLATED)
        .union(Self::NMI_UNBLOCKING)
        .union(Self::ASYNCHRONOUS);
    /// Of an SPP-related event, where the bit means that a table is missing.
    const SUB_PAGE_MISS: Self = Self::NO_EXECUTE_LINEAR;
    const ADVANCED: Self = Self::USER_LINEAR.union(Self::WRITABLE_LINEAR).union(Self::NO_EXECUTE_LINEAR);

    /// What an exit by a full page-modification log in place of this violation reports (SDM, "Page-Modification Log-Full
    /// Events"): whether an IRET had unblocked NMIs.
    #[inline]
    pub const fn of_log_full(self) -> Self {
        self.intersection(Self::NMI_UNBLOCKING.union(Self::ASYNCHRONOUS))
    }

    /// What an SPP-related event in place of this violation reports (SDM, table "Exit Qualification for SPP-Induced VM Exits"), or of
    /// another such event: whether a table is missing or wrong, and whether an IRET had unblocked NMIs.
    pub const fn of_sub_page_event(self, miss: bool) -> Self {
        self.of_log_full().union(if miss { Self::SUB_PAGE_MISS } else { Self::empty() })
    }

    /// The rights that the access needed, without mode-based execute control.
    #[inline]
    pub const fn access(self) -> Rights {
        Rights::of(self.bits() & Rights::RWX.bits() as u64)
    }

    /// The rights that the access needed. Whether a fetch was one of user mode is part of the advanced information, which
    /// [`caps`](crate::rules::caps) makes a condition of mode-based execute control.
    #[inline]
    pub const fn access_in(self, mode_based: bool) -> Rights {
        if mode_based && self.contains(Self::FETCH.union(Self::USER_LINEAR)) {
            self.access().difference(Rights::EXECUTE).union(Rights::USER_EXECUTE)
        } else {
            self.access()
        }
    }

    /// What L2 would have been told by a processor with ept12 alone: the access as it was, with the rights that ept12
    /// grants. `advanced` says whether L2 was shown "advanced VM-exit information for EPT violations".
    #[inline]
    pub const fn reflected(self, granted: Rights, advanced: bool) -> Self {
        let kept = if advanced { Self::OF_THE_ACCESS.union(Self::ADVANCED) } else { Self::OF_THE_ACCESS };
        let user = if granted.contains(Rights::USER_EXECUTE) { Self::USER_EXECUTABLE } else { Self::empty() };
        let granted = granted.intersection(Rights::RWX).bits() as u64;
        Self::from_bits_retain(self.bits() & kept.bits() | granted << 3 | user.bits())
    }
}
