//! INIT and start-up messages (SIPI) for L2.
//!
//! In VMX non-root operation an INIT exits instead of resetting the processor, and so does a SIPI in the wait-for-SIPI
//! state; nvmx does to L2's processor what they do to a real one. In VMX operation of L2 an INIT is blocked: it waits for
//! VMXOFF, or for L3, which it takes out (`nested::events`).
//!
//! Source: SDM vol. 3C, "Other Causes of VM Exits" ("INIT signals", "Start-up IPIs"), "Virtualization of ... INIT";
//! vol. 3A, "MP Initialization".

use crate::hw::vmx::Invalidate;
use crate::hw::{apic, cr};
use crate::nested::Operation;
use crate::nested::vpid::VPID01;
use crate::vcpu::{Cpu, Next, Waiting, initial, smp};
use crate::vmx::Field;
use crate::vmx::segment::Segment;
use l2_protocol::abi::Counter;
use raw_cpuid::native_cpuid::cpuid_count;

/// Activity state: wait-for-SIPI.
const WAIT_FOR_SIPI: u64 = 3;

/// INIT exit of L2; vmcs01 is current.
#[cold]
pub fn init(cpu: &mut Cpu) -> Next {
    smp::stop_if_over();
    if came_before_sipi(cpu) {
        return Next::Stay;
    }
    match cpu.nested.operation {
        Operation::Off => reset(cpu),
        _ => cpu.waiting |= Waiting::INIT,
    }
    Next::Stay
}

/// While it waits for a SIPI, a processor ignores INITs. One below nvmx may hold an INIT back until the SIPI has come, and
/// report it before L2's first instruction.
fn came_before_sipi(cpu: &mut Cpu) -> bool {
    let exits = cpu.vmx.counters.get(Counter::HwExits);
    cpu.started_at.is_some_and(|at| exits == at + 1) && cpu.vmx.read(Field::GUEST_RIP) == 0
}

/// Puts L2's processor, outside VMX operation, into the state after an INIT; vmcs01 is current.
pub fn reset(cpu: &mut Cpu) {
    initial::write_init_state(cpu, cpuid_count(1, 0).eax);
    cpu.loads_msrs01 = false;
    cpu.tracked.refresh(&mut cpu.vmx);
    cpu.waiting = Waiting::empty();
    cr::set_cr2(0);
    cr::reset_debug_registers();
    if let Some(apic) = apic::LocalApic::find(&cpu.guest) {
        apic.reset();
    }
    // Translations that L2 had with paging are not to be found again without.
    cpu.vmx.invvpid(Invalidate::Single, VPID01, 0);
    // The one that booted goes on at the reset vector, in firmware.
    if !apic::booted() {
        cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, WAIT_FOR_SIPI);
    }
}

/// SIPI exit of L2; vmcs01 is current.
#[cold]
pub fn sipi(cpu: &mut Cpu) -> Next {
    let page = cpu.vmx.read(Field::EXIT_QUALIFICATION) & 0xFF;
    cpu.vmx.write(Segment::Cs.selector(), page << 8);
    cpu.vmx.write(Segment::Cs.base(), page << 12);
    cpu.vmx.write(Field::GUEST_RIP, 0);
    cpu.vmx.write(Field::GUEST_INTERRUPTIBILITY_INFO, 0);
    cpu.vmx.write(Field::GUEST_ACTIVITY_STATE, 0);
    cpu.started_at = Some(cpu.vmx.counters.get(Counter::HwExits));
    smp::note_running();
    Next::Stay
}
