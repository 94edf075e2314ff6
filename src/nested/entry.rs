//! VM entry of L3: from L2's VMLAUNCH or VMRESUME to vmcs02.
//!
//! Steady state does no checks and no merge: they run again only after L2 wrote a field they depend on.
//! Source: SDM vol. 3C, chapter "VM Entries".

use super::result::vmx_result;
use super::tell::refuse;
use super::{judge, reflect, shadow, sub_pages, usual, violation, virtual_apic};
use crate::addr::Gpa;
use crate::cpu::{Cpu, Operation, others};
use crate::ept::Activation;
use crate::guest::{Next, Stop, inject};
use crate::hw::vmx::{Invalidate, Vmx};
use crate::mm::linear::fetch_pdptes;
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::checks::{self, CheckId, ControlsChecked};
use crate::rules::explain::Refusal;
use crate::rules::merge::{self, Duties, NvmxNeeds, Translated};
use crate::trace::{KillReason, Promise, Ran};
use crate::vmcs::access::{MachineParts, NestedState};
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::tracked::{Tracked, Version};
use crate::vmcs::vpid::VPID01;
use crate::vmx::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::field::PDPTES;
use crate::vmx::region::NO_LINK;
use crate::vmx::{Field, FieldAccess, VmxError, VmxResult};
use crate::x86::{Cr0, Cr4, efer};

/// Enters L3 on the slot's vmcs12, as VMLAUNCH or VMRESUME; vmcs01 is current and the launch state was checked.
#[inline]
pub fn enter(cpu: &mut Cpu, id: SlotId) -> Result<Next, Stop> {
    if cpu.nested.slots[id].stale.intersects(Stale::PREPARED) {
        if let Err(error) = prepare(cpu, id) {
            vmx_result(cpu, VmxResult::FailValid(error));
            return Ok(Next::Advance);
        }
    }
    let slot = &cpu.nested.slots[id];
    let links = slot.has_duty(Duties::LINK_SHADOW_VMCS) || slot.vmcs12.get(Field::VMCS_LINK_POINTER) != NO_LINK;
    let link = if links { shadow::link(cpu, id) } else { NO_LINK };
    let slot = &mut cpu.nested.slots[id];
    let vmx = &mut cpu.vmx;
    let Some(merged) = &slot.merged else {
        return Err(KillReason::Broken(Promise::ControlsPrepared).into());
    };
    let (duties, uses_msr_bitmap) = (merged.duties, merged.msr_bitmap.is_some());
    let uses_timer = merged.pin.contains(PinControls::PREEMPTION_TIMER);
    slot.inherited.leave_guest(vmx);
    if uses_msr_bitmap {
        slot.msr_bitmap.refresh(&cpu.phys);
    }

    let on = MachineParts { vmx: &mut *vmx, phys: &cpu.phys, vmcs01: &cpu.vmcs01 };
    if cpu.config.access.enter(on, slot, Carried { tracked: &cpu.tracked }).is_err() {
        return lent_state_refused(cpu, id);
    }
    slot.vmcs02.link.put(vmx, link);
    if slot.stale.intersects(Stale::TO_WRITE) {
        slot.write_controls(vmx);
    }
    let activation = if duties.contains(Duties::LOAD_PDPTES) {
        Activation { eptp02: cpu.ept01.eptp(), invept: false, invept01: false }
    } else {
        let ept01 = (!others::several_run()).then_some(&mut cpu.ept01);
        cpu.ept02.activate(slot.eptp12(), &cpu.guest, ept01, &mut Cpu::tables(&mut cpu.frames, &cpu.phys))
    };
    slot.vmcs02.run_on(vmx, activation, cpu.ept01.eptp());
    if duties.contains(Duties::POINT_TO_SUB_PAGES) {
        sub_pages::point(cpu, id)?;
    }
    let slot = &mut cpu.nested.slots[id];
    if slot.stale.contains(Stale::VIOLATED) {
        violation::answered(cpu, id);
    }
    let (vmx, slot) = (&mut cpu.vmx, &mut cpu.nested.slots[id]);
    let vpid02 = if duties.contains(Duties::FLUSH_VPID) {
        vmx.invvpid(Invalidate::Single, VPID01, 0);
        VPID01
    } else {
        cpu.nested.vpids.assign(vmx, slot.vmcs12.get(Field::VIRTUAL_PROCESSOR_ID) as u16)
    };
    slot.vmcs02.run_with_vpid(vmx, vpid02);
    if uses_timer {
        slot.vmcs02.timer.start(vmx);
    }
    let count = slot.vmcs12.get(Field::VM_ENTRY_MSR_LOAD_COUNT);
    if count == 0 {
        slot.vmcs02.load_no_msrs(vmx);
    } else {
        let at = slot.vmcs12.get(Field::VM_ENTRY_MSR_LOAD_ADDR);
        let (list, count) = slot.msr_lists.copy_entry_area(&cpu.phys, &cpu.guest, at, count);
        slot.vmcs02.load_msrs(vmx, list, count);
        // IA32_PAT may be among them.
        slot.vmcs02.pat.forget();
    }
    if matches!(cpu.nested.operation, Operation::Root { .. }) {
        cpu.nested.operation = Operation::NonRoot { current: id };
    }
    if duties.contains(Duties::LOAD_PDPTES) {
        slot.vmcs02.pdptes12 = load_pdptes(vmx, &cpu.guest);
        if duties.contains(Duties::FLUSH_EPT01) {
            vmx.invept(Invalidate::Single, cpu.ept01.eptp().get());
        }
    }
    if slot.stale.contains(Stale::WAY) {
        usual::settle(cpu, id);
    }
    if cpu.nested.slots[id].stale.contains(Stale::GUEST) {
        return check_guest_state(cpu, id);
    }
    Ok(Next::Stay)
}

