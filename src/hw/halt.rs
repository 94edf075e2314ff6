//! The end of a processor.

use crate::hw::processor::Processor;
use crate::hw::this_processor;

/// Stops this processor for good.
pub fn halt() -> ! {
    this_processor().halt()
}
