//! Caches.

use crate::hw::processor::Processor;
use crate::hw::this_processor;

/// WBINVD: writes everything back and empties the caches.
pub fn write_back() {
    this_processor().write_back_caches();
}
