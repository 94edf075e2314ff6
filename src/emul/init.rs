//! INIT and start-up messages (SIPI) for L2.
//!
//! In VMX non-root operation an INIT exits instead of resetting the processor, and so does a SIPI in the wait-for-SIPI
//! state; nvmx does to L2's processor what they do to a real one. In VMX operation of L2 an INIT is blocked: it waits for
//! VMXOFF, or for L3, which it takes out (`nested::events`).
//!
//! Source: SDM vol. 3C, "Other Causes of VM Exits" ("INIT signals", "Start-up IPIs"), "Virtualization of ... INIT";
//! vol. 3A, "MP Initialization".

use crate::cpu::{Cpu, Operation, Startup, Waiting, others};
use crate::guest::{Next, events, initial};
use crate::hw::cpuid::cpuid_count;
use crate::hw::vmx::Invalidate;
use crate::hw::{apic, cr};
use crate::vmcs::once::Once;
use crate::vmcs::vpid::VPID01;
use crate::vmx::Field;
use crate::vmx::segment::Segment;
use crate::vmx::state::activity::WAIT_FOR_SIPI;

/// INIT exit of L2; vmcs01 is current.
#[cold]
pub fn init(cpu: &mut Cpu) -> Next {
    others::stop_if_over();
    match cpu.nested.operation {
        // While it waits for a SIPI, a processor ignores INITs. One in VMX operation may hold an INIT back until the SIPI
        // has come, and report it before L2's first instruction.
        Operation::Off if cpu.start == Startup::Entering => {}
        Operation::Off => take(cpu),
        _ => cpu.waiting |= Waiting::INIT,
    }
    Next::Stay
}

/// L2's processor, outside VMX operation, takes an INIT; vmcs01 is current.
///
/// Until the processor waits for a SIPI it loses one: VMX root operation drops it. So all but what the entry asks for is
/// left for later.
pub fn take(cpu: &mut Cpu) {
    // The one that booted goes on at the reset vector, in firmware.
    if apic::booted() {
        return reset(cpu);
    }
    for (field, value) in [
        (Field::GUEST_ACTIVITY_STATE, WAIT_FOR_SIPI),
        (Field::GUEST_INTERRUPTIBILITY_INFO, 0),
        (Field::VM_ENTRY_INTR_INFO_FIELD, 0),
    ] {
        cpu.vmx.write(field, value);
    }
    cpu.waiting &= Waiting::ALWAYS | Waiting::MACHINE_CHECK;
    cpu.start = Startup::Waiting;
    if let Some(apic) = apic::LocalApic::find(&cpu.guest) {
        apic.disable();
    }
}

/// Puts L2's processor, outside VMX operation, into the state after an INIT; vmcs01 is current.
pub fn reset(cpu: &mut Cpu) {
    initial::write_init_state(cpu, cpuid_count(1, 0).eax);
    cpu.once01 = Once::empty();
    cpu.tracked.refresh(&mut cpu.vmx);
    cpu.waiting &= Waiting::ALWAYS | Waiting::MACHINE_CHECK;
    cr::set_cr2(0);
    cr::reset_debug_registers();
    if let Some(apic) = apic::LocalApic::find(&cpu.guest) {
        apic.reset();
    }
    // Translations that L2 had with paging are not to be found again without.
    cpu.vmx.invvpid(Invalidate::Single, VPID01, 0);
    cpu.start = Startup::Done;
    if !apic::booted() {
        cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, WAIT_FOR_SIPI);
    }
}

/// SIPI exit of L2; vmcs01 is current.
#[cold]
pub fn sipi(cpu: &mut Cpu) -> Next {
    let page = cpu.vmx.read(Field::EXIT_QUALIFICATION) & 0xFF;
    if cpu.start == Startup::Waiting {
        reset(cpu);
    }
    cpu.vmx.write(Segment::Cs.selector(), page << 8);
    cpu.vmx.write(Segment::Cs.base(), page << 12);
    cpu.vmx.write(Field::GUEST_RIP, 0);
    cpu.vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, 0);
    cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, 0);
    // Whatever was held back comes before the NMI window, and L2's first instruction behind it.
    cpu.start = Startup::Entering;
    events::ask_for_window(cpu);
    others::note_running();
    Next::Stay
}
