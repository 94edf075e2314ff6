//! The usual way: an exit of L3 that goes to L2, and the VMRESUME with which L2 answers it, while nothing is special.
//!
//! Nearly every exit is like that, and what may be special about one is known beforehand: it follows from controls
//! ([`settle`]), or it happens rarely and is noted where it does ([`Stale::WAY`]). So a few looks tell, and what is done then is
//! what `reflect` and `entry` do as well, in the same order, without asking at each step whether there is more to it.
//! [ADR 0026](../../docs/adr/0026-the-usual-way.md).

use super::{reflect, violation};
use crate::cpu::{Cpu, Operation};
use crate::ept::{Ept02, Eptp};
use crate::hw::vmx::Vmx;
use crate::rules::route::is_always_reflected;
use crate::rules::switched;
use crate::trace::counters::{READS_OF_ENTRY, WRITES_OF_EXIT, WRITES_OF_REPORT};
use crate::vmcs::access::{ExitTakes, MachineParts};
use crate::vmcs::slot::{Slot, Usual};
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::tracked::{HostValues, Tracked, Version};
use crate::vmcs::vpid::VpidMap;
use crate::vmx::controls::{ExitControls, PinControls, SecondaryControls};
use crate::vmx::exit::ExitReason;
use crate::vmx::region::NO_LINK;
use crate::vmx::segment::AccessRights;
use crate::vmx::state::interruptibility;
use crate::vmx::{Field, FieldAccess};

/// Access rights of SS: the privilege level.
const SS_DPL: u64 = AccessRights::DPL as u64;

/// Finds out whether entries and exits of a vmcs12 take more than the usual. Its vmcs02 is current and ready to be entered.
#[cold]
pub fn settle(cpu: &mut Cpu, id: SlotId) {
    let slot = &mut cpu.nested.slots[id];
    let get = |field| slot.vmcs12.get(field);
    let lists = [Field::VM_ENTRY_MSR_LOAD_COUNT, Field::VM_EXIT_MSR_LOAD_COUNT, Field::VM_EXIT_MSR_STORE_COUNT];
    let exit = ExitControls::from_bits_retain(get(Field::VM_EXIT_CONTROLS) as u32);
    let usual = slot.merged.is_some_and(|merged| {
        merged.duties.is_empty() && !merged.secondary.contains(SecondaryControls::MODE_BASED_EXECUTE_CONTROL)
    }) && lists.into_iter().all(|count| get(count) == 0)
        && get(Field::VMCS_LINK_POINTER) == NO_LINK
        && slot.inherited.long_mode_host()
        && !exit.intersects(switched::RESIDENT_EXIT)
        && cpu.config.access.exit_takes() == ExitTakes::Leaving;
    let mut more = Usual::ALL;
    more.set(Usual::TIMER, slot.pin12().contains(PinControls::PREEMPTION_TIMER));
    more.set(Usual::CARRIES, slot.inherited.carries());
    slot.usual = if usual { more } else { Usual::empty() };
    slot.settled = Version::NONE;
    slot.stale -= Stale::WAY;
}

/// Stands for all outside of a slot that decides whether its entries are usual, but for what L2 has invalidated.
#[inline(always)]
fn now(cpu: &Cpu) -> Version {
    cpu.tracked.version().with(cpu.ept02.moves()).with(cpu.nested.vpids.changes())
}

/// What decides outside of a slot whether its entries are usual.
struct Around<'a> {
    tracked: &'a Tracked,
    ept02: &'a Ept02,
    vpids: &'a VpidMap,
}

