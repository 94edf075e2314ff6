//! VM exit from L3 to L2: vmcs02's state becomes vmcs12's, vmcs12's host state becomes L2's.
//!
//! Source: SDM vol. 3C, chapter "VM Exits": "Saving Guest State", "Loading Host State"; for failed entries "VM-Entry
//! Failures During or After Loading Guest State".

use crate::cpu::{Cpu, Operation};
use crate::hw::vmx::{Invalidate, Vmx};
use crate::mm::linear::{fetch_pdptes, pdptes_are_valid};
use crate::mm::{GuestMemory, PhysMem};
use crate::rules::merge::Duties;
use crate::rules::switched::{Host, Item};
use crate::trace::{KillReason, Promise};
use crate::vmcs::Config;
use crate::vmcs::access::{HostState, MachineParts, Report};
use crate::vmcs::msr_lists::MsrLists;
use crate::vmcs::msrs::{self, OwnMsrs};
use crate::vmcs::once::Once;
use crate::vmcs::slot::Slot;
use crate::vmcs::slots::SlotId;
use crate::vmcs::stale::Stale;
use crate::vmcs::tracked::{HostValues, Tracked};
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmcs::vpid::VPID01;
use crate::vmx::controls::{EntryControls, ExitControls, PinControls};
use crate::vmx::event::{EventInfo, EventKind};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::field::PDPTES;
use crate::vmx::segment::AccessRights;
use crate::vmx::state::interruptibility;
use crate::vmx::{Field, FieldAccess};
use crate::x86::Cr4;
use crate::x86::msr::{IA32_EFER, IA32_PAT};
use l2_protocol::abi::Counter;

const UNUSABLE: u64 = AccessRights::UNUSABLE as u64;

/// Exit reason and qualification that nvmx reports in place of the processor's.
pub type Info = (ExitReason, u64);

/// Takes L2 out of an exit of L3 whose information stands in vmcs02, which is current, except for `info`.
#[inline(always)]
pub fn reflect(cpu: &mut Cpu, id: SlotId, info: Option<Info>) -> Result<(), KillReason> {
    report(cpu, id, info.map(|(reason, qualification)| Report::new(reason, qualification)))
}

/// One copy: the run loop stays small enough to hold what comes before it.
#[inline(never)]
fn report(cpu: &mut Cpu, id: SlotId, report: Option<Report>) -> Result<(), KillReason> {
    cpu.vmx.counters.bump(Counter::Reflected);
    let (vmx, slot) = (&mut cpu.vmx, &mut cpu.nested.slots[id]);
    let pin = slot.pin12();
    let nmi_blocked = nmi_blocked(vmx, pin, report);
    if slot.vmcs12.get(Field::VM_EXIT_MSR_STORE_COUNT) != 0 {
        store_msrs(vmx, slot, &cpu.config, &cpu.msrs, &cpu.guest)?;
    }
    slot.vmcs12.exits += 1;
    leave_vmcs02(cpu, id, nmi_blocked, report, EndOf::Guest)
}

/// L3 can leave or enter IA-32e mode on its own only as an unrestricted guest; the processor keeps the control in step, and so
/// does vmcs12.
#[inline(always)]
pub fn keep_mode(vmcs02: &mut impl FieldAccess, slot: &mut Slot) {
    if slot.inherited.is_unrestricted() {
        let entry = slot.vmcs12.get(Field::VM_ENTRY_CONTROLS);
        let changed = (entry ^ vmcs02.read(Field::VM_ENTRY_CONTROLS)) & EntryControls::IA32E_MODE_GUEST.bits() as u64;
        if changed != 0 {
            slot.vmcs12.set(Field::VM_ENTRY_CONTROLS, entry ^ changed);
            slot.stale |= Stale::of(Field::VM_ENTRY_CONTROLS);
        }
    }
}

/// The preemption timer of L3, which L2 uses: it finds what is left if it has that saved, else what it set.
#[inline(never)]
pub fn stop_timer(vmcs02: &mut impl FieldAccess, slot: &Slot) {
    let exit = ExitControls::from_bits_retain(slot.vmcs12.get(Field::VM_EXIT_CONTROLS) as u32);
    if !exit.contains(ExitControls::SAVE_PREEMPTION_TIMER) {
        slot.vmcs02.timer.give_back(vmcs02);
    }
}

