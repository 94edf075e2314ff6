//! EPT violations of L3.

use super::wants::Wants;
use super::{completion, fill, reflect, sub_pages, usual, ve};
use crate::addr::{Gpa, Ngpa};
use crate::cpu::Cpu;
use crate::ept::{Outcome, PageLog, Qualification};
use crate::guest::missing;
use crate::hw::vmx::Vmx;
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::merge::Duties;
use crate::rules::route::GuestWants;
use crate::trace::KillReason;
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmx::controls::SecondaryControls;
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::{Field, FieldAccess};
use l2_protocol::abi::Counter;

/// An EPT violation of L3: fills ept02, or tells L2.
#[inline(always)]
pub fn violation(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    let slot = &mut cpu.nested.slots[id];
    let [at, qualification] = {
        let mut vmcs02 = cpu.vmx.batch();
        [Field::GUEST_PHYSICAL_ADDRESS, Field::EXIT_QUALIFICATION].map(|field| vmcs02.read(field))
    };
    if slot.has_duty(Duties::LOAD_PDPTES) {
        // L2 uses no EPT for this guest: its physical addresses are L2's, under ept01.
        return match missing::map_missing(cpu, Gpa::new(at))? {
            None => Ok(()),
            Some(fault) => completion::refused(cpu, id, fault),
        };
    }
    let eptp12 = slot.eptp12();
    let qualification = Qualification::from_bits_retain(qualification);
    let mut tables = Cpu::tables(&mut cpu.frames, &cpu.phys);
    let in_run = cpu.ept02.refill(eptp12, Ngpa::new(at), qualification, &cpu.guest, &mut tables);
    if in_run == Some(Outcome::Filled) {
        cpu.vmx.counters.bump(Counter::Ept02Fills);
        missing::redeliver(cpu, qualification);
        return Ok(());
    }
    let outcome = in_run.unwrap_or_else(|| {
        let mut log = if eptp12.accessed_dirty() { page_log(slot, &cpu.guest, &mut cpu.vmx) } else { None };
        let outcome = cpu.ept02.violation(eptp12, Ngpa::new(at), qualification, log.as_mut(), &cpu.guest, &mut tables);
        if let Some(log) = log {
            cpu.vmx.write(Field::PML_INDEX, log.index.into());
        }
        outcome
    });
    match outcome {
        Outcome::Filled => {
            fill::count(cpu);
            fill::run_on_it(cpu, id);
            missing::redeliver(cpu, qualification);
            Ok(())
        }
        Outcome::ReflectViolation { qualification, convertible } => {
            let wants = Wants { slot, guest: &cpu.guest };
            let converts = convertible && wants.secondary().contains(SecondaryControls::EPT_VIOLATION_VE);
            if converts && ve::convert(cpu, id, qualification)? {
                return Ok(());
            }
            let reason = ExitReason::exit(BasicReason::EPT_VIOLATION);
            let slot = &mut cpu.nested.slots[id];
            slot.violated = Some((Ngpa::new(at), qualification));
            slot.stale |= Stale::VIOLATED;
            if usual::reported(cpu, qualification.bits()) {
                return Ok(());
            }
            reflect::reflect(cpu, id, Some((reason, qualification.bits())))
        }
        Outcome::ReflectSubPageEvent { qualification } => sub_pages::tell(cpu, id, qualification),
        Outcome::ReflectMisconfig => {
            let reason = ExitReason::exit(BasicReason::EPT_MISCONFIGURATION);
            reflect::reflect(cpu, id, Some((reason, 0)))
        }
        Outcome::ReflectLogFull => {
            let reason = ExitReason::exit(BasicReason::PML_FULL);
            reflect::reflect(cpu, id, Some((reason, qualification.of_log_full().bits())))
        }
        Outcome::Forbidden { gpa } => {
            // L2 pointed ept12 where its memory map has no memory for it; that must not be a way for L3 to end L2.
            log::debug!("ept12 leads L3 to nvmx's own memory at {gpa}: a misconfiguration for L2");
            let reason = ExitReason::exit(BasicReason::EPT_MISCONFIGURATION);
            reflect::reflect(cpu, id, Some((reason, 0)))
        }
    }
}

/// L2 goes on with L3 behind a violation that it saw: what it has mapped there is filled at once. vmcs02 is current, and runs on its
/// ept02.
#[inline(never)]
pub fn answered(cpu: &mut Cpu, id: SlotId) {
    let slot = &mut cpu.nested.slots[id];
    slot.stale -= Stale::VIOLATED;
    // L2 may have taken its EPT away meanwhile.
    let Some((at, qualification)) = slot.violated.take().filter(|_| !slot.has_duty(Duties::LOAD_PDPTES)) else {
        return;
    };
    let (eptp12, mut tables) = (slot.eptp12(), Cpu::tables(&mut cpu.frames, &cpu.phys));
    if cpu.ept02.fill_expected(eptp12, at, qualification, &cpu.guest, &mut tables) {
        fill::count(cpu);
        // Mostly nothing is owed for it, and the EPTP stays.
        if cpu.ept02.ready(eptp12).is_none() {
            fill::run_on_it(cpu, id);
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
