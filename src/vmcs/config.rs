//! What is decided at start.

use super::access::VmcsAccess;
use super::vmcs12::FieldSet;
use crate::mm::mtrr::Mtrrs;
use crate::vmx::Capabilities;

/// What is decided at start and never changes.
pub struct Config {
    /// The processor.
    pub hardware: Capabilities,
    /// The processor that L2 sees.
    pub offered: Capabilities,
    /// The fields that L2 has.
    pub fields: FieldSet,
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub access: VmcsAccess,
    /// Programs of L2 may read the counters.
    pub user_counters: bool,
    /// Memory types of the machine.
    pub mtrrs: Mtrrs,
}
