//! VMCSs that move between CPUs: VMCLEAR on one, VMPTRLD and VMLAUNCH on another.

use crate::{
    cpus,
    guest::{self, Exit, Guest},
};
use l2_kit::{
    Check, cpu, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls},
    smp,
    vmx::{self, reason},
};

/// Guest state that must come along: something of each area of the VMCS.
const FIELDS: [(&str, u32); 12] = [
    ("rip", f::GUEST_RIP),
    ("rsp", f::GUEST_RSP),
    ("cr3", f::GUEST_CR3),
    ("cs_ar", f::GUEST_CS_AR),
    ("tr_limit", f::GUEST_TR_LIMIT),
    ("eptp", f::EPTP),
    ("vpid", f::VPID),
    ("bitmap", f::MSR_BITMAP),
    ("primary", f::PRIMARY_CONTROLS),
    ("reason", f::EXIT_REASON),
    ("length", f::EXIT_INSTRUCTION_LENGTH),
    ("cr4_shadow", f::CR4_SHADOW),
];
/// The word in which the field that differs is left.
const DIFFERS: usize = 12;

/// One guest travels three times round all CPUs, and sees only its own registers.
pub fn all(_ids: &[u32]) {
    if vmx::vmptrst().1 == u64::MAX && !cpu_is_in_vmx() {
        smp::run_on_all(cpus(), |_| guest::enter_vmx());
    }
    let guest = Guest::make(0, 0x77, Controls::default());
    guest.start(journey, 0, false);
    vmx::vmclear(guest.vcpu.vmcs);
    guest.vcpu.launched = false;
    for stop in 0..3 * cpus() {
        let index = stop % cpus();
        smp::run_on(index, stay);
        let note = |word| smp::noted(0, word);
        Check::new(&mut Serial, "a VMCS on its way")
            .fact("stop", stop)
            .fact("cpu", index)
            .expect("resume", note(0), 5)
            .fact("exits", note(1))
            .fact("rbx", Hex(note(2)))
            .expect("differs", note(DIFFERS), 0)
            .end();
    }
    smp::clear_notes();
}

/// In VMX operation VMPTRST succeeds; outside it traps.
fn cpu_is_in_vmx() -> bool {
    cpu::cr4() & cpu::CR4_VMXE != 0
}

/// What a CPU does with the guest: loads it, lets it run for a while, gives it away.
fn stay(_: usize) {
    let guest = guest::of(0);
    vmx::vmptrld(guest.vcpu.vmcs);
    // It was cleared: VMRESUME is refused.
    guest.vcpu.launched = true;
    guest.vcpu.write_host_stack();
    setup::write_host_state();
    let refused = match guest.run() {
        Exit::Refused(error) => error,
        other => other.word(),
    };
    smp::note(0, 0, refused);
    guest.vcpu.launched = false;
    for exits in 1..=10 {
        match guest.run() {
            Exit::Reason(reason::CPUID) => guest.skip(),
            other => smp::note(0, 3, other.word()),
        }
        smp::note(0, 1, exits);
    }
    smp::note(0, 2, guest.vcpu.registers.rbx);
    let before = FIELDS.map(|(_, field)| vmx::read(field));
    vmx::vmclear(guest.vcpu.vmcs);
    // Back for a moment: all is as it was.
    vmx::vmptrld(guest.vcpu.vmcs);
    let differs = FIELDS.iter().zip(before).position(|((_, field), value)| vmx::read(*field) != value);
    smp::note(0, DIFFERS, differs.map_or(0, |i| 1 + i as u64));
    vmx::vmclear(guest.vcpu.vmcs);
}

/// Counts in RBX, with a CPUID a step.
extern "C" fn journey(_: u64) -> u64 {
    // SAFETY: never returns, so that no register matters.
    unsafe {
        core::arch::asm!(
            "xor ebx, ebx",
            "2: inc ebx",
            "mov r8, rbx",
            "xor eax, eax",
            "cpuid",
            "mov rbx, r8",
            "jmp 2b",
            options(noreturn)
        )
    }
}
