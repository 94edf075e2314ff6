//! Exits of L3: whose they are, and those that nvmx handles itself. vmcs02 is current.

use super::wants::Wants;
use super::{completion, entry, reflect, sub_pages, usual, violation, vmfunc};
use crate::cpu::{Cpu, Operation, others};
use crate::emul::msr;
use crate::guest::{events, inject, machine_check};
use crate::hw::vmenter;
use crate::nested::shadow;
use crate::rules::merge::Duties;
use crate::rules::route::{ExitInfo, Route, route};
use crate::trace::KillReason;
use crate::vmcs::msrs::{self, By};
use crate::vmcs::slot::Usual;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::tracked::Version;
use crate::vmx::Field;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::controls::PinControls;
use crate::vmx::event::{EventInfo, EventKind};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::x86::Fault;
use crate::x86::msr::{IA32_PAT, is_pat};

/// Must the next entry of L3 be a VMLAUNCH?
#[inline(always)]
pub fn needs_launch(cpu: &Cpu) -> bool {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => cpu.nested.slots[current].vmcs02.needs_launch(),
        _ => true,
    }
}

/// Handles an exit of L3. On return L2 or L3 is ready to run.
#[inline(always)]
pub fn handle(cpu: &mut Cpu, reason: ExitReason) -> Result<(), KillReason> {
    let Operation::NonRoot { current, .. } = cpu.nested.operation else {
        return Err(KillReason::UnexpectedExit(reason.0));
    };
    if reason.is_entry_failure() {
        return if machine_check::stopped_entry(cpu, reason) {
            Ok(())
        } else {
            entry::failed_late(cpu, current, reason)
        };
    }
    cpu.nested.slots[current].vmcs02.mark_launched();
    if reason.basic() == BasicReason::EPT_VIOLATION {
        // ept12 says whose it is.
        violation::violation(cpu, current)?;
        goes_on(cpu, current);
        return Ok(());
    }
    // Only these reasons need more than the reason itself to find their way.
    let (mut qualification, mut event, mut encoding) = (0, EventInfo::NONE, 0);
    match reason.basic() {
        BasicReason::CR_ACCESS => qualification = cpu.vmx.read(Field::EXIT_QUALIFICATION),
        BasicReason::INIT_SIGNAL => others::stop_if_over(),
        BasicReason::EXCEPTION_OR_NMI => event = EventInfo(cpu.vmx.read(Field::VM_EXIT_INTR_INFO) as u32),
        BasicReason::MONITOR_TRAP_FLAG if super::events::stopped_nested(cpu, current)? => {
            goes_on(cpu, current);
            return Ok(());
        }
        BasicReason::VMREAD | BasicReason::VMWRITE if cpu.nested.slots[current].has_duty(Duties::LINK_SHADOW_VMCS) => {
            encoding = shadow::encoding(cpu);
        }
        _ => {}
    }
    let slot = &cpu.nested.slots[current];
    let info = ExitInfo { reason, qualification, event, ecx: cpu.regs.gpr[1] as u32, encoding };
    match route(&info, &Wants { slot, guest: &cpu.guest }) {
        Route::Reflect if !event.is(EventKind::Nmi) && usual::reflected(cpu) => Ok(()),
        Route::Reflect => reflect::reflect(cpu, current, None),
        Route::Nvmx => keep(cpu, current, reason),
    }
}

/// Handles an exit that L2 does not see, or finds out that it must.
#[inline]
fn keep(cpu: &mut Cpu, id: SlotId, reason: ExitReason) -> Result<(), KillReason> {
    match reason.basic() {
        BasicReason::EPT_MISCONFIGURATION => {
            // ept02 holds only what compose wrote: a misconfiguration in it is a bug of nvmx.
            return Err(KillReason::UnexpectedExit(reason.0));
        }
        BasicReason::VMFUNC => vmfunc::emulate(cpu, id)?,
        BasicReason::SPP_EVENT => sub_pages::event(cpu, id)?,
        // L3's NMIs are its own, and nvmx has one for it.
        BasicReason::NMI_WINDOW => events::window_opened(cpu),
        BasicReason::EXCEPTION_OR_NMI => events::note_nmi(cpu),
        BasicReason::VMREAD => shadow::of_nested(cpu, id, Access::Read)?,
        BasicReason::VMWRITE => shadow::of_nested(cpu, id, Access::Write)?,
        BasicReason::RDMSR => nested_msr(cpu, id, Access::Read, msr::read)?,
        BasicReason::WRMSR if cpu.regs.gpr[1] as u32 == IA32_PAT => nested_pat(cpu, id)?,
        BasicReason::WRMSR => nested_msr(cpu, id, Access::Write, msr::write)?,
        _ => return Err(KillReason::UnexpectedExit(reason.0)),
    }
    goes_on(cpu, id);
    Ok(())
}

/// If L3 goes on: the MSRs that L2's entry loaded are not loaded again, and its timer has run meanwhile.
#[inline(always)]
fn goes_on(cpu: &mut Cpu, id: SlotId) {
    if matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        let slot = &mut cpu.nested.slots[id];
        slot.vmcs02.load_no_msrs(&mut cpu.vmx);
        if slot.merged.as_ref().is_some_and(|merged| merged.pin.contains(PinControls::PREEMPTION_TIMER)) {
            let shift = cpu.config.hardware.misc.preemption_timer_shift();
            slot.vmcs02.timer.go_on(&mut cpu.vmx, shift, cpu.regs.exit_tsc(), vmenter::now());
        }
    }
}

/// L3 writes IA32_PAT, which L2 lets it do.
fn nested_pat(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let (_, value) = msr::written(cpu);
    if !is_pat(value) {
        return completion::refused(cpu, id, Fault::GeneralProtection(0));
    }
    let slot = &mut cpu.nested.slots[id];
    slot.vmcs02.pat.put(&mut cpu.vmx, value);
    // It goes on its way with the next exit, and another one may come with the next entry.
    slot.usual = Usual::empty();
    slot.settled = Version::NONE;
    slot.stale |= Stale::WAY;
    completion::completed(cpu, id)
}

/// An MSR that only nvmx intercepts: L3 sees what L2 would.
fn nested_msr(
    cpu: &mut Cpu,
    id: SlotId,
    access: Access,
    emulate: fn(&mut Cpu) -> Result<(), Fault>,
) -> Result<(), KillReason> {
    if !msrs::is_own(cpu.regs.gpr[1] as u32, access) {
        // Nobody wants to see it: the word was closed, or L2's bitmap has lost the bit since the entry.
        if let Some(bit) = MsrBitmap::index(cpu.regs.gpr[1] as u32, access) {
            cpu.nested.slots[id].msr_bitmap.open(&cpu.phys, bit, |word| msrs::bitmap_word(word, By::Nested));
        }
        inject::set_resume_flag(&mut cpu.vmx);
        return Ok(());
    }
    match emulate(cpu) {
        Ok(()) => completion::completed(cpu, id),
        Err(fault) => completion::refused(cpu, id, fault),
    }
}
