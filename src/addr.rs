//! Physical addresses by the level that sees them.
//!
//! [`Hpa`] is what nvmx and the processor see, [`Gpa`] what L2 sees, [`Ngpa`] what L3 sees. There is no `From` between
//! them: a `Gpa` becomes an `Hpa` in one place only (`mm::guest`, invariant I5), an `Ngpa` becomes a `Gpa` only by a
//! walk of ept12.

use core::fmt;

/// Bytes in a small page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a mebibyte.
pub const MIB: u64 = 1 << 20;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value; any 64-bit value is allowed, validity is checked where it is used.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw value.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }
            /// The start of the 4 KiB page that holds this address.
            #[inline]
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// Offset in its 4 KiB page.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// True when `align` (a power of two) divides the address.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
            /// `self + bytes`, or `None` on overflow.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A physical address as nvmx and the processor see it.
    Hpa
}
address! {
    /// A guest-physical address: what L2 sees as physical. Untrusted.
    Gpa
}
address! {
    /// A nested guest-physical address: what L3 sees as physical. Untrusted.
    Ngpa
}
