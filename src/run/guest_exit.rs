//! Exits of L2: one line each.

use crate::addr::Gpa;
use crate::cpu::Cpu;
use crate::emul;
use crate::emul::unasked::{self, Unasked};
use crate::guest::{Next, Stop, events, inject, machine_check, missing};
use crate::hw::cache;
use crate::nested::instr;
use crate::run::tracing;
use crate::trace::KillReason;
use crate::vmcs::once::Once;
use crate::vmx::Field;
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::x86::Fault;

/// Handles an exit of L2; vmcs01 is current. On return L2 or L3 is ready to run.
#[inline(always)]
pub fn handle(cpu: &mut Cpu, reason: ExitReason) -> Result<(), KillReason> {
    if reason.is_entry_failure() {
        return entry_failure(cpu, reason);
    }
    let result = match reason.basic() {
        // It always ends the same way, so nothing asks how it ended.
        BasicReason::CPUID => {
            emul::cpuid::emulate(cpu);
            inject::advance(cpu);
            return Ok(());
        }
        _ => dispatch(cpu, reason),
    };
    match result {
        Ok(Next::Advance) => inject::advance(cpu),
        Ok(Next::Stay) => {}
        Err(Stop::Fault(fault)) => inject::fault(cpu, fault),
        Err(Stop::Kill(reason)) => return Err(reason),
        Err(Stop::Again) => inject::set_resume_flag(&mut cpu.vmx),
        // L2 has no EPT of its own.
        Err(Stop::Miss(miss)) => return Err(KillReason::ForbiddenMemory(Gpa::new(miss.at))),
    }
    Ok(())
}

#[inline(always)]
fn dispatch(cpu: &mut Cpu, reason: ExitReason) -> Result<Next, Stop> {
    let done = |()| Next::Advance;
    match reason.basic() {
        BasicReason::VMRESUME => instr::entry::vmresume(cpu),
        BasicReason::VMREAD => instr::fields::vmread(cpu),
        BasicReason::VMWRITE => instr::fields::vmwrite(cpu),
        BasicReason::VMLAUNCH => instr::entry::vmlaunch(cpu),
        BasicReason::VMPTRLD => instr::pointers::vmptrld(cpu),
        BasicReason::VMPTRST => instr::pointers::vmptrst(cpu),
        BasicReason::VMCLEAR => instr::pointers::vmclear(cpu),
        BasicReason::VMXON => instr::switch::vmxon(cpu),
        BasicReason::VMXOFF => instr::switch::vmxoff(cpu),
        BasicReason::VMCALL => instr::switch::vmcall(cpu),
        BasicReason::INVEPT => instr::invalidate::invept(cpu),
        BasicReason::INVVPID => instr::invalidate::invvpid(cpu),
        BasicReason::RDMSR => Ok(emul::msr::read(cpu).map(done)?),
        BasicReason::WRMSR => Ok(emul::msr::guest_write(cpu).map(done)?),
        BasicReason::CR_ACCESS => emul::cr_exit::handle(cpu),
        BasicReason::XSETBV => Ok(emul::xsetbv::emulate(cpu).map(done)?),
        BasicReason::INVD => {
            // Writing back what L2 wants to drop is allowed, losing what nvmx wrote is not.
            cache::write_back();
            Ok(Next::Advance)
        }
        BasicReason::EPT_VIOLATION => memory_missing(cpu),
        // Only while nvmx has an NMI for L2.
        BasicReason::NMI_WINDOW => {
            events::window_opened(cpu);
            Ok(Next::Stay)
        }
        BasicReason::EXCEPTION_OR_NMI => {
            events::note_nmi(cpu);
            Ok(Next::Stay)
        }
        // Only behind an event that a machine check for L2 waits for.
        BasicReason::MONITOR_TRAP_FLAG => {
            machine_check::event_delivered(cpu);
            Ok(Next::Stay)
        }
        BasicReason::TASK_SWITCH => emul::task_switch::handle(cpu),
        BasicReason::TRIPLE_FAULT => Err(KillReason::TripleFault.into()),
        BasicReason::INIT_SIGNAL => Ok(emul::init::init(cpu)),
        BasicReason::SIPI => Ok(emul::init::sipi(cpu)),
        // L2 is about to end the machine.
        BasicReason::IO_INSTRUCTION if cpu.trace.is_some() => {
            tracing::tell_and_go_on(cpu);
            Ok(Next::Stay)
        }
        other => match unasked::outcome(other) {
            Unasked::InvalidOpcode => Err(Fault::InvalidOpcode.into()),
            Unasked::Impossible(_) => Err(KillReason::UnexpectedExit(reason.0).into()),
        },
    }
}

/// L2 touched an address that ept01 does not map (yet).
fn memory_missing(cpu: &mut Cpu) -> Result<Next, Stop> {
    let at = Gpa::new(cpu.vmx.read(Field::GUEST_PHYSICAL_ADDRESS));
    match missing::map_missing(cpu, at)? {
        None => Ok(Next::Stay),
        Some(fault) => Err(fault.into()),
    }
}

/// The processor refused vmcs01, or had a machine check.
fn entry_failure(cpu: &mut Cpu, reason: ExitReason) -> Result<(), KillReason> {
    if machine_check::stopped_entry(cpu, reason) { Ok(()) } else { Err(refused(cpu, reason)) }
}

fn refused(cpu: &mut Cpu, reason: ExitReason) -> KillReason {
    if cpu.once01.contains(Once::MSR_AREA) && reason.basic() == BasicReason::ENTRY_MSR_LOADING {
        return KillReason::VmxAbort(crate::vmcs::msr_lists::ABORT_LOADING);
    }
    KillReason::EntryFailed { reason: reason.0, qualification: cpu.vmx.read(Field::EXIT_QUALIFICATION) }
}
