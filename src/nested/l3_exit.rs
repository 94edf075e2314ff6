//! Exits of L3: whose they are, and those that nvmx handles itself. vmcs02 is current.

use super::Operation;
use super::route::{ExitInfo, L2Wants, Route, route};
use super::{completion, entry, events, reflect, ve, vmfunc};
use crate::addr::{Gpa, Ngpa};
use crate::emul::msr;
use crate::ept::{Outcome, PageLog, Qualification};
use crate::error::{Fault, KillReason};
use crate::hw::vmx::Vmx;
use crate::mm::{GuestMemory, PhysMem};
use crate::nested::merge::Duties;
use crate::nested::shadow;
use crate::nested::slot::Slot;
use crate::vcpu::tracked::is_pat;
use crate::vcpu::{Cpu, inject, l2_exit, smp};
use crate::vmx::Field;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::controls::{PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::event::EventInfo;
use crate::vmx::exit::{BasicReason, ExitReason};
use l2_protocol::abi::Counter;

/// Must the next entry of L3 be a VMLAUNCH?
#[inline(always)]
pub fn needs_launch(cpu: &Cpu) -> bool {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => cpu.nested.slots[current].needs_launch(),
        _ => true,
    }
}

/// Handles an exit of L3. On return L2 or L3 is ready to run.
#[inline]
pub fn handle(cpu: &mut Cpu, reason: ExitReason) -> Result<(), KillReason> {
    let Operation::NonRoot { current, .. } = cpu.nested.operation else {
        return Err(KillReason::UnexpectedExit(reason.0));
    };
    if reason.is_entry_failure() {
        return entry::failed_late(cpu, current, reason);
    }
    cpu.nested.slots[current].mark_launched();
    if reason.basic() == BasicReason::EPT_VIOLATION {
        // ept12 says whose it is.
        violation(cpu, current)?;
        goes_on(cpu, current);
        return Ok(());
    }
    // Only these reasons need more than the reason itself to find their way.
    let (mut qualification, mut event, mut encoding) = (0, EventInfo::NONE, 0);
    match reason.basic() {
        BasicReason::CR_ACCESS => qualification = cpu.vmx.read(Field::EXIT_QUALIFICATION),
        BasicReason::INIT_SIGNAL => smp::stop_if_over(),
        BasicReason::EXCEPTION_OR_NMI => event = EventInfo(cpu.vmx.read(Field::VM_EXIT_INTR_INFO) as u32),
        BasicReason::MONITOR_TRAP_FLAG if events::stopped_l3(cpu, current)? => return Ok(()),
        BasicReason::VMREAD | BasicReason::VMWRITE if uses_shadowing(&cpu.nested.slots[current]) => {
            encoding = shadow::encoding(cpu);
        }
        _ => {}
    }
    let slot = &cpu.nested.slots[current];
    let info = ExitInfo { reason, qualification, event, ecx: cpu.regs.gpr[1] as u32, encoding };
    match route(&info, &Wants { slot, guest: &cpu.guest }) {
        Route::Reflect => reflect::reflect(cpu, current, None),
        Route::Nvmx => keep(cpu, current, reason),
    }
}

/// What L2 asked for, from nvmx's copy of vmcs12 and L2's MSR bitmap.
struct Wants<'a, P> {
    slot: &'a Slot,
    guest: &'a GuestMemory<P>,
}

impl<P: PhysMem> Wants<'_, P> {
    /// A bit of the page that this field points to; a page that L2 does not own reads as all ones.
    fn bit(&self, bitmap: Field, bit: u16) -> bool {
        let page = Gpa::new(self.slot.vmcs12.get(bitmap)).page();
        let word = self.guest.read_u64(Gpa::new(page.get() + bit as u64 / 64 * 8)).unwrap_or(u64::MAX);
        word >> (bit % 64) & 1 == 1
    }
}

fn uses_shadowing(slot: &Slot) -> bool {
    slot.merged.is_some_and(|m| m.duties.contains(Duties::LINK_SHADOW_VMCS))
}