/// What L2 leaves in the processor for L3, and L3's IA32_PAT.
struct Carried<'a> {
    tracked: &'a Tracked,
}

impl NestedState for Carried<'_> {
    #[inline(always)]
    fn bring(&mut self, vmcs02: &mut impl FieldAccess, slot: &mut Slot) {
        slot.inherited.enter_nested(vmcs02, &slot.vmcs12, &mut slot.vmcs02.pat, self.tracked);
    }
}

/// A guest without EPT of L2: with PAE paging the entry loads the PDPTEs from the table at CR3. vmcs02 has EPT, so the
/// processor takes (and checks) those in its fields. Answers with what L2 had there, for an entry that fails.
fn load_pdptes(vmx: &mut Vmx, guest: &GuestMemory<impl PhysMem>) -> Option<[u64; 4]> {
    let pae = vmx.read(Field::GUEST_CR0) & Cr0::PG.bits() != 0
        && vmx.read(Field::GUEST_CR4) & Cr4::PAE.bits() != 0
        && vmx.read(Field::VM_ENTRY_CONTROLS) & EntryControls::IA32E_MODE_GUEST.bits() as u64 == 0;
    pae.then(|| {
        let old = PDPTES.map(|field| vmx.read(field));
        // No memory there: all ones, which the processor refuses as it would on the machine that L2 sees.
        let entries = fetch_pdptes(guest, vmx.read(Field::GUEST_CR3));
        PDPTES.into_iter().zip(entries).for_each(|(field, entry)| vmx.write(field, entry));
        old
    })
}

/// What L2 left in fields that it is lent breaks a rule, or must be judged with others: back to vmcs01, where the rules say which.
/// vmcs02 is current, and nothing was written to it yet.
#[cold]
fn lent_state_refused(cpu: &mut Cpu, id: SlotId) -> Result<Next, Stop> {
    cpu.leave_vmcs02(id);
    Ok(match prepare(cpu, id) {
        Err(error) => {
            vmx_result(cpu, VmxResult::FailValid(error));
            Next::Advance
        }
        // Nothing breaks one: the entry is to be made again.
        Ok(()) => Next::Stay,
    })
}

