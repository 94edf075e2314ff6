//! What the next entry of vmcs01 loads once, because an exit of L3 is to load it for L2: its MSR area, and the state that
//! stays in the processor while nvmx runs.

use crate::rules::switched::{self, Host};
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::controls::{EntryControls, ExitControls};
use crate::vmx::{Field, FieldAccess};
use bitflags::bitflags;

bitflags! {
    /// What is still to be loaded.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Once: u8 {
        /// The VM-exit MSR-load area of vmcs12.
        const MSR_AREA = 1 << 0;
        /// The resident rows of [`switched::TABLE`].
        const RESIDENT = 1 << 1;
    }
}

impl Once {
    /// The next entry of vmcs01 loads the host values that vmcs12's exit controls ask for.
    #[inline(always)]
    pub fn load_resident(&mut self, vmcs01: &mut impl FieldAccess, vmcs12: &Vmcs12) {
        let exit = ExitControls::from_bits_retain(vmcs12.get(Field::VM_EXIT_CONTROLS) as u32);
        if exit.intersects(switched::RESIDENT_EXIT) {
            write_resident(vmcs01, vmcs12, exit);
            *self |= Once::RESIDENT;
        }
    }

    /// vmcs01, which is current, entered: further entries must not load it again.
    #[cold]
    pub fn done(&mut self, vmcs01: &mut impl FieldAccess) {
        if self.contains(Once::MSR_AREA) {
            vmcs01.write(Field::VM_ENTRY_MSR_LOAD_COUNT, 0);
        }
        if self.contains(Once::RESIDENT) {
            change_controls(vmcs01, EntryControls::empty());
        }
        *self = Once::empty();
    }
}

#[cold]
fn write_resident(vmcs01: &mut impl FieldAccess, vmcs12: &Vmcs12, exit: ExitControls) {
    let mut controls = EntryControls::empty();
    for row in switched::resident_loaded_by(exit) {
        controls |= row.entry_load;
        let value = match row.host {
            Host::Field(host) => vmcs12.get(host),
            Host::Constant(value) => value,
        };
        vmcs01.write(row.guest, value);
    }
    change_controls(vmcs01, controls);
}

/// The processor changes the entry controls too: with the mode of L2.
fn change_controls(vmcs01: &mut impl FieldAccess, loads: EntryControls) {
    let others = vmcs01.read(Field::VM_ENTRY_CONTROLS) & !u64::from(switched::RESIDENT_ENTRY.bits());
    vmcs01.write(Field::VM_ENTRY_CONTROLS, others | u64::from(loads.bits()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[derive(Default)]
    struct Vmcs01(HashMap<Field, u64>);

    impl FieldAccess for Vmcs01 {
        fn read(&mut self, field: Field) -> u64 {
            self.0.get(&field).copied().unwrap_or(0)
        }
        fn write(&mut self, field: Field, value: u64) {
            self.0.insert(field, value);
        }
    }

    const OWN: u64 = 0x1_D3FF;

    fn resident() -> impl Iterator<Item = Field> {
        switched::resident_loaded_by(ExitControls::all()).map(|row| row.guest)
    }

    fn nested_exit(exit: ExitControls) -> (Vmcs01, Once) {
        let mut vmcs12 = Vmcs12::new();
        let host = [Field::HOST_S_CET, Field::HOST_SSP, Field::HOST_INTR_SSP_TABLE, Field::HOST_IA32_PKRS];
        for (field, value) in host.into_iter().chain([Field::HOST_IA32_PERF_GLOBAL_CTRL]).zip(1u64..) {
            vmcs12.set(field, value << 12);
        }
        vmcs12.set(Field::VM_EXIT_CONTROLS, exit.bits().into());
        let (mut vmcs01, mut once) = (Vmcs01::default(), Once::empty());
        vmcs01.write(Field::VM_ENTRY_CONTROLS, OWN);
        // L2's values at its VMRESUME.
        for field in resident() {
            vmcs01.write(field, 0x77);
        }
        once.load_resident(&mut vmcs01, &vmcs12);
        (vmcs01, once)
    }

    #[test]
    fn what_the_guest_does_not_ask_for_costs_nothing_and_stays() {
        let (mut vmcs01, once) = nested_exit(ExitControls::all() - switched::RESIDENT_EXIT);
        assert_eq!(once, Once::empty());
        assert_eq!(vmcs01.read(Field::VM_ENTRY_CONTROLS), OWN);
        assert_eq!(vmcs01.read(Field::GUEST_S_CET), 0x77);
    }

    #[test]
    fn each_control_loads_its_values_with_one_entry() {
        for (exit, entry, values) in [
            (
                1 << 28,
                1 << 20,
                &[
                    (Field::GUEST_S_CET, 1u64 << 12),
                    (Field::GUEST_SSP, 2 << 12),
                    (Field::GUEST_INTR_SSP_TABLE, 3 << 12),
                ][..],
            ),
            (1 << 29, 1 << 22, &[(Field::GUEST_IA32_PKRS, 4 << 12)]),
            (1 << 12, 1 << 13, &[(Field::GUEST_IA32_PERF_GLOBAL_CTRL, 5 << 12)]),
            (1 << 27, 1 << 19, &[(Field::GUEST_UINV, 0)]),
        ] {
            let (mut vmcs01, mut once) = nested_exit(ExitControls::from_bits_retain(exit));
            assert_eq!(vmcs01.read(Field::VM_ENTRY_CONTROLS), OWN | entry);
            for field in resident() {
                let loaded = values.iter().find(|(loaded, _)| *loaded == field).map_or(0x77, |(_, value)| *value);
                assert_eq!(vmcs01.read(field), loaded, "{field}");
            }
            once.done(&mut vmcs01);
            assert_eq!((once, vmcs01.read(Field::VM_ENTRY_CONTROLS)), (Once::empty(), OWN));
            assert_eq!(vmcs01.0.get(&Field::VM_ENTRY_MSR_LOAD_COUNT), None, "no area was armed");
        }
    }
}
