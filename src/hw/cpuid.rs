//! CPUID.

use crate::hw::processor::Processor;
use crate::hw::this_processor;
use raw_cpuid::{CpuId, CpuIdResult};

/// CPUID.
#[inline(always)]
pub fn cpuid_count(leaf: u32, subleaf: u32) -> CpuIdResult {
    this_processor().cpuid(leaf, subleaf)
}

/// Its answers, decoded.
pub fn decoded() -> CpuId<fn(u32, u32) -> CpuIdResult> {
    CpuId::with_cpuid_reader(cpuid_count)
}