#[cold]
fn store_msrs(
    vmx: &mut Vmx,
    slot: &Slot,
    config: &Config,
    own: &OwnMsrs,
    guest: &GuestMemory<impl PhysMem>,
) -> Result<(), KillReason> {
    let [at, count] = [Field::VM_EXIT_MSR_STORE_ADDR, Field::VM_EXIT_MSR_STORE_COUNT].map(|f| slot.vmcs12.get(f));
    MsrLists::store(vmx, |index| msrs::answer(&config.offered, own, index), guest, at, count)
}

/// Takes L2 out by an exception or NMI that the processor did not exit for, with its interruption information.
#[cold]
pub fn exception(
    cpu: &mut Cpu,
    id: SlotId,
    info: u32,
    error: Option<u32>,
    qualification: u64,
) -> Result<(), KillReason> {
    let reason = ExitReason::exit(BasicReason::EXCEPTION_OR_NMI);
    report(cpu, id, Some(Report { reason, qualification, event: Some((info, error)) }))
}

/// Takes L2 out of an entry that failed late: no guest state is saved, NMIs are blocked as before. vmcs02 is current.
#[cold]
pub fn entry_failure(cpu: &mut Cpu, basic: BasicReason, qualification: u64) -> Result<(), KillReason> {
    let Some(id) = cpu.nested.current() else {
        return Err(KillReason::Broken(Promise::CurrentVmcs12));
    };
    cpu.vmx.counters.bump(Counter::Reflected);
    let slot = &mut cpu.nested.slots[id];
    let guest_state_loaded = basic == BasicReason::ENTRY_MSR_LOADING;
    slot.inherited.leave_failed_entry(&mut cpu.vmx, &mut slot.vmcs02.pat, &cpu.tracked, guest_state_loaded);
    slot.vmcs02.give_pdptes_back(&mut cpu.vmx, slot.has_duty(Duties::LOAD_PDPTES));
    // The processor may have changed the mode among the entry controls before.
    slot.stale |= Stale::UNWRITTEN;
    if guest_state_loaded {
        // The qualification is the number of the entry that failed; those before it count.
        let loaded = |msr| slot.msr_lists.loaded_by_entry(&cpu.phys, qualification, msr);
        slot.inherited.msrs_loaded(loaded(IA32_PAT), loaded(IA32_EFER));
    }
    let nmi_blocked = cpu.nested.blocking01 & interruptibility::NMI != 0;
    let report = Report::new(ExitReason::entry_failure(basic), qualification);
    leave_vmcs02(cpu, id, nmi_blocked, Some(report), EndOf::Entry)
}

/// NMIs are blocked for L2 after an exit by an NMI, and if L3 ran with them blocked in the processor.
#[inline(always)]
fn nmi_blocked(vmx: &mut Vmx, pin: PinControls, report: Option<Report>) -> bool {
    if pin.contains(PinControls::NMI_EXITING) {
        let real = ExitReason(vmx.read(Field::VM_EXIT_REASON) as u32).basic();
        let by_nmi = match report {
            // An NMI of nvmx's comes with an exit by the monitor trap flag.
            Some(report) => {
                let event = report.event.map_or(EventInfo::NONE, |(info, _)| EventInfo(info));
                event.is(EventKind::Nmi) && real == BasicReason::MONITOR_TRAP_FLAG
            }
            None => {
                real == BasicReason::EXCEPTION_OR_NMI
                    && EventInfo(vmx.read(Field::VM_EXIT_INTR_INFO) as u32).is(EventKind::Nmi)
            }
        };
        if by_nmi {
            return true;
        }
    }
    blocked_in_guest(vmx, pin) != 0
}

/// Blocking by NMI that L3 leaves in the processor, as interruptibility state; vmcs02 is current.
#[inline(always)]
pub fn blocked_in_guest(vmx: &mut Vmx, pin: PinControls) -> u64 {
    if pin.contains(PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS) {
        return 0;
    }
    vmx.read(Field::GUEST_INTERRUPTIBILITY_INFO) & interruptibility::NMI
}

/// What came to its end in vmcs02.
#[derive(Clone, Copy, PartialEq, Eq)]
enum EndOf {
    /// L3 ran.
    Guest,
    /// An entry failed late.
    Entry,
}

