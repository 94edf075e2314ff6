//! What is decided at start.

use super::image::Layout;
use super::vmcs12::FieldSet;
use crate::mm::mtrr::Mtrrs;
use crate::vmx::Capabilities;
use l2_protocol::abi::Strategy;

/// What is decided at start and never changes.
pub struct Config {
    /// The processor.
    pub hardware: Capabilities,
    /// The processor that L2 sees.
    pub offered: Capabilities,
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub strategy: Strategy,
    /// Programs of L2 may read the counters.
    pub user_counters: bool,
    /// Where fields lie in memory, under the in-memory strategy.
    pub layout: Option<Layout>,
    /// Fields that the processor has.
    pub exists: FieldSet,
    /// Memory types of the machine.
    pub mtrrs: Mtrrs,
}
