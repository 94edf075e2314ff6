//! CPUID.

use crate::hw::processor::Processor;
use crate::hw::this_processor;
use raw_cpuid::CpuIdResult;

/// CPUID.
#[inline(always)]
pub fn cpuid_count(leaf: u32, subleaf: u32) -> CpuIdResult {
    this_processor().cpuid(leaf, subleaf)
}
