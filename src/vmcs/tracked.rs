//! MSRs of L2 that nvmx knows without asking: writes to them exit, so a reflected exit writes them only when they change.
//!
//! Such writes are rare (an operating system sets these MSRs once), reflected exits are not: five VMCS accesses less on
//! each. The values live in vmcs01's guest-state area; here is a copy of it. Which MSRs they are is
//! [`switched`](crate::rules::switched)'s.

use crate::rules::switched::{Host, Item, TABLE, TRACKED, Takes};
use crate::vmx::{Field, FieldAccess};
use crate::x86::msr::is_pat;
use crate::x86::{Cr0, Fault, efer};

/// The values, by item.
#[derive(Clone, Copy, Default)]
pub struct Tracked {
    values: [u64; TRACKED],
    version: u64,
}

/// Stands for the values as they were at some time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version(u64);

impl Version {
    /// They never were like that.
    pub const NONE: Version = Version(u64::MAX);

    /// Stands for these values and for something else that was so often changed: both counts only grow, and so does their sum, which is
    /// the same again only if neither has changed.
    #[inline(always)]
    pub const fn with(self, changes: u64) -> Self {
        Self(self.0.wrapping_add(changes))
    }
}

/// What a reflected exit gives L2, by item.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostValues([u64; TRACKED]);

impl HostValues {
    /// As the host-state area says.
    #[inline(always)]
    pub fn of(get: impl Fn(Field) -> u64) -> Self {
        // No loop: where a field is not a constant its place must be looked up.
        const fn field(i: usize) -> Field {
            match TABLE[i].host {
                Host::Field(field) => field,
                Host::Constant(_) => panic!("what nvmx knows of L2 has a field in the host-state area"),
            }
        }
        const { assert!(TRACKED == 5, "a line for each") };
        Self([
            get(const { field(0) }),
            get(const { field(1) }),
            get(const { field(2) }),
            get(const { field(3) }),
            get(const { field(4) }),
        ])
    }

    /// The value of a tracked item, to be changed where the host's is not loaded.
    #[inline(always)]
    pub fn value(&mut self, item: Item) -> &mut u64 {
        &mut self.0[item as usize]
    }
}

/// An exit of L3 loads one of these MSRs from this field.
pub const fn is_host_field(field: Field) -> bool {
    matches!(
        field,
        Field::HOST_IA32_SYSENTER_CS
            | Field::HOST_IA32_SYSENTER_ESP
            | Field::HOST_IA32_SYSENTER_EIP
            | Field::HOST_IA32_PAT
            | Field::HOST_IA32_EFER
    )
}

impl Tracked {
    /// Reads all values from vmcs01, which is current.
    pub fn refresh(&mut self, vmcs01: &mut impl FieldAccess) {
        for (value, row) in self.values.iter_mut().zip(TABLE) {
            *value = vmcs01.read(row.guest);
        }
        self.version += 1;
    }

    /// L2's IA32_PAT.
    #[inline(always)]
    pub fn pat(&self) -> u64 {
        self.values[Item::Pat as usize]
    }

    /// L2's IA32_EFER, in VMX operation.
    pub fn efer(&self) -> u64 {
        self.values[Item::Efer as usize]
    }

    /// Another one whenever a value may have changed.
    #[inline(always)]
    pub const fn version(&self) -> Version {
        Version(self.version)
    }

    /// Writes what differs to vmcs01.
    #[inline(always)]
    pub fn load(&mut self, vmcs01: &mut impl FieldAccess, host: &HostValues) {
        for (i, value) in host.0.into_iter().enumerate() {
            if self.values[i] != value {
                self.values[i] = value;
                self.version += 1;
                vmcs01.write(TABLE[i].guest, value);
            }
        }
    }