#[inline(always)]
fn leave_vmcs02(
    cpu: &mut Cpu,
    id: SlotId,
    nmi_blocked: bool,
    report: Option<Report>,
    left: EndOf,
) -> Result<(), KillReason> {
    let (vmx, slot) = (&mut cpu.vmx, &mut cpu.nested.slots[id]);
    let blocking = if nmi_blocked { interruptibility::NMI } else { 0 };
    let blocking = (cpu.nested.blocking01 != blocking).then_some(blocking);
    let on = MachineParts { vmx: &mut *vmx, phys: &cpu.phys, vmcs01: &cpu.vmcs01 };
    let state = Guest { tracked: &mut cpu.tracked, once: &mut cpu.once01, blocking, left };
    cpu.config.access.exit(on, slot, report, state);
    slot.host_msrs = cpu.tracked.version();
    if slot.vmcs12.get(Field::VM_EXIT_CONTROLS) & ExitControls::HOST_ADDRESS_SPACE_SIZE.bits() as u64 == 0 {
        load_guest_pdptes(vmx, &cpu.guest, &slot.vmcs12)?;
    }
    if slot.has_duty(Duties::FLUSH_VPID) {
        vmx.invvpid(Invalidate::Single, VPID01, 0);
    }
    let count = slot.vmcs12.get(Field::VM_EXIT_MSR_LOAD_COUNT);
    if count != 0 {
        let at = slot.vmcs12.get(Field::VM_EXIT_MSR_LOAD_ADDR);
        slot.msr_lists.arm_exit(vmx, &cpu.phys, &cpu.guest, at, count);
        cpu.once01 |= Once::MSR_AREA;
    }
    if let Operation::NonRoot { current } = cpu.nested.operation {
        cpu.nested.operation = Operation::Root { current: Some(current) };
    }
    Ok(())
}

/// All of L2's state after a VM exit.
struct Guest<'a> {
    tracked: &'a mut Tracked,
    once: &'a mut Once,
    /// Interruptibility state, if it changes.
    blocking: Option<u64>,
    left: EndOf,
}

impl HostState for Guest<'_> {
    #[inline(always)]
    fn take(&mut self, vmcs02: &mut impl FieldAccess, slot: &mut Slot) {
        if self.left == EndOf::Entry {
            return;
        }
        keep_mode(vmcs02, slot);
        if slot.pin12().contains(PinControls::PREEMPTION_TIMER) {
            stop_timer(vmcs02, slot);
        }
        slot.inherited.leave_nested(vmcs02, &mut slot.vmcs12, &mut slot.vmcs02.pat);
    }

    #[inline(always)]
    fn load(&mut self, vmcs01: &mut impl FieldAccess, slot: &Slot) {
        let exit = ExitControls::from_bits_retain(slot.vmcs12.get(Field::VM_EXIT_CONTROLS) as u32);
        load_vmcs12_host_state(vmcs01, &slot.vmcs12, exit & ExitControls::HOST_ADDRESS_SPACE_SIZE);
        if let Some(blocking) = self.blocking {
            vmcs01.write(Field::GUEST_INTERRUPTIBILITY_INFO, blocking);
        }
        self.once.load_resident(vmcs01, &slot.vmcs12);
    }

    #[inline(always)]
    fn load_tracked(&mut self, vmcs01: &mut impl FieldAccess, slot: &Slot) {
        let mut values = HostValues::of(|field| slot.vmcs12.get(field));
        slot.inherited.leave_to_guest(&mut values);
        self.tracked.load(vmcs01, &values);
    }
}

/// L2's state after a VM exit, written to vmcs01; `size` is the control for a 64-bit host, if vmcs12 has it.
///
/// vmcs01 still holds L2's state at its VMRESUME, and most of that is what the host area asks for. All of it is written all the same: to
/// ask what is there costs as much as to write it.
#[inline(always)]
pub fn load_vmcs12_host_state(vmx: &mut impl FieldAccess, vmcs12: &Vmcs12, size: ExitControls) {
    let long = size.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    vmx.write(Field::GUEST_RIP, vmcs12.get(Field::HOST_RIP));
    vmx.write(Field::GUEST_RSP, vmcs12.get(Field::HOST_RSP));
    vmx.write(Field::GUEST_RFLAGS, 2);
    vmx.write(Field::GUEST_CR0, vmcs12.get(Field::HOST_CR0));
    vmx.write(Field::GUEST_CR3, vmcs12.get(Field::HOST_CR3));
    let cr4 = Cr4::from_bits_retain(vmcs12.get(Field::HOST_CR4));
    let cr4 = if long { cr4 | Cr4::PAE } else { cr4 - Cr4::PCIDE };
    vmx.write(Field::GUEST_CR4, cr4.bits());
    for item in [Item::Dr7, Item::Debugctl] {
        if let Host::Constant(value) = item.row().host {
            vmx.write(item.row().guest, value);
        }
    }
    vmx.write(Field::GUEST_PENDING_DBG_EXCEPTIONS, 0);
    vmx.write(Field::GUEST_GDTR_BASE, vmcs12.get(Field::HOST_GDTR_BASE));
    vmx.write(Field::GUEST_IDTR_BASE, vmcs12.get(Field::HOST_IDTR_BASE));
    vmx.write(Field::GUEST_GDTR_LIMIT, 0xFFFF);
    vmx.write(Field::GUEST_IDTR_LIMIT, 0xFFFF);
    load_segments(vmx, vmcs12, long);
}

