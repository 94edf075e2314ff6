//! The exit: registers out of vmcs01, the switch, and registers and events back into it.

use super::state::{RF, SegmentState, Source, State, SwitchFailure, TaskException, TaskSwitched};
use super::switch;
use crate::cpu::Cpu;
use crate::guest::{Next, Stop, events, operand};
use crate::hw::cr;
use crate::hw::vmx::Invalidate;
use crate::trace::KillReason;
use crate::vmcs::vpid::VPID01;
use crate::vmx::Field;
use crate::vmx::event::{After, EventInfo, EventKind, vector};
use crate::vmx::field::PDPTES;
use crate::vmx::segment::Segment;
use crate::vmx::state::interruptibility;
use crate::x86::debug::{DEBUGCTL_BTF, DEBUGCTL_LBR, PENDING_BS};
use x86_64::registers::debug::Dr7Flags;

const SEGMENTS: [Segment; 6] = [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs];
/// The breakpoints that are pending, as in DR6.
const PENDING_BREAKPOINTS: u64 = 0b1111;
/// DR6: breakpoints, enabled breakpoint, task switch.
const DR6_CAUSES: u64 = 0x900F;
const DR6_BT: u64 = 1 << 15;
const DR7_GD: u64 = Dr7Flags::GENERAL_DETECT_ENABLE.bits();
/// IA32_DEBUGCTL: LBR and BTF, which a debug exception clears; the other bits stay (SDM vol. 3B, "Monitoring Branches,
/// Exceptions, and Interrupts", "Single-Stepping on Branches").
const DEBUGCTL_LBR_BTF: u64 = DEBUGCTL_LBR | DEBUGCTL_BTF;

/// L2 switches tasks; vmcs01 is current.
#[cold]
pub fn handle(cpu: &mut Cpu) -> Result<Next, Stop> {
    let qualification = cpu.vmx.read(Field::EXIT_QUALIFICATION);
    let event = EventInfo(cpu.vmx.read(Field::IDT_VECTORING_INFO_FIELD) as u32);
    let by_instruction = !event.is_valid() || event.has_instruction_length();
    let error_code =
        (event.is_valid() && event.has_error_code()).then(|| cpu.vmx.read(Field::IDT_VECTORING_ERROR_CODE) as u32);
    let source =
        Source::of(qualification, !by_instruction || event.is(EventKind::PrivilegedSoftwareException), error_code);
    let selector = qualification as u16;

    let mut old = registers(cpu);
    if by_instruction {
        old.eip = old.eip.wrapping_add(cpu.vmx.read(Field::VM_EXIT_INSTRUCTION_LEN) as u32);
    }
    let result = switch(&cpu.guest, &old, selector, source);
    if !matches!(result, Err(SwitchFailure::Again)) {
        block_nmis(cpu, source, event);
    }
    let exception = match result {
        Ok(switched) => {
            enter(cpu, &old, &switched);
            switched.exception
        }
        Err(SwitchFailure::Exception(exception)) => Some(exception),
        Err(SwitchFailure::NotOwned(at)) => return Err(KillReason::ForbiddenMemory(at.0).into()),
        // The event that wanted the task is not lost.
        Err(SwitchFailure::Again) if event.is_valid() => {
            events::deliver_again(cpu, event);
            None
        }
        Err(SwitchFailure::Again) => return Err(Stop::Again),
    };
    if let Some(exception) = exception {
        raise(cpu, event, exception)?;
    }
    Ok(Next::Stay)
}

/// The registers of the old task.
fn registers(cpu: &mut Cpu) -> State {
    let paging = operand::paging(cpu);
    let vmx = &mut cpu.vmx;
    let mut segment = |segment: Segment| SegmentState {
        selector: vmx.read(segment.selector()) as u16,
        base: vmx.read(segment.base()) as u32,
        limit: vmx.read(segment.limit()) as u32,
        rights: vmx.read(segment.rights()) as u32,
    };
    let (segments, ldtr, tr) = (SEGMENTS.map(&mut segment), segment(Segment::Ldtr), segment(Segment::Tr));
    let mut gprs = [0; 8];
    gprs.iter_mut().zip(cpu.regs.gpr).for_each(|(to, from)| *to = from as u32);
    gprs[4] = vmx.read(Field::GUEST_RSP) as u32;
    State {
        paging,
        gprs,
        eip: vmx.read(Field::GUEST_RIP) as u32,
        eflags: vmx.read(Field::GUEST_RFLAGS) as u32,
        segments,
        ldtr,
        tr,
        gdt_base: vmx.read(Field::GUEST_GDTR_BASE) as u32,
        gdt_limit: vmx.read(Field::GUEST_GDTR_LIMIT) as u32,
        dr7: vmx.read(Field::GUEST_DR7) as u32,
    }
}

