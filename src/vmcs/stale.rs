//! What a VMWRITE of L2 makes necessary before the next entry, and nothing beyond that.
//!
//! Most hypervisors write some field of nvmx's copy before each entry: the stack pointer of the host, a segment base, the
//! interrupt window. Rules and merging are a matter of groups of fields, so only the group that was touched runs again.

use crate::vmx::Field;
use crate::vmx::field::{Area, Home};
use bitflags::bitflags;

bitflags! {
    /// The groups whose fields changed since the entry that last found them good.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Stale: u8 {
        /// The rules on control fields in nvmx's copy, and the merge.
        const CONTROLS = 1 << 0;
        /// The rules on host state.
        const HOST = 1 << 1;
        /// The rules on guest state that the processor does not apply for nvmx.
        const GUEST = 1 << 2;
        /// Pin-based and primary controls of vmcs02: the merged ones are not in it.
        const WINDOWS = 1 << 3;
        /// All controls of vmcs02.
        const UNWRITTEN = 1 << 4;
        /// What an entry takes beyond the usual ([`Usual`](crate::vmcs::slot::Usual)).
        const WAY = 1 << 5;
        /// L2 saw a violation since ([`Slot::violated`](crate::vmcs::slot::Slot::violated)).
        const VIOLATED = 1 << 6;
    }
}

impl Stale {
    /// What is judged before vmcs02 is touched.
    pub const PREPARED: Stale = Stale::CONTROLS.union(Stale::HOST);
    /// What is written to vmcs02 once it is current.
    pub const TO_WRITE: Stale = Stale::WINDOWS.union(Stale::UNWRITTEN);

    /// What an entry by the usual way sees to as well.
    pub const IN_PASSING: Stale = Stale::WINDOWS.union(Stale::VIOLATED);

    /// What another value of this field makes stale. Fields that live in vmcs02 are the processor's to check.
    pub const fn of(field: Field) -> Stale {
        match field {
            // Taken from the copy at every entry or exit, without a rule on their value.
            Field::EXECUTIVE_VMCS_POINTER | Field::EPTP_INDEX => Stale::empty(),
            Field::GUEST_IA32_PAT => Stale::WAY,
            Field::VMCS_LINK_POINTER => Stale::GUEST.union(Stale::WAY),
            // The modes of host and guest are among them.
            Field::VM_EXIT_CONTROLS | Field::VM_ENTRY_CONTROLS => Stale::CONTROLS.union(Stale::HOST),
            _ => match (field.home(), field.area()) {
                (Home::Watched, _) => Stale::GUEST,
                (Home::Vmcs02, _) | (Home::Cache, Area::ExitInfo) => Stale::empty(),
                (Home::Cache, Area::Host) => Stale::HOST,
                (Home::Cache, Area::Control | Area::Guest) => Stale::CONTROLS,
            },
        }
    }
}