/// Segment registers (SDM vol. 3C, "Loading Host Segment and Descriptor-Table Registers").
#[inline(always)]
fn load_segments(vmx: &mut impl FieldAccess, vmcs12: &Vmcs12, long: bool) {
    const LONG: u64 = AccessRights::CODE_64.0 as u64;
    const DEFAULT_32: u64 = AccessRights::CODE_32.0 as u64;
    const DATA: u64 = AccessRights::DATA_32.0 as u64;
    const TSS: u64 = AccessRights::BUSY_TSS.0 as u64;
    const FLAT: u64 = 0xFFFF_FFFF;
    vmx.write(Field::GUEST_CS_SELECTOR, vmcs12.get(Field::HOST_CS_SELECTOR));
    vmx.write(Field::GUEST_CS_AR_BYTES, if long { LONG } else { DEFAULT_32 });
    vmx.write(Field::GUEST_CS_BASE, 0);
    vmx.write(Field::GUEST_CS_LIMIT, FLAT);
    macro_rules! data {
        ($($host:ident $selector:ident $rights:ident $limit:ident $base:ident $value:expr;)*) => { $(
            let selector = vmcs12.get(Field::$host);
            vmx.write(Field::$selector, selector);
            if selector == 0 {
                vmx.write(Field::$rights, UNUSABLE);
                vmx.one_less();
            } else {
                vmx.write(Field::$rights, DATA);
                vmx.write(Field::$limit, FLAT);
            }
            vmx.write(Field::$base, $value);
        )* };
    }
    data! {
        HOST_SS_SELECTOR GUEST_SS_SELECTOR GUEST_SS_AR_BYTES GUEST_SS_LIMIT GUEST_SS_BASE 0;
        HOST_DS_SELECTOR GUEST_DS_SELECTOR GUEST_DS_AR_BYTES GUEST_DS_LIMIT GUEST_DS_BASE 0;
        HOST_ES_SELECTOR GUEST_ES_SELECTOR GUEST_ES_AR_BYTES GUEST_ES_LIMIT GUEST_ES_BASE 0;
        HOST_FS_SELECTOR GUEST_FS_SELECTOR GUEST_FS_AR_BYTES GUEST_FS_LIMIT GUEST_FS_BASE vmcs12.get(Field::HOST_FS_BASE);
        HOST_GS_SELECTOR GUEST_GS_SELECTOR GUEST_GS_AR_BYTES GUEST_GS_LIMIT GUEST_GS_BASE vmcs12.get(Field::HOST_GS_BASE);
    }
    vmx.write(Field::GUEST_TR_SELECTOR, vmcs12.get(Field::HOST_TR_SELECTOR));
    vmx.write(Field::GUEST_TR_AR_BYTES, TSS);
    vmx.write(Field::GUEST_TR_BASE, vmcs12.get(Field::HOST_TR_BASE));
    vmx.write(Field::GUEST_TR_LIMIT, 0x67);
    vmx.write(Field::GUEST_LDTR_SELECTOR, 0);
    vmx.write(Field::GUEST_LDTR_AR_BYTES, UNUSABLE);
}

/// A host outside IA-32e mode with PAE paging gets its PDPTEs from the table at CR3; reserved bits in them are a VMX abort
/// (SDM, "Checking and Loading Host Page-Directory-Pointer-Table Entries").
#[cold]
fn load_guest_pdptes(vmx: &mut Vmx, guest: &GuestMemory<impl PhysMem>, vmcs12: &Vmcs12) -> Result<(), KillReason> {
    const ABORT_PDPTES: u32 = 2;
    if vmcs12.get(Field::HOST_CR4) & Cr4::PAE.bits() == 0 {
        return Ok(());
    }
    let entries = fetch_pdptes(guest, vmcs12.get(Field::HOST_CR3));
    if !pdptes_are_valid(&entries, guest.limit()) {
        return Err(KillReason::VmxAbort(ABORT_PDPTES));
    }
    PDPTES.into_iter().zip(entries).for_each(|(field, entry)| vmx.write(field, entry));
    Ok(())
}
