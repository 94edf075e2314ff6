//! The rules on access rights, exhaustively: every low byte, every flag, every segment, three kinds of guest, against a
//! second statement of the SDM's list.

mod core_support;

use core_support::{CONTEXT, Memory, Vmcs, rich, valid_vmcs12};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::check_guest;
use nvmx::vmx::Field::*;
use nvmx::vmx::segment::{AccessRights, Segment};
use nvmx::vmx::{Capabilities, Fields};
use std::collections::BTreeSet;
use std::sync::LazyLock;

static CAPS: LazyLock<Capabilities> = LazyLock::new(|| offered(&rich()));

const SEGMENTS: [Segment; 8] =
    [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs, Segment::Ldtr, Segment::Tr];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Guest {
    Long,
    Legacy,
    Unrestricted,
}

/// Names of the rules that the access rights of this vmcs12 violate.
fn violations(v: &Vmcs, guest: Guest) -> BTreeSet<&'static str> {
    let mut broken = BTreeSet::new();
    let mut demand = |name, holds: bool| {
        if !holds {
            broken.insert(name);
        }
    };
    let ar = |segment: Segment| v.get(segment.rights());
    let kind = |segment| ar(segment) % 16;
    let bit = |segment, number: u32| ar(segment) >> number & 1 == 1;
    let dpl = |segment| ar(segment) >> 5 & 3;
    let rpl = |segment: Segment| v.get(segment.selector()) & 3;
    let usable = |segment| !bit(segment, 16);
    let unrestricted = guest == Guest::Unrestricted;
    let granularity = |segment: Segment| {
        let limit = v.get(segment.limit());
        let low_ones = limit % 4096 == 4095;
        (low_ones || !bit(segment, 15)) && (limit < 1 << 20 || bit(segment, 15))
    };

    let cs_types: &[u64] = if unrestricted { &[3, 9, 11, 13, 15] } else { &[9, 11, 13, 15] };
    demand("GuestCsType", cs_types.contains(&kind(Segment::Cs)));
    if usable(Segment::Ss) {
        demand("GuestSsType", [3, 7].contains(&kind(Segment::Ss)));
    }
    demand(
        "GuestCsDpl",
        match kind(Segment::Cs) {
            3 => dpl(Segment::Cs) == 0,
            9 | 11 => dpl(Segment::Cs) == dpl(Segment::Ss),
            13 | 15 => dpl(Segment::Cs) <= dpl(Segment::Ss),
            _ => false,
        },
    );
    demand("GuestSsDpl", unrestricted || dpl(Segment::Ss) == rpl(Segment::Ss));
    demand("GuestSsDpl", kind(Segment::Cs) != 3 || dpl(Segment::Ss) == 0);
    for segment in [Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs] {
        if usable(segment) {
            demand("GuestDataType", kind(segment) % 2 == 1 && (kind(segment) < 8 || kind(segment) & 2 == 2));
            demand("GuestDataDpl", unrestricted || kind(segment) > 11 || dpl(segment) >= rpl(segment));
        }
    }
    for segment in [Segment::Cs, Segment::Ss, Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs] {
        if segment == Segment::Cs || usable(segment) {
            demand("GuestSegmentS", bit(segment, 4));
            demand("GuestSegmentPresent", bit(segment, 7));
            demand("GuestSegmentReserved", (8..12).chain(17..32).all(|i| !bit(segment, i)));
            demand("GuestSegmentGranularity", granularity(segment));
        }
    }
    demand("GuestCsDb", guest != Guest::Long || !bit(Segment::Cs, 13) || !bit(Segment::Cs, 14));
    let system = |segment| {
        let reserved = (8..12).chain(17..32).all(|i| !bit(segment, i));
        !bit(segment, 4) && bit(segment, 7) && reserved && granularity(segment)
    };
    demand("GuestTrType", kind(Segment::Tr) == 11 || kind(Segment::Tr) == 3 && guest != Guest::Long);
    demand("GuestTrRights", system(Segment::Tr) && usable(Segment::Tr));
    if usable(Segment::Ldtr) {
        demand("GuestLdtrRights", kind(Segment::Ldtr) == 2 && system(Segment::Ldtr));
    }
    broken
}