impl<P: PhysMem> L2Wants for Wants<'_, P> {
    #[inline(always)]
    fn pin(&self) -> PinControls {
        PinControls::from_bits_retain(self.slot.vmcs12.get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32)
    }

    #[inline(always)]
    fn primary(&self) -> PrimaryControls {
        PrimaryControls::from_bits_retain(self.slot.vmcs12.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32)
    }

    #[inline(always)]
    fn secondary(&self) -> SecondaryControls {
        match self.primary().contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            true => SecondaryControls::from_bits_retain(self.slot.vmcs12.get(Field::SECONDARY_VM_EXEC_CONTROL) as u32),
            false => SecondaryControls::empty(),
        }
    }

    fn msr_bitmap(&self, index: u32, access: Access) -> bool {
        let Some(bit) = MsrBitmap::index(index, access) else { return true };
        self.bit(Field::MSR_BITMAP, bit)
    }

    fn shadow_bitmap(&self, bit: u16, access: Access) -> bool {
        let bitmap = match access {
            Access::Read => Field::VMREAD_BITMAP,
            Access::Write => Field::VMWRITE_BITMAP,
        };
        self.bit(bitmap, bit)
    }
}

/// Handles an exit that L2 does not see, or finds out that it must.
#[inline]
fn keep(cpu: &mut Cpu, index: usize, reason: ExitReason) -> Result<(), KillReason> {
    match reason.basic() {
        BasicReason::EPT_MISCONFIGURATION => {
            // ept02 holds only what compose wrote: a misconfiguration in it is a bug of nvmx.
            return Err(KillReason::UnexpectedExit(reason.0));
        }
        BasicReason::VMFUNC => vmfunc::emulate(cpu, index)?,
        // L3's NMIs are its own, and nvmx has one for it.
        BasicReason::NMI_WINDOW => events::window_opened(cpu),
        BasicReason::EXCEPTION_OR_NMI => events::note_nmi(cpu),
        BasicReason::VMREAD => shadow::of_l3(cpu, index, Access::Read)?,
        BasicReason::VMWRITE => shadow::of_l3(cpu, index, Access::Write)?,
        BasicReason::RDMSR => msr_of_l3(cpu, index, Access::Read, msr::read)?,
        BasicReason::WRMSR if cpu.regs.gpr[1] as u32 == msr::IA32_PAT => pat_of_l3(cpu, index)?,
        BasicReason::WRMSR => msr_of_l3(cpu, index, Access::Write, msr::write)?,
        _ => return Err(KillReason::UnexpectedExit(reason.0)),
    }
    goes_on(cpu, index);
    Ok(())
}

/// If L3 goes on: the MSRs that L2's entry loaded are not loaded again, and its timer has run meanwhile.
#[inline(always)]
fn goes_on(cpu: &mut Cpu, index: usize) {
    if matches!(cpu.nested.operation, Operation::NonRoot { .. }) {
        let slot = &mut cpu.nested.slots[index];
        slot.msr_lists.disarm_entry(&mut cpu.vmx);
        if slot.merged.as_ref().is_some_and(|merged| merged.pin.contains(PinControls::PREEMPTION_TIMER)) {
            timer_goes_on(cpu, index);
        }
    }
}

#[cold]
fn timer_goes_on(cpu: &mut Cpu, index: usize) {
    let (vmx, shift) = (&mut cpu.vmx, cpu.config.hardware.misc.preemption_timer_shift());
    let left = || vmx.read(Field::VMX_PREEMPTION_TIMER_VALUE);
    let left = cpu.nested.slots[index].timer.go_on(left, shift, cpu.regs.exit_tsc(), cpu.regs.now());
    vmx.write(Field::VMX_PREEMPTION_TIMER_VALUE, left);
}

/// L3 writes IA32_PAT, which L2 lets it do.
fn pat_of_l3(cpu: &mut Cpu, index: usize) -> Result<(), KillReason> {
    let (_, value) = msr::written(cpu);
    if !is_pat(value) {
        return completion::refused(cpu, index, Fault::GeneralProtection(0));
    }
    cpu.nested.slots[index].inherited.set_pat(&mut cpu.vmx, value);
    completion::completed(cpu, index)
}

