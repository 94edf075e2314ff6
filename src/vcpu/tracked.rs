//! MSRs of L2 that nvmx knows without asking: writes to them exit, so a reflected exit writes them only when they change.
//!
//! Such writes are rare (an operating system sets these MSRs once), reflected exits are not: five VMCS accesses less on
//! each. The values live in vmcs01's guest-state area; here is a copy of it.

use crate::emul::cr::Cr0;
use crate::error::Fault;
use crate::hw::vmx::Vmx;
use crate::vmx::Field;

/// MSR index and field of each tracked MSR.
const MSRS: [(u32, Field); 5] = [
    (0x174, Field::GUEST_SYSENTER_CS),
    (0x175, Field::GUEST_SYSENTER_ESP),
    (0x176, Field::GUEST_SYSENTER_EIP),
    (0x277, Field::GUEST_IA32_PAT),
    (0xC000_0080, Field::GUEST_IA32_EFER),
];
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
    pub fn refresh(&mut self, vmx: &mut Vmx) {
        for (value, (_, field)) in self.0.iter_mut().zip(MSRS) {
            *value = vmx.read(field);
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

    /// Writes what differs to vmcs01, which is current.
    #[inline(always)]
    pub fn load(&mut self, vmx: &mut Vmx, host: &HostMsrs) {
        let [cs, esp, eip] = host.sysenter;
        for (i, value) in [cs, esp, eip, host.pat, host.efer].into_iter().enumerate() {
            if self.0[i] != value {
                self.0[i] = value;
                vmx.write(MSRS[i].1, value);
            }
        }
    }

    /// WRMSR of L2 to a tracked MSR: `None` if it is not one. vmcs01 is current.
    pub fn wrmsr(&mut self, vmx: &mut Vmx, index: u32, value: u64, canonical: bool) -> Option<Result<(), Fault>> {
        let i = MSRS.iter().position(|(msr, _)| *msr == index)?;
        let legal = match index {
            0x174 => true,
            0x175 | 0x176 => canonical,
            0x277 => is_pat(value),
            _ => {
                // LMA follows from LME and CR0.PG; paging freezes LME.
                let old = vmx.read(Field::GUEST_IA32_EFER);
                let paging = vmx.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0;
                value & !EFER_DEFINED == 0 && !(paging && (old ^ value) & EFER_LME != 0)
            }
        };
        if !legal {
            return Some(Err(Fault::GeneralProtection(0)));
        }
        let value = match i {
            EFER => value & !EFER_LMA | vmx.read(Field::GUEST_IA32_EFER) & EFER_LMA,
            _ => value & MSRS[i].1.mask(),
        };
        self.0[i] = value;
        vmx.write(MSRS[i].1, value);
        Some(Ok(()))
    }
}

/// Each byte is a memory type (SDM vol. 3A, table "Memory Types That Can Be Encoded With PAT").
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}