impl Around<'_> {
    /// Entries of a vmcs12 that is not stale are usual: its MSRs are L2's, and vmcs02 has the EPTP and the VPID for what it asks.
    fn is_settled(&self, slot: &Slot) -> bool {
        let [eptp12, vpid12] = [Field::EPT_POINTER, Field::VIRTUAL_PROCESSOR_ID].map(|field| slot.vmcs12.get(field));
        !slot.usual.is_empty()
            && slot.vmcs12.is_launched()
            && slot.host_msrs == self.tracked.version()
            && self.ept02.ready(Eptp::new(eptp12)).is_some_and(|eptp02| slot.vmcs02.is_on(eptp02))
            && self.vpids.lookup(vpid12 as u16).is_some_and(|vpid02| slot.vmcs02.has_vpid(vpid02))
    }

    /// Looks anew whether they are: something has changed.
    #[inline(never)]
    fn settles_again(&self, slot: &mut Slot, now: Version) -> bool {
        let settled = self.is_settled(slot);
        if settled {
            slot.settled = now;
        }
        settled
    }
}

/// An exit of L3; vmcs02 is current. True if L2 has it and vmcs01 is current; else nothing happened.
#[inline(always)]
pub fn exit(cpu: &mut Cpu, reason: ExitReason) -> bool {
    if !is_always_reflected(reason) {
        return false;
    }
    let Operation::NonRoot { current } = cpu.nested.operation else { return false };
    let slot = &cpu.nested.slots[current];
    if slot.usual.is_empty() || slot.host_msrs != cpu.tracked.version() {
        return false;
    }
    leave(cpu, current, None);
    true
}

/// An exit of L3 that was found to be L2's, by no NMI, and whose information stands in vmcs02, which is current. True if L2 has it
/// and vmcs01 is current; else nothing happened.
#[inline(never)]
pub fn reflected(cpu: &mut Cpu) -> bool {
    by_route(cpu, None)
}

/// The same, with an exit qualification of nvmx's own.
#[inline(never)]
pub fn reported(cpu: &mut Cpu, qualification: u64) -> bool {
    by_route(cpu, Some(qualification))
}

#[inline(always)]
fn by_route(cpu: &mut Cpu, qualification: Option<u64>) -> bool {
    let Operation::NonRoot { current } = cpu.nested.operation else { return false };
    let slot = &cpu.nested.slots[current];
    if slot.usual.is_empty() || slot.host_msrs != cpu.tracked.version() {
        return false;
    }
    leave(cpu, current, qualification);
    true
}

#[inline(always)]
fn leave(cpu: &mut Cpu, current: SlotId, qualification: Option<u64>) {
    let (vmx, slot) = (&mut cpu.vmx, &mut cpu.nested.slots[current]);
    match qualification {
        Some(value) => {
            vmx.counters.reported_exit();
            vmx.batch_beyond(0, WRITES_OF_REPORT).write(Field::EXIT_QUALIFICATION, value);
        }
        None => vmx.counters.usual_exit(),
    }
    reflect::keep_mode(vmx, slot);
    if slot.usual.intersects(Usual::MORE) {
        if slot.usual.contains(Usual::TIMER) {
            reflect::stop_timer(vmx, slot);
        }
        if slot.usual.contains(Usual::CARRIES) {
            take_carried(vmx, slot);
        }
    }
    let blocking = reflect::blocked_in_guest(vmx, slot.pin12());
    slot.vmcs12.exits += 1;
    let on = MachineParts { vmx: &mut *vmx, phys: &cpu.phys, vmcs01: &cpu.vmcs01 };
    cpu.config.access.leave_by_exit(on, slot);
    reflect::load_vmcs12_host_state(
        &mut vmx.batch_beyond(0, WRITES_OF_EXIT),
        &slot.vmcs12,
        ExitControls::HOST_ADDRESS_SPACE_SIZE,
    );
    if slot.usual.contains(Usual::CARRIES) {
        give_carried(vmx, slot, &mut cpu.tracked);
    }
    if cpu.nested.blocking01 != blocking {
        vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, blocking);
    }
    cpu.nested.operation = Operation::Root { current: Some(current) };
}

/// State that is carried leaves vmcs02, which is current.
#[inline(never)]
fn take_carried(vmx: &mut Vmx, slot: &mut Slot) {
    slot.inherited.leave_nested(vmx, &mut slot.vmcs12, &mut slot.vmcs02.pat);
}