    /// WRMSR of L2 to a tracked MSR: `None` if it is not one. vmcs01 is current.
    pub fn wrmsr(
        &mut self,
        vmcs01: &mut impl FieldAccess,
        index: u32,
        value: u64,
        canonical: bool,
    ) -> Option<Result<(), Fault>> {
        let item = Item::of_msr(index).filter(|item| item.is_tracked())?;
        let value = match item.row().takes {
            Takes::Low32 => Ok(value & 0xFFFF_FFFF),
            Takes::Canonical => legal(canonical, value),
            Takes::Pat => legal(is_pat(value), value),
            Takes::Efer => {
                let paging = vmcs01.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0;
                new_efer(vmcs01.read(item.row().guest), paging, value)
            }
            Takes::Unseen => return None,
        };
        Some(value.map(|value| {
            self.values[item as usize] = value;
            self.version += 1;
            vmcs01.write(item.row().guest, value);
        }))
    }
}

fn legal(holds: bool, value: u64) -> Result<u64, Fault> {
    if holds { Ok(value) } else { Err(Fault::GeneralProtection(0)) }
}

/// What WRMSR of `value` makes of IA32_EFER: LMA follows from LME and CR0.PG and takes no write, paging freezes LME
/// (SDM vol. 3A, "IA-32e Mode Initialization").
fn new_efer(old: u64, paging: bool, value: u64) -> Result<u64, Fault> {
    let frozen = if paging { efer::LME } else { 0 };
    legal(value & !efer::DEFINED == 0 && (old ^ value) & frozen == 0, value & !efer::LMA | old & efer::LMA)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const GP: Result<u64, Fault> = Err(Fault::GeneralProtection(0));

    /// vmcs01 that notes what is written to it.
    #[derive(Default)]
    struct Vmcs01 {
        values: HashMap<Field, u64>,
        writes: Vec<Field>,
    }

    impl FieldAccess for Vmcs01 {
        fn read(&mut self, field: Field) -> u64 {
            self.values.get(&field).copied().unwrap_or(0)
        }
        fn write(&mut self, field: Field, value: u64) {
            self.values.insert(field, value);
            self.writes.push(field);
        }
    }

    const FIELDS: [Field; TRACKED] = [
        Field::GUEST_SYSENTER_CS,
        Field::GUEST_SYSENTER_ESP,
        Field::GUEST_SYSENTER_EIP,
        Field::GUEST_IA32_PAT,
        Field::GUEST_IA32_EFER,
    ];
    const HOST: HostValues = HostValues([8, 0x1000, 0x2000, 0x0007_0406_0007_0406, 0xD01]);

    #[test]
    fn a_reflected_exit_writes_only_what_differs() {
        let (mut tracked, mut vmcs01) = (Tracked::default(), Vmcs01::default());
        tracked.load(&mut vmcs01, &HOST);
        assert_eq!(vmcs01.writes, FIELDS);
        tracked.load(&mut vmcs01, &HOST);
        tracked.load(&mut vmcs01, &HostValues([8, 0x1000, 0x2008, 0x0007_0406_0007_0406, 0x501]));
        assert_eq!(vmcs01.writes[5..], [Field::GUEST_SYSENTER_EIP, Field::GUEST_IA32_EFER]);
        assert_eq!(tracked.values.map(Some), FIELDS.map(|field| vmcs01.values.get(&field).copied()));
        assert_eq!((tracked.pat(), tracked.efer()), (0x0007_0406_0007_0406, 0x501));
    }

    #[test]
    fn a_version_stands_for_the_values() {
        let (mut tracked, mut vmcs01) = (Tracked::default(), Vmcs01::default());
        tracked.load(&mut vmcs01, &HOST);
        let version = tracked.version();
        tracked.load(&mut vmcs01, &HOST);
        assert_eq!(tracked.version(), version);
        for (i, row) in TABLE.iter().enumerate().take(TRACKED) {
            let (before, mut host) = (tracked.version(), HOST);
            host.0[i] += 1;
            tracked.load(&mut vmcs01, &host);
            assert_ne!(tracked.version(), before, "{}", row.name);
        }
        let before = tracked.version();
        assert_eq!(tracked.wrmsr(&mut vmcs01, 0x174, 16, true), Some(Ok(())));
        assert!(tracked.version() != before && before != Version::NONE);
        let before = tracked.version();
        tracked.refresh(&mut vmcs01);
        assert_ne!(tracked.version(), before, "an exit has loaded what nobody saw");
        for field in Field::ALL {
            let tracked = TABLE.iter().take(TRACKED).any(|row| row.host == Host::Field(*field));
            assert_eq!(is_host_field(*field), tracked, "{field}");
        }
    }

    #[test]
    fn what_the_guest_writes_is_known_and_what_it_may_not_write_changes_nothing() {
        let (mut tracked, mut vmcs01) = (Tracked::default(), Vmcs01::default());
        tracked.load(&mut vmcs01, &HOST);
        vmcs01.values.insert(Field::GUEST_CR0, 1 << 31);
        vmcs01.writes.clear();
        for (index, value, canonical) in [(0x175, 1 << 63, false), (0x277, 2, true), (0xC000_0080, 0x401, true)] {
            let refused = tracked.wrmsr(&mut vmcs01, index, value, canonical);
            assert_eq!(refused, Some(Err(Fault::GeneralProtection(0))), "{index:#x}");
        }
        assert_eq!(tracked.wrmsr(&mut vmcs01, 0x10, 0, true), None, "not a tracked MSR");
        assert!(vmcs01.writes.is_empty());

        assert_eq!(tracked.wrmsr(&mut vmcs01, 0x174, 0xFFFF_0000_0008, false), Some(Ok(())), "32 bits count");
        assert_eq!(tracked.wrmsr(&mut vmcs01, 0x176, 0x3000, true), Some(Ok(())));
        assert_eq!(tracked.values[..3], [8, 0x1000, 0x3000]);
        let mut read_again = Tracked::default();
        read_again.refresh(&mut vmcs01);
        assert_eq!(read_again.values, tracked.values);
    }

    #[test]
    fn each_byte_of_pat_is_one_of_six_types() {
        for byte in 0..8 {
            for value in 0..=255u64 {
                let known = [0, 1, 4, 5, 6, 7].contains(&value);
                assert_eq!(
                    is_pat(0x0007_0406_0007_0406 & !(0xFF << (8 * byte)) | value << (8 * byte)),
                    known,
                    "{value}"
                );
            }
        }
    }

    #[test]
    fn efer_has_four_bits_and_lma_takes_no_write() {
        for bit in 0..64 {
            let expected = match bit {
                0 | 8 | 11 => Ok(1 << bit),
                10 => Ok(0),
                _ => GP,
            };
            assert_eq!(new_efer(0, false, 1 << bit), expected, "bit {bit}");
        }
        assert_eq!(new_efer(0xD00, true, 0x901), Ok(0xD01), "LMA stays");
    }

    #[test]
    fn lme_is_frozen_while_paging_is_on() {
        assert_eq!(new_efer(0, true, 0x100), GP);
        assert_eq!(new_efer(0x500, true, 0x400), GP);
        assert_eq!(new_efer(0x500, true, 0x900), Ok(0xD00));
        assert_eq!(new_efer(0, false, 0x100), Ok(0x100));
    }

    #[test]
    fn the_host_values_are_those_of_the_host_fields() {
        let values = HostValues::of(|field| field.encoding().into());
        let fields = [
            Field::HOST_IA32_SYSENTER_CS,
            Field::HOST_IA32_SYSENTER_ESP,
            Field::HOST_IA32_SYSENTER_EIP,
            Field::HOST_IA32_PAT,
            Field::HOST_IA32_EFER,
        ];
        assert_eq!(values.0, fields.map(|field| u64::from(field.encoding())));
    }
}
