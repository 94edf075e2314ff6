//! VMFUNC of L3. vmcs02 enables the instruction and none of its functions, so each one that the processor does not refuse
//! (#UD without the control or for a function above 63) exits, and nvmx does what a processor with vmcs12's controls does.
//!
//! Source: SDM vol. 3C, "VM Functions": "General Operation of the VMFUNC Instruction", "EPTP Switching".

use super::{completion, reflect, sub_pages};
use crate::addr::Gpa;
use crate::cpu::{Cpu, others};
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::checks::eptp_is_valid;
use crate::rules::merge::Duties;
use crate::trace::KillReason;
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::SlotId;
use crate::vmx::controls::EPTP_SWITCHING;
use crate::vmx::{Capabilities, Field};

/// Entries of an EPTP list: one page of them.
const LIST_ENTRIES: u32 = 512;

/// Handles the exit; vmcs02 is current.
pub fn emulate(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let [rax, rcx, ..] = cpu.regs.gpr;
    let (function, ecx) = (rax as u32, rcx as u32);
    let slot = &mut cpu.nested.slots[id];
    // Only what the checks let through can be enabled.
    let enabled = slot.vmcs12.get(Field::VM_FUNCTION_CONTROLS) & EPTP_SWITCHING != 0 && function == 0;
    let eptp12 = if enabled { listed_eptp(slot, &cpu.guest, &cpu.config.offered, ecx) } else { None };
    let Some(eptp12) = eptp12 else { return reflect::reflect(cpu, id, None) };
    slot.vmcs12.set(Field::EPT_POINTER, eptp12);
    if cpu.config.offered.has_field(Field::EPTP_INDEX) {
        slot.vmcs12.set(Field::EPTP_INDEX, ecx.into());
    }
    let tables = &mut Cpu::tables(&mut cpu.frames, &cpu.phys);
    let ept01 = (!others::several_run()).then_some(&mut cpu.ept01);
    let activation = cpu.ept02.activate(slot.eptp12(), &cpu.guest, ept01, tables);
    slot.vmcs02.run_on(&mut cpu.vmx, activation, cpu.ept01.eptp());
    if slot.has_duty(Duties::POINT_TO_SUB_PAGES) {
        sub_pages::point(cpu, id)?;
    }
    completion::completed(cpu, id)
}

/// Entry `number` of L2's EPTP list, read once, if a VM entry would accept it. Memory that L2 does not own reads as all ones,
/// which none does.
fn listed_eptp(slot: &Slot, guest: &GuestMemory<impl PhysMem>, caps: &Capabilities, number: u32) -> Option<u64> {
    let list = Gpa::new(slot.vmcs12.get(Field::EPTP_LIST_ADDRESS));
    let at = (number < LIST_ENTRIES).then(|| list.checked_add(u64::from(number) * 8)).flatten()?;
    guest.read_u64(at).ok().filter(|eptp| eptp_is_valid(*eptp, caps))
}