/// An MSR that only nvmx intercepts: L3 sees what L2 would.
fn msr_of_l3(
    cpu: &mut Cpu,
    index: usize,
    access: Access,
    emulate: fn(&mut Cpu) -> Result<(), Fault>,
) -> Result<(), KillReason> {
    if !msr::is_own(cpu.regs.gpr[1] as u32, access) {
        // L2's bitmap lost the bit while L3 ran. Merged again, it lets the instruction through.
        entry::merge_msr_bitmap(cpu, index);
        inject::set_resume_flag(&mut cpu.vmx);
        return Ok(());
    }
    match emulate(cpu) {
        Ok(()) => completion::completed(cpu, index),
        Err(fault) => completion::refused(cpu, index, fault),
    }
}

/// An EPT violation of L3: fills ept02, or tells L2.
#[inline(always)]
pub(super) fn violation(cpu: &mut Cpu, index: usize) -> Result<(), KillReason> {
    let slot = &mut cpu.nested.slots[index];
    let at = cpu.vmx.read(Field::GUEST_PHYSICAL_ADDRESS);
    if slot.merged.is_some_and(|m| m.duties.contains(Duties::LOAD_PDPTES)) {
        // L2 uses no EPT for this guest: its physical addresses are L2's, under ept01.
        return l2_exit::map_missing(cpu, Gpa::new(at));
    }
    let eptp12 = slot.eptp12();
    let qualification = Qualification::from_bits_retain(cpu.vmx.read(Field::EXIT_QUALIFICATION));
    let mut tables = Cpu::tables(&mut cpu.frames, &cpu.phys);
    if cpu.ept02.refill(eptp12, Ngpa::new(at), qualification, &cpu.guest, &mut tables) {
        cpu.vmx.counters.bump(Counter::Ept02Fills);
        l2_exit::redeliver(cpu, qualification);
        return Ok(());
    }
    let mut log = if eptp12.accessed_dirty() { page_log(slot, &cpu.guest, &mut cpu.vmx) } else { None };
    let outcome = cpu.ept02.violation(eptp12, Ngpa::new(at), qualification, log.as_mut(), &cpu.guest, &mut tables);
    if let Some(log) = log {
        cpu.vmx.write(Field::PML_INDEX, log.index.into());
    }
    match outcome {
        Outcome::Filled => {
            cpu.vmx.counters.bump(Counter::Ept02Fills);
            cpu.vmx.counters.set(Counter::Ept02Evictions, cpu.ept02.stats().evictions);
            let activation = cpu.ept02.activate(eptp12, &cpu.guest, &mut tables);
            slot.run_on(&mut cpu.vmx, activation);
            l2_exit::redeliver(cpu, qualification);
            Ok(())
        }
        Outcome::ReflectViolation { qualification, convertible } => {
            let wants = Wants { slot, guest: &cpu.guest };
            let converts = convertible && wants.secondary().contains(SecondaryControls::EPT_VIOLATION_VE);
            if converts && ve::convert(cpu, index, qualification)? {
                return Ok(());
            }
            let reason = ExitReason::exit(BasicReason::EPT_VIOLATION);
            reflect::reflect(cpu, index, Some((reason, qualification.bits())))
        }
        Outcome::ReflectMisconfig => {
            let reason = ExitReason::exit(BasicReason::EPT_MISCONFIGURATION);
            reflect::reflect(cpu, index, Some((reason, 0)))
        }
        Outcome::ReflectLogFull => {
            let reason = ExitReason::exit(BasicReason::PML_FULL);
            reflect::reflect(cpu, index, Some((reason, qualification.of_log_full().bits())))
        }
        Outcome::Forbidden { gpa } => {
            // L2 pointed ept12 where its memory map has no memory for it; that must not be a way for L3 to end L2.
            log::debug!("ept12 leads L3 to nvmx's own memory at {gpa}: a misconfiguration for L2");
            let reason = ExitReason::exit(BasicReason::EPT_MISCONFIGURATION);
            reflect::reflect(cpu, index, Some((reason, 0)))
        }
    }
}

/// L2's page-modification log, if it keeps one for this guest; vmcs02 is current.
#[cold]
fn page_log<P: PhysMem>(slot: &Slot, guest: &GuestMemory<P>, vmx: &mut Vmx) -> Option<PageLog> {
    Wants { slot, guest }.secondary().contains(SecondaryControls::ENABLE_PML).then(|| PageLog {
        address: Gpa::new(slot.vmcs12.get(Field::PML_ADDRESS)),
        index: vmx.read(Field::PML_INDEX) as u16,
    })
}