/// What L3 left in the processor is L2's, and the rest of its MSRs is that of the host-state area; vmcs01 is current.
#[inline(never)]
fn give_carried(vmx: &mut Vmx, slot: &mut Slot, tracked: &mut Tracked) {
    let mut values = HostValues::of(|field| slot.vmcs12.get(field));
    slot.inherited.leave_to_guest(&mut values);
    tracked.load(vmx, &values);
    slot.host_msrs = tracked.version();
}

/// State that is carried comes to vmcs02, which is current.
#[inline(never)]
fn bring_carried(vmx: &mut Vmx, slot: &mut Slot, tracked: &Tracked) {
    slot.inherited.enter_nested(vmx, &slot.vmcs12, &mut slot.vmcs02.pat, tracked);
}

/// VMRESUME of L2; vmcs01 is current. True if L3 is ready to run; else nothing happened.
#[inline(always)]
pub fn resume(cpu: &mut Cpu) -> bool {
    let Operation::Root { current: Some(id) } = cpu.nested.operation else { return false };
    match cpu.nested.slots[id].stale {
        nothing if nothing.is_empty() => enter(cpu, id),
        stale => Stale::IN_PASSING.contains(stale) && resume_in_passing(cpu, id),
    }
}

/// VMRESUME behind a window that opened or closed, or a violation.
#[inline(never)]
fn resume_in_passing(cpu: &mut Cpu, id: SlotId) -> bool {
    if !enter(cpu, id) {
        return false;
    }
    let slot = &mut cpu.nested.slots[id];
    if slot.stale.contains(Stale::WINDOWS) {
        slot.write_controls(&mut cpu.vmx);
    }
    if slot.stale.contains(Stale::VIOLATED) {
        violation::answered(cpu, id);
    }
    true
}

#[inline(always)]
fn enter(cpu: &mut Cpu, id: SlotId) -> bool {
    let now = now(cpu);
    let slot = &mut cpu.nested.slots[id];
    let around = || Around { tracked: &cpu.tracked, ept02: &cpu.ept02, vpids: &cpu.nested.vpids };
    if slot.settled != now && (slot.usual.is_empty() || !around().settles_again(slot, now)) {
        return false;
    }
    if cpu.ept02.ready(Eptp::new(slot.vmcs12.get(Field::EPT_POINTER))).is_none() {
        return false;
    }
    debug_assert!(around().is_settled(slot), "what was settled has changed");
    let [blocking, ss] = {
        cpu.vmx.counters.usual_entry();
        let mut vmcs01 = cpu.vmx.batch_beyond(READS_OF_ENTRY, 0);
        [Field::GUEST_INTERRUPTIBILITY_INFO, Field::GUEST_SS_AR_BYTES].map(|field| vmcs01.read(field))
    };
    if blocking & interruptibility::MOV_SS != 0 || ss & SS_DPL != 0 {
        return false;
    }
    cpu.nested.blocking01 = blocking;
    if slot.usual.contains(Usual::CARRIES) {
        slot.inherited.leave_guest(&mut cpu.vmx);
    }
    slot.msr_bitmap.refresh(&cpu.phys);
    let on = MachineParts { vmx: &mut cpu.vmx, phys: &cpu.phys, vmcs01: &cpu.vmcs01 };
    if cpu.config.access.enter_again(on, slot).is_err() {
        cpu.leave_vmcs02(id);
        return false;
    }
    if slot.usual.intersects(Usual::MORE) {
        if slot.usual.contains(Usual::TIMER) {
            slot.vmcs02.timer.start(&mut cpu.vmx);
        }
        if slot.usual.contains(Usual::CARRIES) {
            bring_carried(&mut cpu.vmx, slot, &cpu.tracked);
        }
    }
    cpu.nested.operation = Operation::NonRoot { current: id };
    true
}
