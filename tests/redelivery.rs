//! An event whose delivery an exit of nvmx's own interrupted is delivered again: the same event, once, in a form that VM
//! entry accepts. Against a second statement of the rules (SDM "VM-Entry Controls for Event Injection", table "Format of the
//! IDT-Vectoring Information Field").

use nvmx::vmx::event::{EventInfo, EventKind, Redelivery};
use proptest::prelude::*;

const KINDS: [EventKind; 6] = [
    EventKind::ExternalInterrupt,
    EventKind::Nmi,
    EventKind::HardwareException,
    EventKind::SoftwareInterrupt,
    EventKind::PrivilegedSoftwareException,
    EventKind::SoftwareException,
];

/// Vectors that an event of this type can have.
fn vectors(kind: EventKind) -> Vec<u8> {
    match kind {
        EventKind::ExternalInterrupt => (16..=255).collect(),
        EventKind::Nmi => vec![2],
        EventKind::HardwareException => (0..32).filter(|v| ![2, 3, 4, 9, 15].contains(v)).collect(),
        EventKind::SoftwareInterrupt => (0..=255).collect(),
        EventKind::PrivilegedSoftwareException => vec![1],
        EventKind::SoftwareException => vec![3, 4],
        EventKind::Reserved | EventKind::Other => Vec::new(),
    }
}

/// Whether delivery pushes an error code.
fn pushes(kind: EventKind, vector: u8) -> bool {
    kind == EventKind::HardwareException && [8, 10, 11, 12, 13, 14, 17, 21].contains(&vector)
}

/// What an exit reports of an event: bit 12 is undefined, 30:13 are 0.
fn vectoring() -> impl Strategy<Value = EventInfo> {
    proptest::sample::select(&KINDS[..])
        .prop_flat_map(|kind| (Just(kind), proptest::sample::select(vectors(kind)), any::<bool>()))
        .prop_map(|(kind, vector, undefined)| {
            let info = EventInfo::new(kind, vector);
            let info = if pushes(kind, vector) { info.with_error_code() } else { info };
            EventInfo(info.0 | u32::from(undefined) << 12)
        })
}

/// The rules of VM entry on the injection fields of a guest in protected mode, from the SDM's list.
fn entry_accepts(again: &Redelivery) -> bool {
    let info = again.info.0;
    let (kind, vector, error) = (info >> 8 & 7, info & 0xFF, info >> 11 & 1 == 1);
    let reserved = info & 0x7FFF_F000 == 0 && kind != 1;
    let vector_fits = match kind {
        2 => vector == 2,
        3 => vector <= 31,
        7 => vector == 0,
        _ => true,
    };
    let error_fits = error == (kind == 3 && [8, 10, 11, 12, 13, 14, 17, 21].contains(&vector));
    let length = again.length.is_none_or(|length| (1..=15).contains(&length));
    reserved && vector_fits && error_fits && length
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn an_interrupted_event_comes_again_as_it_was(event in vectoring(), error in 0u32..0x1_0000, length in 1u32..=15) {
        let again = Redelivery::of(event, error, length);
        prop_assert!(again.info.is_valid() && entry_accepts(&again), "{again:?}");
        prop_assert_eq!((again.info.kind(), again.info.vector()), (event.kind(), event.vector()));
        // The error code is there exactly if delivery pushes one, the length exactly if an instruction raised the event.
        prop_assert_eq!(again.error, pushes(event.kind(), event.vector()).then_some(error));
        let by_instruction = [4, 5, 6].contains(&(event.0 >> 8 & 7));
        prop_assert_eq!(again.length, by_instruction.then_some(length));
        // What is interrupted once more is delivered once more, the same.
        prop_assert_eq!(Redelivery::of(again.info, error, length), again);
    }

    #[test]
    fn without_an_interrupted_event_nothing_is_delivered(bits in any::<u32>(), error in any::<u32>(), length in any::<u32>()) {
        let again = Redelivery::of(EventInfo(bits & !EventInfo::VALID), error, length);
        prop_assert_eq!(again, Redelivery { info: EventInfo::NONE, error: None, length: None });
    }
}
