//! Caches.

use core::arch::asm;

/// WBINVD: writes everything back and empties the caches.
pub fn write_back() {
    // SAFETY: WBINVD loses nothing, it only costs time.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}
