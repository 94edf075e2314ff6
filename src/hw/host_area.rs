//! The host-state area of nvmx: written once to each VMCS, the same in all of them (invariant I4), and by nobody else.
//!
//! Some fields of it can be lent: those of a VMCS hold L2's values while that is a shadow VMCS ([`Lent`], [`LentInMemory`]).
//!
//! Source: SDM vol. 3C, "Host-State Area", "Loading Host State", "VMCS Types: Ordinary and Shadow".

use super::phys::DirectMap;
use super::vmenter::{self, GuestRegs};
use super::vmx::{Region, Vmx};
use super::{cpu, cr, msr};
use crate::mm::PhysMem;
use crate::vmx::Field;
use crate::vmx::lent::{IN_MEMORY, LENT};
use crate::vmx::region::SHADOW_INDICATOR;
use core::array;

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
        if let Some(own) = LENT.into_iter().zip(&mut vmx.own).find_map(|(lent, own)| (lent == field).then_some(own)) {
            *own = value;
        }
    }
}

/// Writes a field that can be lent to the current VMCS in order to find it in memory. What else its host-state area needs comes later, by
/// [`write()`], and with it another value.
pub fn try_lent(vmx: &mut Vmx, value: impl Fn(Field) -> u64) {
    LENT.into_iter().for_each(|field| vmx.write_host_state(field, value(field)));
}

/// The first `N` of the fields that can be lent are L2's in a VMCS: VMREAD and VMWRITE of L2 reach them there without an exit.
///
/// Only a shadow VMCS is lent from, which VMLAUNCH and VMRESUME refuse; it becomes an ordinary one again by
/// [`Lent::take_back`] alone, which leaves nvmx's own values in it, as [`Lent::end`] does. So no entry ever runs with L2's.
#[derive(Debug)]
#[must_use]
pub struct Lent<const N: usize>(Region);

impl<const N: usize> Lent<N> {
    const FIELDS: [Field; N] = {
        let mut fields = [LENT[0]; N];
        let mut i = 0;
        while i < N {
            fields[i] = LENT[i];
            i += 1;
        }
        fields
    };

    #[inline(always)]
    fn put(vmx: &mut Vmx, values: [u64; N]) {
        Self::FIELDS.into_iter().zip(values).for_each(|(field, value)| vmx.write_host_state(field, value));
    }

    /// L2's values, and nvmx's own instead of them.
    #[inline(always)]
    fn swap(vmx: &mut Vmx) -> [u64; N] {
        let values = Self::FIELDS.map(|field| vmx.read(field));
        Self::put(vmx, array::from_fn(|i| vmx.own[i]));
        values
    }

    /// Makes the current VMCS, which is the one in `region`, a shadow VMCS with L2's values; `next` is current afterwards.
    #[inline(always)]
    pub fn by_becoming_shadow(
        vmx: &mut Vmx,
        phys: &DirectMap,
        region: &Region,
        revision: u32,
        values: [u64; N],
        next: &Region,
    ) -> Self {
        Self::put(vmx, values);
        vmx.exchange(phys, region, revision | SHADOW_INDICATOR, next);
        Self(*region)
    }

    /// Puts L2's values into the shadow VMCS in `region`, which is current.
    ///
    /// # Panics
    ///
    /// If it is an ordinary VMCS.
    pub fn from_shadow(vmx: &mut Vmx, phys: &DirectMap, region: Region, values: [u64; N]) -> Self {
        assert!(phys.read_u64(region.at()) as u32 & SHADOW_INDICATOR != 0, "only a shadow VMCS is lent from");
        Self::put(vmx, values);
        Self(region)
    }

    /// Makes the VMCS an ordinary one again, and current, with nvmx's own values; answers with those that L2 left.
    #[inline(always)]
    pub fn take_back(self, vmx: &mut Vmx, phys: &DirectMap, revision: u32) -> [u64; N] {
        vmx.exchange(phys, &self.0, revision, &self.0);
        Self::swap(vmx)
    }

    /// The VMCS, which is current, stays a shadow VMCS and gets nvmx's own values; answers with those that L2 left.
    pub fn end(self, vmx: &mut Vmx) -> [u64; N] {
        Self::swap(vmx)
    }
}

/// Where in a region the fields lie that are lent in memory.
pub type Places = [u64; IN_MEMORY.len()];

/// [`Lent`] under a hypervisor that keeps VMCSs in memory: of a VMCS that is not current, without an instruction, all fields of
/// [`IN_MEMORY`].
#[derive(Debug)]
#[must_use]
pub struct LentInMemory {
    places: Places,
    /// nvmx's own primary controls: other than its host state, they are not the same in each VMCS.
    primary: u64,
}

impl LentInMemory {
    fn put(&self, phys: &DirectMap, region: Region, values: [u64; IN_MEMORY.len()]) {
        for ((place, field), value) in self.places.into_iter().zip(IN_MEMORY).zip(values) {
            region.write(phys, place, field.width(), value);
        }
    }

    /// Makes the VMCS in `region`, whose fields lie in these places, a shadow VMCS with L2's values.
    pub fn by_becoming_shadow(
        phys: &DirectMap,
        region: Region,
        places: Places,
        revision: u32,
        values: [u64; IN_MEMORY.len()],
    ) -> Self {
        region.mark(phys, revision | SHADOW_INDICATOR);
        let [.., place] = places;
        let lent = Self { places, primary: region.read(phys, place, Field::CPU_BASED_VM_EXEC_CONTROL) };
        lent.put(phys, region, values);
        lent
    }

    /// What L2 has in the VMCS, which is the one in `region`.
    pub fn values(&self, phys: &DirectMap, region: Region) -> [u64; IN_MEMORY.len()] {
        array::from_fn(|i| region.read(phys, self.places[i], IN_MEMORY[i]))
    }

    /// Makes the VMCS, which is the one in `region`, an ordinary one again, with nvmx's own values; answers with those that L2 left.
    pub fn take_back(self, vmx: &Vmx, phys: &DirectMap, region: Region, revision: u32) -> [u64; IN_MEMORY.len()] {
        let values = self.values(phys, region);
        let [stack, cr3, fs, gs] = vmx.own;
        self.put(phys, region, [stack, cr3, fs, gs, self.primary]);
        region.mark(phys, revision);
        values
    }
}