fn start(guest: Guest) -> Vmcs {
    let mut v = valid_vmcs12(&CAPS);
    if guest != Guest::Long {
        v.clear(VM_ENTRY_CONTROLS, 1 << 9).set(GUEST_IA32_EFER, 0).set(GUEST_CS_AR_BYTES, 0xC09B);
    }
    if guest == Guest::Unrestricted {
        v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7);
    }
    v
}

fn agree(v: &Vmcs, guest: Guest) {
    let broken = violations(v, guest);
    match check_guest(v, &CAPS, &CONTEXT, &Memory::default()) {
        Ok(_) => assert!(broken.is_empty(), "{guest:?}: not found: {broken:?} {v:?}"),
        Err(failure) => assert!(broken.contains(failure.check.name()), "{guest:?}: {} but {broken:?}", failure.check),
    }
}

#[test]
fn access_rights_of_each_segment_alone() {
    for guest in [Guest::Long, Guest::Legacy, Guest::Unrestricted] {
        let start = start(guest);
        for segment in SEGMENTS {
            // Low byte, then one of L, D/B, G set or not, then unusable.
            for low in 0..256 {
                for flags in [0, 1 << 13, 1 << 14, 1 << 15, 0xC000, 1 << 16, 1 << 16 | 1 << 14] {
                    let mut v = start.clone();
                    v.set(segment.rights(), low | flags);
                    agree(&v, guest);
                }
            }
            for reserved in (8..12).chain(17..32) {
                let mut v = start.clone();
                v.or(segment.rights(), 1 << reserved);
                agree(&v, guest);
            }
        }
    }
}

#[test]
fn limits_and_granularity_of_each_segment() {
    for segment in SEGMENTS {
        for limit in [0, 0xFFE, 0xFFF, 0xF_FFFF, 0x10_0000, 0x10_0FFF, 0xFFFF_F000, 0xFFFF_FFFF] {
            for granular in [0, 1 << 15] {
                let mut v = start(Guest::Legacy);
                v.clear(segment.rights(), 1 << 15).or(segment.rights(), granular).set(segment.limit(), limit);
                agree(&v, Guest::Legacy);
            }
        }
    }
}

#[test]
fn privilege_levels_of_code_and_stack_together() {
    for guest in [Guest::Legacy, Guest::Unrestricted] {
        for code in [3, 9, 11, 13, 15] {
            for levels in 0..64 {
                let (cs, ss, rpl) = (levels & 3, levels >> 2 & 3, levels >> 4);
                let mut v = start(guest);
                v.set(GUEST_CS_AR_BYTES, 0xC090 | code | cs << 5).set(GUEST_SS_AR_BYTES, 0xC093 | ss << 5);
                v.or(GUEST_CS_SELECTOR, rpl).or(GUEST_SS_SELECTOR, rpl);
                agree(&v, guest);
            }
        }
    }
}

#[test]
fn access_rights_say_what_their_bits_say() {
    assert_eq!((AccessRights(0xA09B).kind(), AccessRights(0xA0FB).dpl()), (11, 3));
    assert!(AccessRights(0xA09B).is_64_bit_code() && !AccessRights(0xC09B).is_64_bit_code());
    assert!(AccessRights(0x9A).is_readable_code() && !AccessRights(0x98).is_readable_code());
    assert!(AccessRights(0x92).is_writable_data() && !AccessRights(0x9A).is_writable_data());
    assert!(AccessRights(0x96).is_expand_down() && !AccessRights(0x9E).is_expand_down());
    assert_eq!(AccessRights(0xFFFF_FFFF).reserved(), 0xFFFE_0F00);
}
