//! The host-state area of nvmx: written once to each VMCS, the same in all of them (invariant I4), and by nobody else.
//!
//! Source: SDM vol. 3C, "Host-State Area" and "Loading Host State".

use super::vmenter::{self, GuestRegs};
use super::vmx::Vmx;
use super::{cpu, cr, msr};
use crate::vmx::Field;

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
}
