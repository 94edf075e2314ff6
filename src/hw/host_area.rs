//! The host-state area of nvmx: written once to each VMCS, the same in all of them (invariant I4), and by nobody else.
//!
//! One field of it can be lent: HOST_RSP of a VMCS holds L2's value while that is a shadow VMCS ([`Lent`]).
//!
//! Source: SDM vol. 3C, "Host-State Area", "Loading Host State", "VMCS Types: Ordinary and Shadow".

use super::phys::DirectMap;
use super::vmenter::{self, GuestRegs};
use super::vmx::{Region, Vmx};
use super::{cpu, cr, msr};
use crate::addr::Hpa;
use crate::mm::PhysMem;
use crate::vmx::Field;
use crate::vmx::field::Width;
use crate::vmx::region::SHADOW_INDICATOR;

/// IA32_PAT with the value after reset: nvmx's own accesses are write-back whatever the guests choose.
const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;

/// Writes the host-state area of the current VMCS.
pub fn write(vmx: &mut Vmx, regs: &mut GuestRegs) {
    let tables = cpu::this().host_tables();
    for (field, value) in [
        (Field::HOST_CR0, cr::cr0()),
        (Field::HOST_CR3, cr::cr3()),
        (Field::HOST_CR4, cr::cr4()),
        (Field::HOST_CS_SELECTOR, tables.code as u64),
        (Field::HOST_SS_SELECTOR, tables.data as u64),
        (Field::HOST_DS_SELECTOR, 0),
        (Field::HOST_ES_SELECTOR, 0),
        (Field::HOST_FS_SELECTOR, 0),
        (Field::HOST_GS_SELECTOR, 0),
        (Field::HOST_TR_SELECTOR, tables.task as u64),
        (Field::HOST_FS_BASE, 0),
        (Field::HOST_GS_BASE, tables.gs_base),
        (Field::HOST_TR_BASE, tables.tss_base),
        (Field::HOST_GDTR_BASE, tables.gdt_base),
        (Field::HOST_IDTR_BASE, tables.idt_base),
        (Field::HOST_IA32_SYSENTER_CS, 0),
        (Field::HOST_IA32_SYSENTER_ESP, 0),
        (Field::HOST_IA32_SYSENTER_EIP, 0),
        (Field::HOST_IA32_PAT, PAT_AT_RESET),
        (Field::HOST_IA32_EFER, msr::efer()),
        (Field::HOST_RIP, vmenter::host_rip()),
        (Field::HOST_RSP, regs.settle()),
    ] {
        vmx.write_host_state(field, value);
    }
    vmx.host_rsp = regs.host_rsp();
}

/// Writes HOST_RSP of the current VMCS in order to find it in memory. What else its host-state area needs comes later, by [`write()`], and
/// with it another HOST_RSP.
pub fn try_host_rsp(vmx: &mut Vmx, value: u64) {
    vmx.write_host_state(Field::HOST_RSP, value);
}

/// HOST_RSP of a VMCS is L2's: VMREAD and VMWRITE of L2 reach it there without an exit.
///
/// Only a shadow VMCS is lent from, which VMLAUNCH and VMRESUME refuse; it becomes an ordinary one again by
/// [`Lent::take_back`] alone, which leaves nvmx's own value in it. So no entry ever runs with L2's.
#[derive(Debug)]
#[must_use]
pub struct Lent(Region);

impl Lent {
    /// Makes the current VMCS, which is the one in `region`, a shadow VMCS with L2's value; `next` is current afterwards.
    #[inline(always)]
    pub fn by_becoming_shadow(
        vmx: &mut Vmx,
        phys: &DirectMap,
        region: &Region,
        revision: u32,
        value: u64,
        next: &Region,
    ) -> Self {
        vmx.write_host_state(Field::HOST_RSP, value);
        vmx.exchange(phys, region, revision | SHADOW_INDICATOR, next);
        Self(*region)
    }

    /// Puts L2's value into the shadow VMCS in `region`, which is current.
    ///
    /// # Panics
    ///
    /// If it is an ordinary VMCS.
    pub fn from_shadow(vmx: &mut Vmx, phys: &DirectMap, region: Region, value: u64) -> Self {
        assert!(phys.read_u64(region.at()) as u32 & SHADOW_INDICATOR != 0, "only a shadow VMCS is lent from");
        vmx.write_host_state(Field::HOST_RSP, value);
        Self(region)
    }

    /// Makes the VMCS an ordinary one again, and current, with nvmx's own value; answers with the one that L2 left.
    #[inline(always)]
    pub fn take_back(self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) -> u64 {
        vmx.exchange(phys, &self.0, revision, &self.0);
        let value = vmx.read(Field::HOST_RSP);
        vmx.write_host_state(Field::HOST_RSP, vmx.host_rsp);
        value
    }
}

/// [`Lent`] under a hypervisor that keeps VMCSs in memory: of a VMCS that is not current, without an instruction. It is where in the
/// region HOST_RSP lies.
#[derive(Debug)]
#[must_use]
pub struct LentInMemory(u64);

impl LentInMemory {
    /// Makes the VMCS in `region`, whose HOST_RSP lies `host_rsp` bytes in, a shadow VMCS with L2's value.
    pub fn by_becoming_shadow(phys: &DirectMap, region: Region, host_rsp: u64, revision: u32, value: u64) -> Self {
        region.mark(phys, revision | SHADOW_INDICATOR);
        region.write(phys, host_rsp, Width::Natural, value);
        Self(host_rsp)
    }

    /// Makes the VMCS, which is the one in `region`, an ordinary one again, with nvmx's own value; answers with the one that L2 left.
    pub fn take_back(self, vmx: &Vmx, phys: &DirectMap, region: Region, revision: u32) -> u64 {
        let value = phys.read_u64(Hpa::new(region.at().get() + self.0));
        region.write(phys, self.0, Width::Natural, vmx.host_rsp);
        region.mark(phys, revision);
        value
    }
}
