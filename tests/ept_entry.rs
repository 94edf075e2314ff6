//! One entry at a time: every combination of the low bits, each reserved bit alone.

use nvmx::addr::Hpa;
use nvmx::ept::entry::{Caching, Level, Meaning, Misconfig, Rights, decode, leaf_entry, table_entry};
use nvmx::ept::{EptRules, MemoryType, Qualification};

const LEVELS: [Level; 4] = [Level::Pml4, Level::Pdpt, Level::Pd, Level::Pt];

fn rules(execute_only: bool, pages_2m: bool, pages_1g: bool) -> EptRules {
    EptRules::new(40, execute_only, pages_2m, pages_1g)
}

/// By the tables of the SDM, for an entry whose address is good.
fn expected(low: u64, level: Level, execute_only: bool, pages_2m: bool, pages_1g: bool) -> &'static str {
    match low & 7 {
        0 => return "not present",
        1 | 3 | 5 | 7 => {}
        4 if execute_only => {}
        _ => return "rights",
    }
    let leaf = match (level, low >> 7 & 1) {
        (Level::Pt, _) => true,
        (_, 0) => false,
        (Level::Pd, _) if pages_2m => true,
        (Level::Pdpt, _) if pages_1g => true,
        _ => return "reserved",
    };
    match (leaf, low >> 3 & 7) {
        (true, 0 | 1 | 4 | 5 | 6) => "leaf",
        (true, _) => "type",
        (false, 0) if low >> 6 & 1 == 0 => "table",
        (false, _) => "reserved",
    }
}

fn word(meaning: Meaning) -> &'static str {
    match meaning {
        Meaning::NotPresent => "not present",
        Meaning::Table(_) => "table",
        Meaning::Leaf { .. } => "leaf",
        Meaning::Misconfigured(Misconfig::Rights) => "rights",
        Meaning::Misconfigured(Misconfig::ReservedBit) => "reserved",
        Meaning::Misconfigured(Misconfig::MemoryType) => "type",
    }
}

#[test]
fn low_twelve_bits_mean_what_the_tables_say() {
    for options in 0..8u32 {
        let [execute_only, pages_2m, pages_1g] = [options & 1 != 0, options & 2 != 0, options & 4 != 0];
        let rules = rules(execute_only, pages_2m, pages_1g);
        for level in LEVELS {
            for low in 0..1 << 12 {
                let meaning = decode(0x12_4000_0000 | low, level, &rules);
                let expected = expected(low, level, execute_only, pages_2m, pages_1g);
                assert_eq!(word(meaning), expected, "{low:#x} at {level:?} under {rules:?}");
            }
        }
    }
}

#[test]
fn address_bits_beyond_the_width_are_reserved() {
    for bit in 40..52 {
        for level in LEVELS {
            let entry = 1 << bit | 7;
            assert_eq!(word(decode(entry, level, &rules(true, true, true))), "reserved", "bit {bit} at {level:?}");
        }
    }
}

#[test]
fn high_bits_are_ignored() {
    for bit in 52..64 {
        for level in LEVELS {
            let plain = decode(0x4000_0007, level, &rules(true, true, true));
            assert_eq!(decode(1 << bit | 0x4000_0007, level, &rules(true, true, true)), plain);
        }
    }
}

#[test]
fn a_width_of_52_bits_leaves_none_reserved() {
    let wide = EptRules::new(52, true, true, true);
    assert_eq!(
        decode(0xf_ffff_ffff_f007, Level::Pt, &wide),
        decode(0xf_ffff_ffff_f007, Level::Pt, &EptRules::new(99, true, true, true))
    );
    assert_eq!(word(decode(0xf_ffff_ffff_f007, Level::Pt, &wide)), "leaf");
}

#[test]
fn a_large_page_must_be_aligned() {
    for (level, bits) in [(Level::Pd, 12..21), (Level::Pdpt, 12..30)] {
        for bit in bits {
            assert_eq!(
                word(decode(1 << bit | 0x87, level, &rules(true, true, true))),
                "reserved",
                "bit {bit} at {level:?}"
            );
        }
    }
}

#[test]
fn an_entry_that_is_not_present_is_nothing_else() {
    for level in LEVELS {
        assert_eq!(decode(!7, level, &rules(true, true, true)), Meaning::NotPresent);
    }
}

#[test]
fn what_is_encoded_decodes_again() {
    let types = [
        MemoryType::Uncacheable,
        MemoryType::WriteCombining,
        MemoryType::WriteThrough,
        MemoryType::WriteProtected,
        MemoryType::WriteBack,
    ];
    for level in [Level::Pt, Level::Pd, Level::Pdpt] {
        for memory_type in types {
            for ignore_pat in [false, true] {
                let caching = Caching::with_pat(memory_type).set_ignore_pat(ignore_pat);
                for rights in [Rights::READ, Rights::EXECUTE, Rights::READ | Rights::WRITE, Rights::all()] {
                    let entry = leaf_entry(Hpa::new(0x12_4000_0000), level, rights, caching);
                    let meaning = Meaning::Leaf { address: 0x12_4000_0000, caching };
                    assert_eq!((caching.memory_type(), caching.ignore_pat()), (memory_type, ignore_pat));
                    assert_eq!(decode(entry, level, &rules(true, true, true)), meaning);
                    assert_eq!(Rights::of(entry), rights);
                }
            }
        }
    }
    let table = table_entry(Hpa::new(0x12_3456_7000));
    assert_eq!(decode(table, Level::Pd, &rules(false, false, false)), Meaning::Table(0x12_3456_7000));
}

#[test]
fn addresses_beyond_the_width_are_not_allowed() {
    let rules = rules(true, true, true);
    assert!(rules.allows_address(0xff_ffff_ffff));
    for bit in 40..64 {
        assert!(!rules.allows_address(1 << bit), "bit {bit}");
    }
}

#[test]
fn a_reflected_qualification_keeps_the_access_and_takes_the_rights_of_ept12() {
    for bit in 0..64 {
        let hardware = Qualification::from_bits_retain(1 << bit);
        for advanced in [false, true] {
            let kept = matches!(bit, 0..=2 | 7 | 8 | 12 | 16) || (advanced && matches!(bit, 9..=11));
            let expected = if kept { 1 << bit } else { 0 };
            assert_eq!(hardware.reflected(Rights::empty(), advanced).bits(), expected, "bit {bit}");
        }
    }
    let all = Qualification::from_bits_retain(u64::MAX);
    assert_eq!(all.reflected(Rights::READ | Rights::EXECUTE, false).bits(), 0x1_11af);
}
