//! MSRs of L2 that nvmx knows without asking: writes to them exit, so a reflected exit writes them only when they change.
//!
//! Such writes are rare (an operating system sets these MSRs once), reflected exits are not: five VMCS accesses less on
//! each. The values live in vmcs01's guest-state area; here is a copy of it.

use crate::vmx::{Field, FieldAccess};
use crate::x86::{Cr0, Fault};

/// MSR index and field of each tracked MSR.
const MSRS: [(u32, Field); 5] = [
    (0x174, Field::GUEST_SYSENTER_CS),
    (0x175, Field::GUEST_SYSENTER_ESP),
    (0x176, Field::GUEST_SYSENTER_EIP),
    (0x277, Field::GUEST_IA32_PAT),
    (0xC000_0080, Field::GUEST_IA32_EFER),
];
const CS: usize = 0;
const ESP: usize = 1;
const EIP: usize = 2;
const PAT: usize = 3;
const EFER: usize = 4;

/// SCE, LME, LMA, NXE
const EFER_DEFINED: u64 = 0xD01;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The values.
#[derive(Clone, Copy, Default)]
pub struct Tracked([u64; MSRS.len()]);

/// What of vmcs12 goes to the tracked MSRs on a reflected exit.
pub struct HostMsrs {
    /// IA32_SYSENTER_CS, _ESP, _EIP
    pub sysenter: [u64; 3],
    /// IA32_PAT
    pub pat: u64,
    /// IA32_EFER
    pub efer: u64,
}

impl Tracked {
    /// The MSRs whose writes must exit.
    pub fn indexes() -> impl Iterator<Item = u32> {
        MSRS.iter().map(|(index, _)| *index)
    }

    /// Reads all values from vmcs01, which is current.
    pub fn refresh(&mut self, vmcs01: &mut impl FieldAccess) {
        for (value, (_, field)) in self.0.iter_mut().zip(MSRS) {
            *value = vmcs01.read(field);
        }
    }

    /// L2's IA32_PAT.
    #[inline(always)]
    pub fn pat(&self) -> u64 {
        self.0[PAT]
    }

    /// L2's IA32_EFER, in VMX operation.
    pub fn efer(&self) -> u64 {
        self.0[EFER]
    }

    /// Writes what differs to vmcs01.
    #[inline(always)]
    pub fn load(&mut self, vmcs01: &mut impl FieldAccess, host: &HostMsrs) {
        let [cs, esp, eip] = host.sysenter;
        for (i, value) in [cs, esp, eip, host.pat, host.efer].into_iter().enumerate() {
            if self.0[i] != value {
                self.0[i] = value;
                vmcs01.write(MSRS[i].1, value);
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
        let i = MSRS.iter().position(|(msr, _)| *msr == index)?;
        let value = match i {
            CS => Ok(value & Field::GUEST_SYSENTER_CS.mask()),
            ESP | EIP => legal(canonical, value),
            PAT => legal(is_pat(value), value),
            _ => {
                let paging = vmcs01.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0;
                new_efer(vmcs01.read(Field::GUEST_IA32_EFER), paging, value)
            }
        };
        Some(value.map(|value| {
            self.0[i] = value;
            vmcs01.write(MSRS[i].1, value);
        }))
    }
}

fn legal(holds: bool, value: u64) -> Result<u64, Fault> {
    if holds { Ok(value) } else { Err(Fault::GeneralProtection(0)) }
}

/// What WRMSR of `value` makes of IA32_EFER: LMA follows from LME and CR0.PG and takes no write, paging freezes LME
/// (SDM vol. 3A, "IA-32e Mode Initialization").
fn new_efer(old: u64, paging: bool, value: u64) -> Result<u64, Fault> {
    let frozen = if paging { EFER_LME } else { 0 };
    legal(value & !EFER_DEFINED == 0 && (old ^ value) & frozen == 0, value & !EFER_LMA | old & EFER_LMA)
}

/// Each byte is a memory type (SDM vol. 3A, table "Memory Types That Can Be Encoded With PAT").
pub fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
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

    const HOST: HostMsrs = HostMsrs { sysenter: [8, 0x1000, 0x2000], pat: 0x0007_0406_0007_0406, efer: 0xD01 };

    #[test]
    fn a_reflected_exit_writes_only_what_differs() {
        let (mut tracked, mut vmcs01) = (Tracked::default(), Vmcs01::default());
        tracked.load(&mut vmcs01, &HOST);
        assert_eq!(vmcs01.writes, MSRS.map(|(_, field)| field));
        tracked.load(&mut vmcs01, &HOST);
        tracked.load(&mut vmcs01, &HostMsrs { sysenter: [8, 0x1000, 0x2008], efer: 0x501, ..HOST });
        assert_eq!(vmcs01.writes[5..], [Field::GUEST_SYSENTER_EIP, Field::GUEST_IA32_EFER]);
        assert_eq!(tracked.0.map(Some), MSRS.map(|(_, field)| vmcs01.values.get(&field).copied()));
        assert_eq!((tracked.pat(), tracked.efer()), (HOST.pat, 0x501));
    }

    #[test]
    fn what_l2_writes_is_known_and_what_it_may_not_write_changes_nothing() {
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
        assert_eq!(tracked.0[..3], [8, 0x1000, 0x3000]);
        let mut read_again = Tracked::default();
        read_again.refresh(&mut vmcs01);
        assert_eq!(read_again.0, tracked.0);
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
    fn the_tracked_msrs_are_those_of_their_fields() {
        for (index, field) in MSRS {
            assert_eq!(crate::vmcs::msrs::vmcs_field(index), Some(field));
        }
        assert_eq!(MSRS[CS].1, Field::GUEST_SYSENTER_CS);
        assert_eq!([MSRS[ESP].1, MSRS[EIP].1], [Field::GUEST_SYSENTER_ESP, Field::GUEST_SYSENTER_EIP]);
        assert_eq!([MSRS[PAT].1, MSRS[EFER].1], [Field::GUEST_IA32_PAT, Field::GUEST_IA32_EFER]);
    }
}
