//! Exit qualifications and interruption information, bit by bit.

use nvmx::vmx::event::{EventInfo, EventKind, has_error_code, vector};
use nvmx::vmx::qualification::{CrAccess, DebugException, DrAccess, IoAccess, TaskSwitch, TaskSwitchSource};

#[test]
fn control_register_accesses() {
    assert_eq!(CrAccess::decode(0x0000), CrAccess::Write { cr: 0, gpr: 0 });
    assert_eq!(CrAccess::decode(0x0F03), CrAccess::Write { cr: 3, gpr: 15 });
    assert_eq!(CrAccess::decode(0x0218), CrAccess::Read { cr: 8, gpr: 2 });
    assert_eq!(CrAccess::decode(0x0020), CrAccess::Clts);
    assert_eq!(CrAccess::decode(0x000B_0030), CrAccess::Lmsw { source: 11, memory: false });
    assert_eq!(CrAccess::decode(0xFFFF_0070), CrAccess::Lmsw { source: 0xFFFF, memory: true });
}

#[test]
fn debug_register_accesses() {
    assert_eq!(DrAccess::decode(0x0007), DrAccess { dr: 7, gpr: 0, read: false });
    assert_eq!(DrAccess::decode(0x0C16), DrAccess { dr: 6, gpr: 12, read: true });
}

#[test]
fn io_instructions() {
    let out = IoAccess { port: 0x3F8, size: 1, input: false, string: false, rep: false, immediate: false };
    assert_eq!(IoAccess::decode(0x03F8_0000), out);
    let rep_insd = IoAccess { port: 0x1F0, size: 4, input: true, string: true, rep: true, immediate: false };
    assert_eq!(IoAccess::decode(0x01F0_003B), rep_insd);
    let in_imm = IoAccess { port: 0x80, size: 2, input: true, string: false, rep: false, immediate: true };
    assert_eq!(IoAccess::decode(0x0080_0049), in_imm);
}

#[test]
fn task_switches() {
    for (source, bits) in [
        (TaskSwitchSource::Call, 0),
        (TaskSwitchSource::Iret, 1),
        (TaskSwitchSource::Jmp, 2),
        (TaskSwitchSource::Gate, 3),
    ] {
        assert_eq!(TaskSwitch::decode(bits << 30 | 0x28), TaskSwitch { selector: 0x28, source });
    }
}

#[test]
fn debug_exceptions() {
    let none =
        DebugException { breakpoints: 0, register_access: false, single_step: false, bus_lock: false, rtm: false };
    assert_eq!(DebugException::decode(0), none);
    assert_eq!(DebugException::decode(0xA), DebugException { breakpoints: 0xA, ..none });
    assert_eq!(DebugException::decode(1 << 11), DebugException { bus_lock: true, ..none });
    assert_eq!(DebugException::decode(1 << 13), DebugException { register_access: true, ..none });
    assert_eq!(DebugException::decode(1 << 14), DebugException { single_step: true, ..none });
    assert_eq!(DebugException::decode(1 << 16), DebugException { rtm: true, ..none });
}

const KINDS: [EventKind; 8] = [
    EventKind::ExternalInterrupt,
    EventKind::Reserved,
    EventKind::Nmi,
    EventKind::HardwareException,
    EventKind::SoftwareInterrupt,
    EventKind::PrivilegedSoftwareException,
    EventKind::SoftwareException,
    EventKind::Other,
];

#[test]
fn events_come_back_as_they_were_made() {
    for (number, kind) in (0u32..).zip(KINDS) {
        for v in 0..=255u8 {
            let event = EventInfo::new(kind, v);
            assert_eq!(event.0, 1 << 31 | number << 8 | u32::from(v));
            assert!(event.is(kind) && event.is_valid() && !event.has_error_code());
            assert_eq!((event.kind(), event.vector()), (kind, v));
            assert!(event.with_error_code().has_error_code());
            assert_eq!(event.has_instruction_length(), matches!(number, 4..=6));
            assert_eq!(event.is_exception(14), number == 3 && v == 14);
            // Bit 31 clear: no event, whatever the rest says.
            let stale = EventInfo(event.0 & !EventInfo::VALID);
            assert!(!stale.is(kind) && !stale.is_exception(v) && stale.to_entry() == EventInfo::NONE);
        }
    }
}

#[test]
fn an_interrupted_delivery_is_injected_again_without_the_bits_that_an_entry_reserves() {
    let interrupted = EventInfo(EventInfo::new(EventKind::HardwareException, vector::PF).with_error_code().0 | 1 << 12);
    assert_eq!(interrupted.to_entry().0, 0x8000_0B0E);
    assert_eq!(EventInfo(u32::MAX).to_entry().0 & EventInfo::ENTRY_RESERVED, 0);
}

#[test]
fn exceptions_with_an_error_code() {
    let with: Vec<u8> = (0..=255).filter(|v| has_error_code(*v)).collect();
    assert_eq!(with, [8, 10, 11, 12, 13, 14, 17]);
}