/// Runs the checks on what L2 wrote and merges anew; vmcs01 is current.
#[cold]
fn prepare(cpu: &mut Cpu, id: SlotId) -> Result<(), VmxError> {
    let (slot, access, on) = cpu.reach(id);
    access.look_at_lent(on, slot);
    let long_mode = cpu.tracked.efer() & efer::LMA != 0;
    let slot = &mut cpu.nested.slots[id];
    let (vmcs12, stale, offered) = (&slot.vmcs12, slot.stale, &cpu.config.offered);
    let controls = stale.contains(Stale::CONTROLS).then(|| checks::check_cached_controls(vmcs12, offered)).transpose();
    let checked = controls.and_then(|checked| {
        if stale.contains(Stale::HOST) {
            checks::check_host(vmcs12, offered, long_mode)?;
        }
        Ok(checked)
    });
    let checked = checked.map_err(|failure| {
        // Rules on controls come first, those too that are else the processor's.
        let failure = match failure.error {
            VmxError::EntryInvalidHostStateField => live_controls_failure(cpu, id).unwrap_or(failure),
            _ => failure,
        };
        let refusal = match failure.error {
            VmxError::EntryInvalidHostStateField => Refusal::HostState(failure.check),
            _ => Refusal::Controls(Some(failure.check)),
        };
        refuse(cpu, refusal);
        failure.error
    })?;
    if let Some(checked) = checked {
        merge_controls(cpu, id, checked);
        if let Err(error) = virtual_apic::map_access_page(cpu, id) {
            refuse(cpu, Refusal::Controls(None));
            return Err(error);
        }
    }
    cpu.nested.slots[id].stale -= Stale::PREPARED;
    Ok(())
}

/// The rule that a control in vmcs02 breaks; vmcs01 is current.
fn live_controls_failure(cpu: &mut Cpu, id: SlotId) -> Option<checks::Failure> {
    cpu.enter_vmcs02(id);
    let failure = judge::whole(cpu, id, |whole| whole.controls_in_vmcs02().err());
    cpu.leave_vmcs02(id);
    failure
}

/// Merges the controls anew, which were checked.
fn merge_controls(cpu: &mut Cpu, id: SlotId, checked: ControlsChecked) {
    let slot = &cpu.nested.slots[id];
    let primary = PrimaryControls::from_bits_retain(slot.vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32);
    let io = |field| cpu.guest.translate(Gpa::new(slot.vmcs12.get(field))).ok();
    let io_bitmaps = primary
        .contains(PrimaryControls::USE_IO_BITMAPS)
        .then(|| io(Field::IO_BITMAP_A).zip(io(Field::IO_BITMAP_B)))
        .flatten();
    let msr_bitmap = primary.contains(PrimaryControls::USE_MSR_BITMAPS).then(|| io(Field::MSR_BITMAP)).flatten();

    let apic = virtual_apic::pages(cpu, &cpu.nested.slots[id].vmcs12);
    let slot = &mut cpu.nested.slots[id];
    slot.msr_bitmap.follow(&cpu.phys, msr_bitmap);
    let to = Translated {
        io_bitmaps,
        msr_bitmap: msr_bitmap.map(|_| slot.msr_bitmap.at()),
        shadow_bitmaps: cpu.config.access.nested_bitmaps(slot),
        apic,
    };
    let merged = merge::merge(&NvmxNeeds::new(&cpu.config.hardware), &slot.vmcs12, checked, &to);
    let entry12 = EntryControls::from_bits_retain(slot.vmcs12.get(Field::VM_ENTRY_CONTROLS) as u32);
    let exit12 = ExitControls::from_bits_retain(slot.vmcs12.get(Field::VM_EXIT_CONTROLS) as u32);
    let unrestricted = merged.secondary.contains(SecondaryControls::UNRESTRICTED_GUEST);
    slot.inherited.plan(entry12, exit12, unrestricted);
    slot.host_msrs = Version::NONE;
    slot.settled = Version::NONE;
    slot.merged = Some(merged);
    slot.stale |= Stale::UNWRITTEN | Stale::WAY;
    // Here the processor writes without regard to ept01.
    for page in [merged.virtual_apic, merged.posted_descriptor].into_iter().flatten() {
        cpu.ept02.expose(Gpa::new(page.get()), &mut Cpu::tables(&mut cpu.frames, &cpu.phys));
    }
}