/// The new task is in vmcs01 from now on.
fn enter(cpu: &mut Cpu, old: &State, switched: &TaskSwitched) {
    let new = &switched.state;
    for (segment, state) in
        SEGMENTS.into_iter().zip(&new.segments).chain([(Segment::Ldtr, &new.ldtr), (Segment::Tr, &new.tr)])
    {
        cpu.vmx.write(segment.selector(), state.selector.into());
        cpu.vmx.write(segment.base(), state.base.into());
        cpu.vmx.write(segment.limit(), state.limit.into());
        cpu.vmx.write(segment.rights(), state.rights.into());
    }
    cpu.regs.gpr.iter_mut().zip(new.gprs).for_each(|(to, from)| *to = from.into());
    let blocking = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO) & !interruptibility::STI_OR_MOV_SS;
    // Steps belong to the task that is left.
    let pending = cpu.vmx.read(Field::GUEST_PENDING_DBG_EXCEPTIONS) & !PENDING_BS;
    for (field, value) in [
        (Field::GUEST_RSP, new.gprs[4].into()),
        (Field::GUEST_RIP, new.eip.into()),
        (Field::GUEST_RFLAGS, new.eflags.into()),
        (Field::GUEST_CR0, new.paging.cr0),
        (Field::GUEST_DR7, new.dr7.into()),
        (Field::GUEST_INTERRUPTIBILITY_INFO, blocking),
        (Field::GUEST_PENDING_DBG_EXCEPTIONS, pending),
        (Field::GUEST_ACTIVITY_STATE, 0),
    ] {
        cpu.vmx.write(field, value);
    }
    if new.paging.cr3 != old.paging.cr3 {
        cpu.vmx.write(Field::GUEST_CR3, new.paging.cr3);
        PDPTES.into_iter().zip(new.paging.pdptes).for_each(|(field, value)| cpu.vmx.write(field, value));
        cpu.vmx.invvpid(Invalidate::Single, VPID01, 0);
    }
    if switched.trap {
        trap(cpu, pending);
    }
}

/// The debug exception of the T flag, with the breakpoints that are pending. What its delivery does to debug registers on a
/// processor, an injected one does not do.
fn trap(cpu: &mut Cpu, pending: u64) {
    cr::set_dr6(cr::dr6() & !DR6_CAUSES | DR6_BT | pending & PENDING_BREAKPOINTS);
    for (field, clear) in [
        (Field::GUEST_DR7, DR7_GD),
        (Field::GUEST_IA32_DEBUGCTL, DEBUGCTL_LBR_BTF),
        (Field::GUEST_PENDING_DBG_EXCEPTIONS, u64::MAX),
    ] {
        let value = cpu.vmx.read(field) & !clear;
        cpu.vmx.write(field, value);
    }
    events::inject(cpu, EventInfo::new(EventKind::HardwareException, vector::DB), None, None);
}

/// An NMI blocks NMIs, IRET ends that, whatever comes of the switch.
fn block_nmis(cpu: &mut Cpu, source: Source, event: EventInfo) {
    let blocking = cpu.vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO);
    let new = match source {
        Source::Iret => blocking & !interruptibility::NMI,
        _ if event.is(EventKind::Nmi) => blocking | interruptibility::NMI,
        _ => return,
    };
    cpu.vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, new);
}

/// An exception that the switch met: alone, or during the delivery of `first`.
fn raise(cpu: &mut Cpu, first: EventInfo, second: TaskException) -> Result<(), KillReason> {
    if let Some(linear) = second.linear {
        cr::set_cr2(linear);
    }
    let exception = match first.then(second.vector) {
        After::Itself => second,
        After::DoubleFault => TaskException::DOUBLE,
        After::Shutdown => return Err(KillReason::TripleFault),
    };
    // A fault: the frame has RF.
    let flags = cpu.vmx.read(Field::GUEST_RFLAGS) | u64::from(RF);
    cpu.vmx.write(Field::GUEST_RFLAGS, flags);
    let info = EventInfo::new(EventKind::HardwareException, exception.vector).with_error_code();
    events::inject(cpu, info, Some(exception.error), None);
    Ok(())
}
