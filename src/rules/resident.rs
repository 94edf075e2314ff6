//! State that stays in the processor while nvmx runs, because it does nothing there: nvmx's CR4 has neither CET nor PKS nor
//! UINTR.
//!
//! So nvmx's VMCSs neither save nor load it for nvmx. vmcs02 loads L3's values where vmcs12 asks, and on an exit that goes to
//! nvmx alone they stay where they are. Where vmcs12 asks that the exit loads L2's values, the next entry of vmcs01 loads
//! them, once. Nobody else pays for it. The processor saves all of it on each exit, in vmcs02 for L2 to read.
//!
//! Source: Intel SDM vol. 3C, "VM-Exit Controls", "VM-Entry Controls", "Saving Guest State", "Loading Host State".

use crate::vmx::Field;
use crate::vmx::controls::{EntryControls, ExitControls};

/// Where a VM exit takes the host's value from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// From this field.
    Field(Field),
    /// It becomes 0.
    Zero,
}

/// What one pair of controls loads.
#[derive(Clone, Copy, Debug)]
pub struct Resident {
    /// The VM-entry control that loads the guest's values.
    pub entry: EntryControls,
    /// The VM-exit control that loads the host's values.
    pub exit: ExitControls,
    /// Each field of the guest-state area with its counterpart.
    pub fields: &'static [(Field, Host)],
}

/// All of them.
pub const TABLE: [Resident; 3] = [
    Resident {
        entry: EntryControls::LOAD_CET,
        exit: ExitControls::LOAD_CET,
        fields: &[
            (Field::GUEST_S_CET, Host::Field(Field::HOST_S_CET)),
            (Field::GUEST_SSP, Host::Field(Field::HOST_SSP)),
            (Field::GUEST_INTR_SSP_TABLE, Host::Field(Field::HOST_INTR_SSP_TABLE)),
        ],
    },
    Resident {
        entry: EntryControls::LOAD_PKRS,
        exit: ExitControls::LOAD_PKRS,
        fields: &[(Field::GUEST_IA32_PKRS, Host::Field(Field::HOST_IA32_PKRS))],
    },
    Resident {
        entry: EntryControls::LOAD_UINV,
        exit: ExitControls::CLEAR_UINV,
        fields: &[(Field::GUEST_UINV, Host::Zero)],
    },
];

/// The VM-entry controls of the table.
pub const ENTRY: EntryControls = {
    let (mut all, mut i) = (EntryControls::empty(), 0);
    while i < TABLE.len() {
        all = all.union(TABLE[i].entry);
        i += 1;
    }
    all
};

/// The VM-exit controls of the table.
pub const EXIT: ExitControls = {
    let (mut all, mut i) = (ExitControls::empty(), 0);
    while i < TABLE.len() {
        all = all.union(TABLE[i].exit);
        i += 1;
    }
    all
};

/// The rows that an exit with these controls loads.
pub fn loaded_by(exit: ExitControls) -> impl Iterator<Item = &'static Resident> {
    TABLE.iter().filter(move |row| exit.contains(row.exit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::field::{Area, Home};

    /// L2 reads what the exit saved, and writes what the entry loads, in vmcs02 itself.
    #[test]
    fn guest_values_live_in_vmcs02_and_host_values_in_the_copy() {
        for (guest, host) in TABLE.iter().flat_map(|row| row.fields) {
            assert_eq!((guest.area(), guest.home()), (Area::Guest, Home::Vmcs02), "{guest}");
            if let Host::Field(host) = host {
                assert_eq!((host.area(), host.home()), (Area::Host, Home::Cache), "{host}");
            }
        }
    }

    /// SDM tables "Definitions of Primary VM-Exit Controls" and "Definitions of VM-Entry Controls", by bit.
    #[test]
    fn controls_are_those_of_the_sdm() {
        let bits = TABLE.map(|row| (row.entry.bits().trailing_zeros(), row.exit.bits().trailing_zeros()));
        assert_eq!(bits, [(20, 28), (22, 29), (19, 27)]);
        assert_eq!((ENTRY.bits(), EXIT.bits()), (1 << 19 | 1 << 20 | 1 << 22, 1 << 27 | 1 << 28 | 1 << 29));
    }
}