/// The rules on guest state that the processor does not apply to vmcs02 as it would to vmcs12. vmcs02 is current and
/// complete.
#[cold]
fn check_guest_state(cpu: &mut Cpu, id: SlotId) -> Result<Next, Stop> {
    let verdict = judge::whole(cpu, id, |whole| {
        // Rules on controls come first, those too that are else the processor's.
        whole.guest_beyond_hardware().map_err(|failure| (failure, whole.live_controls()))
    });
    let slot = &mut cpu.nested.slots[id];
    slot.stale -= Stale::GUEST;
    match verdict {
        Ok(()) => Ok(Next::Stay),
        Err((_, Err(controls))) => {
            slot.stale |= Stale::GUEST;
            refuse(cpu, Refusal::Controls(Some(controls.check)));
            if let Operation::NonRoot { current } = cpu.nested.operation {
                back_to_guest(cpu, current);
            }
            Ok(Next::Stay)
        }
        Err((failure, Ok(()))) => {
            slot.stale |= Stale::GUEST;
            refuse(cpu, Refusal::GuestState(Some(failure.check), failure.qualification));
            reflect::entry_failure(cpu, BasicReason::ENTRY_INVALID_GUEST_STATE, failure.qualification)?;
            Ok(Next::Stay)
        }
    }
}

/// The processor refused vmcs02 at VMLAUNCH or VMRESUME, after an exit of the guest that ran before: of the rules on controls, those on fields that live in vmcs02.
#[cold]
pub fn refused_by_processor(cpu: &mut Cpu) -> Result<(), KillReason> {
    let Operation::NonRoot { current } = cpu.nested.operation else {
        return Err(KillReason::Broken(Promise::NonRootOnVmcs02));
    };
    let error = cpu.vmx.read(Field::VM_INSTRUCTION_ERROR) as u32;
    if error != VmxError::EntryInvalidControlField as u32 {
        return Err(KillReason::EntryFailed { reason: error, qualification: 0 });
    }
    let check = judge::whole(cpu, current, |whole| whole.live_controls().err().map(|failure| failure.check));
    if check == Some(CheckId::TprThresholdFitsVtpr) && cpu.exited == Ran::Nested {
        return virtual_apic::below_threshold(cpu, current);
    }
    refuse(cpu, Refusal::Controls(check));
    back_to_guest(cpu, current);
    Ok(())
}

/// Back to L2 from an entry on vmcs02 that fails for its controls.
fn back_to_guest(cpu: &mut Cpu, current: SlotId) {
    let slot = &mut cpu.nested.slots[current];
    slot.inherited.undo(&mut cpu.vmx);
    slot.vmcs02.give_pdptes_back(&mut cpu.vmx, slot.has_duty(Duties::LOAD_PDPTES));
    cpu.leave_vmcs02(current);
    cpu.nested.operation = Operation::Root { current: Some(current) };
    vmx_result(cpu, VmxResult::FailValid(VmxError::EntryInvalidControlField));
    inject::advance(cpu);
}

/// An entry that the processor let in and then failed (exit reason with bit 31): L2's state, L2's failure.
#[cold]
pub fn failed_late(cpu: &mut Cpu, id: SlotId, reason: ExitReason) -> Result<(), KillReason> {
    let qualification = cpu.vmx.read(Field::EXIT_QUALIFICATION);
    if reason.basic() == BasicReason::ENTRY_INVALID_GUEST_STATE {
        let check = judge::whole(cpu, id, |whole| whole.guest().err().map(|failure| failure.check));
        refuse(cpu, Refusal::GuestState(check, qualification));
    } else if reason.basic() == BasicReason::ENTRY_MSR_LOADING {
        let word = cpu.nested.slots[id].msr_lists.index_of_entry(&cpu.phys, qualification);
        refuse(cpu, Refusal::MsrLoading(checks::msr_load_failure(word), qualification));
    }
    reflect::entry_failure(cpu, reason.basic(), qualification)
}
