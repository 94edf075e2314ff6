//! What L2 is offered: never more than the hardware has, never what nvmx does not implement, and always consistent.

mod core_support;

use core_support::{rich, rich_msr};
use nvmx::rules::caps::{self, offered};
use nvmx::vmx::bitmap::{Access, is_shadowed};
use nvmx::vmx::caps::{Allowed, Capabilities, Misc, msr};
use nvmx::vmx::controls::Controls;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::requirements::REQUIREMENTS;
use nvmx::vmx::{
    EntryControls, ExitControls, Field, PinControls, PrimaryControls, SecondaryControls, TertiaryControls,
};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// A machine whose controls may be 1 as `may` says, or are of the default1 class; those of the class in `ones` must be 1 by the TRUE
/// MSRs as well.
fn machine(may: [u32; 5], ones: [u32; 5], misc: u64, ept_vpid: u64, basic: u64) -> Capabilities {
    let allowed = |default1: u32, i: usize| {
        let may = may[i] | default1;
        u64::from(may) << 32 | u64::from(ones[i] & default1)
    };
    let plain = |default1: u32, i: usize| allowed(default1, i) | u64::from(default1);
    let read = |index| match index {
        msr::IA32_VMX_BASIC => basic,
        msr::IA32_VMX_PINBASED_CTLS => plain(PinControls::DEFAULT1, 0),
        msr::IA32_VMX_PROCBASED_CTLS => plain(PrimaryControls::DEFAULT1, 1),
        msr::IA32_VMX_EXIT_CTLS => plain(ExitControls::DEFAULT1, 3),
        msr::IA32_VMX_ENTRY_CTLS => plain(EntryControls::DEFAULT1, 4),
        msr::IA32_VMX_TRUE_PINBASED_CTLS => allowed(PinControls::DEFAULT1, 0),
        msr::IA32_VMX_TRUE_PROCBASED_CTLS => allowed(PrimaryControls::DEFAULT1, 1),
        msr::IA32_VMX_TRUE_EXIT_CTLS => allowed(ExitControls::DEFAULT1, 3),
        msr::IA32_VMX_TRUE_ENTRY_CTLS => allowed(EntryControls::DEFAULT1, 4),
        msr::IA32_VMX_PROCBASED_CTLS2 => allowed(0, 2),
        msr::IA32_VMX_MISC => misc,
        msr::IA32_VMX_EPT_VPID_CAP => ept_vpid,
        msr::IA32_VMX_PROCBASED_CTLS3 => misc.rotate_left(7),
        other => rich_msr(other),
    };
    Capabilities::read(read, 39, 48)
}

fn machines() -> impl Strategy<Value = Capabilities> {
    (any::<[u32; 5]>(), any::<[u32; 5]>(), any::<u64>(), any::<u64>(), any::<u64>())
        .prop_map(|(may, ones, misc, ept_vpid, basic)| machine(may, ones, misc, ept_vpid, basic))
}

fn implemented<C: Controls>(table: &[caps::Offer<C>]) -> u32 {
    table.iter().fold(0, |bits, offer| bits | offer.control.bits())
}

fn subset<C: Controls>(offered: Allowed<C>, hardware: Allowed<C>, implemented: u32, value: u32) {
    assert_eq!(offered.must_be_one() & !offered.may_be_one(), 0, "{}: a bit must be 1 and may not", C::MSR);
    assert_eq!(hardware.must_be_one() & !offered.must_be_one(), 0, "{}: hardware needs the bit", C::MSR);
    assert_eq!(offered.may_be_one() & !hardware.may_be_one(), 0, "{}: hardware has not the bit", C::MSR);
    let selectable = offered.may_be_one() & !offered.must_be_one();
    assert_eq!(selectable & !implemented, 0, "{}: a choice that nvmx does not implement", C::MSR);
    // The sharpest form: what L2 may write, the processor accepts.
    let candidate = value & offered.may_be_one() | offered.must_be_one();
    assert!(offered.accepts(candidate) && hardware.accepts(candidate), "{}: {candidate:#x}", C::MSR);
}

proptest! {
    #[test]
    fn offered_is_a_subset_of_hardware_and_of_what_is_implemented(hw in machines(), value in any::<u32>()) {
        let o = offered(&hw);
        subset(o.pin, hw.pin, implemented(caps::PIN), value);
        subset(o.primary, hw.primary, implemented(caps::PRIMARY), value);
        subset(o.secondary, hw.secondary, implemented(caps::SECONDARY), value);
        subset(o.exit, hw.exit, implemented(caps::EXIT), value);
        subset(o.entry, hw.entry, implemented(caps::ENTRY), value);
        prop_assert_eq!(o.ept_vpid.0 & !(hw.ept_vpid.0 & caps::EPT_VPID), 0);
        prop_assert_eq!(o.misc.0 & !(caps::MISC | 0x1FF << 16), 0);
        prop_assert!(o.misc.cr3_targets() <= hw.misc.cr3_targets().min(4));
    }

    #[test]
    fn original_msrs_report_default1_bits_as_fixed(hw in machines()) {
        fn fixed<C: Controls>(original: Allowed<C>, true_one: Allowed<C>) {
            assert_eq!(original.must_be_one() & C::DEFAULT1, C::DEFAULT1, "{}", C::MSR);
            assert_eq!(original.may_be_one(), true_one.may_be_one(), "{}", C::MSR);
        }
        let o = offered(&hw);
        fixed(o.pin_default, o.pin);
        fixed(o.primary_default, o.primary);
        fixed(o.exit_default, o.exit);
        fixed(o.entry_default, o.entry);
    }

    #[test]
    fn what_is_offered_reads_back_through_its_msrs(hw in machines()) {
        let o = offered(&hw);
        let read = |index| o.msr(index).unwrap_or_else(|| panic!("reads an MSR that it does not have: {index:#x}"));
        let again = Capabilities::read(read, o.physical_width, o.linear_width);
        prop_assert_eq!(again, o);
    }

    #[test]
    fn offering_again_changes_nothing(hw in machines()) {
        // An nvmx in L2 offers its own guest the same machine.
        let once = offered(&hw);
        prop_assert_eq!(offered(&once), once);
    }

    #[test]
    fn no_field_is_offered_that_hardware_has_not(hw in machines()) {
        let o = offered(&hw);
        for &field in Field::ALL {
            prop_assert!(!o.has_field(field) || hw.has_field(field), "{}", field);
            for access in [Access::Read, Access::Write] {
                prop_assert!(!is_shadowed(field, access, &o) || o.has_field(field), "{}", field);
            }
        }
        let highest = Field::ALL.iter().filter(|f| o.has_field(**f)).map(|f| f.encoding() & 0x3FE).max();
        prop_assert_eq!(o.vmcs_enum, u64::from(highest.unwrap_or(0)));
    }

    #[test]
    fn dependent_features_come_together(hw in machines()) {
        let o = offered(&hw);
        let ept = o.secondary.allows(SecondaryControls::ENABLE_EPT);
        prop_assert!(ept || !o.secondary.allows(SecondaryControls::UNRESTRICTED_GUEST));
        prop_assert!(ept || o.ept_vpid.0 as u32 == 0);
        let mode_based = o.secondary.allows(SecondaryControls::MODE_BASED_EXECUTE_CONTROL);
        prop_assert!(ept && o.ept_vpid.advanced_exit_information() || !mode_based);
        prop_assert!(ept || !o.secondary.allows(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS));
        let log = o.secondary.allows(SecondaryControls::ENABLE_PML);
        prop_assert!(!log || o.ept_vpid.accessed_dirty(), "a log of flags that do not exist");
        prop_assert!(o.secondary.allows(SecondaryControls::ENABLE_VPID) || o.ept_vpid.0 >> 32 == 0);
        let timer = o.pin.allows(PinControls::PREEMPTION_TIMER);
        prop_assert_eq!(timer, o.exit.allows(ExitControls::SAVE_PREEMPTION_TIMER));
        let activates = o.primary.allows(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS);
        prop_assert_eq!(activates, !o.tertiary.is_empty());
        prop_assert!(hw.tertiary.contains(o.tertiary));
        // The exit's part is done by an entry.
        for (exit, entry) in [
            (ExitControls::LOAD_CET, EntryControls::LOAD_CET),
            (ExitControls::LOAD_PKRS, EntryControls::LOAD_PKRS),
            (ExitControls::CLEAR_UINV, EntryControls::LOAD_UINV),
        ] {
            prop_assert!(!o.exit.allows(exit) || hw.entry.allows(entry), "{:?}", exit);
        }
    }
}

#[test]
fn a_rich_machine_offers_all_that_is_implemented() {
    let o = offered(&rich());
    assert_eq!(o.pin.may_be_one(), implemented(caps::PIN) | PinControls::DEFAULT1);
    assert_eq!(o.primary.may_be_one(), implemented(caps::PRIMARY) | PrimaryControls::DEFAULT1);
    assert_eq!(o.secondary.may_be_one(), implemented(caps::SECONDARY));
    assert_eq!(o.exit.may_be_one(), implemented(caps::EXIT) | ExitControls::DEFAULT1);
    assert_eq!(o.entry.may_be_one(), implemented(caps::ENTRY) | EntryControls::DEFAULT1);
    assert_eq!(o.ept_vpid.0, caps::EPT_VPID);
}

#[test]
fn what_nvmx_does_not_implement_is_withheld() {
    let o = offered(&rich());
    let secondary = SecondaryControls::PASID_TRANSLATION | SecondaryControls::ENABLE_PCONFIG;
    let exit = ExitControls::CLEAR_LBR_CTL | ExitControls::CLEAR_BNDCFGS;
    let entry = EntryControls::LOAD_LBR_CTL | EntryControls::ENTRY_TO_SMM;
    assert_eq!(o.tertiary, TertiaryControls::VIRTUALIZE_SPEC_CTRL);
    assert_eq!(o.secondary.may_be_one() & secondary.bits(), 0);
    assert_eq!(o.exit.may_be_one() & exit.bits(), 0);
    assert_eq!(o.entry.may_be_one() & entry.bits(), 0);
    assert!(!o.ept_vpid.supervisor_shadow_stack());
    assert!(o.misc.activity_shutdown() && o.misc.activity_wait_for_sipi());
    assert!(!o.misc.pt_in_vmx() && !o.misc.smbase_msr());
}

#[test]
fn counters_are_switched_only_by_all_controls_and_where_there_are_counters() {
    let (entry, exit) = (1u32 << 13, 1u32 << 12 | 1 << 30);
    let of = |hw: &Capabilities| (offered(hw).entry.may_be_one() & entry, offered(hw).exit.may_be_one() & exit);
    assert_eq!(of(&rich()), (entry, exit));
    assert_eq!(of(&Capabilities { counters: 0, ..rich() }), (0, 0));
    for lost in [(entry, 0), (0, 1u32 << 12), (0, 1 << 30)] {
        let msr = |index| match index {
            msr::IA32_VMX_TRUE_ENTRY_CTLS => rich_msr(index) & !(u64::from(lost.0) << 32),
            msr::IA32_VMX_TRUE_EXIT_CTLS => rich_msr(index) & !(u64::from(lost.1) << 32),
            other => rich_msr(other),
        };
        let hw = Capabilities { counters: rich().counters, ..Capabilities::read(msr, 39, 48) };
        assert_eq!(of(&hw), (0, 0), "{lost:?}");
    }
}

#[test]
fn vm_functions_are_those_that_hardware_has_and_nvmx_implements_and_need_ept() {
    let with = |vmfunc, secondary| {
        let read = |index| match index {
            msr::IA32_VMX_VMFUNC => vmfunc,
            msr::IA32_VMX_PROCBASED_CTLS2 => rich_msr(index) & !(u64::from(secondary) << 32),
            other => rich_msr(other),
        };
        let o = offered(&Capabilities::read(read, 39, 48));
        (o.secondary.allows(SecondaryControls::ENABLE_VM_FUNCTIONS), o.msr(msr::IA32_VMX_VMFUNC))
    };
    assert_eq!(with(u64::MAX, 0u32), (true, Some(caps::VMFUNC)));
    assert_eq!(with(!1, 0), (false, None), "no function that nvmx implements");
    assert_eq!(with(1, 1 << 13), (false, None), "nothing would exit");
    assert_eq!(with(1, 1 << 1), (false, None), "no EPT to switch");
}

#[test]
fn regions_are_nvmx_s_own() {
    let o = offered(&rich());
    assert_eq!(o.basic.revision(), REVISION);
    assert_eq!(REVISION >> 31, 0, "bit 31 marks a shadow VMCS");
    assert_eq!((o.basic.region_size(), o.basic.memory_type()), (4096, 6));
    assert!(!o.basic.addresses_limited_to_32_bits());
}

#[test]
fn without_true_msrs_the_original_ones_rule_and_the_true_ones_do_not_exist() {
    let basic = rich_msr(msr::IA32_VMX_BASIC) & !(1 << 55);
    let hw = Capabilities::read(
        |index| match index {
            msr::IA32_VMX_BASIC => basic,
            msr::IA32_VMX_TRUE_PINBASED_CTLS..=msr::IA32_VMX_TRUE_ENTRY_CTLS => panic!("#GP: {index:#x}"),
            other => rich_msr(other),
        },
        39,
        48,
    );
    assert_eq!(
        (hw.pin, hw.primary, hw.exit, hw.entry),
        (hw.pin_default, hw.primary_default, hw.exit_default, hw.entry_default)
    );
    let o = offered(&hw);
    for index in msr::IA32_VMX_TRUE_PINBASED_CTLS..=msr::IA32_VMX_TRUE_ENTRY_CTLS {
        assert_eq!(o.msr(index), None);
    }
    assert_eq!(o.primary.must_be_one() & 1 << 15, 1 << 15, "CR3-load exiting cannot be turned off there");
}

#[test]
fn every_row_says_how() {
    fn rows<C: Controls>(table: &[caps::Offer<C>]) {
        let mut seen = 0;
        for offer in table {
            assert_eq!(offer.control.bits().count_ones(), 1);
            assert_eq!(seen & offer.control.bits(), 0, "{}: bit listed twice", C::MSR);
            seen |= offer.control.bits();
            assert!(!offer.how.is_empty());
        }
    }
    rows(caps::PIN);
    rows(caps::PRIMARY);
    rows(caps::SECONDARY);
    rows(caps::EXIT);
    rows(caps::ENTRY);
}

#[test]
fn a_rich_machine_meets_every_requirement() {
    assert_eq!(rich().missing_requirements().collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn each_requirement_is_named_when_its_msr_bit_is_missing() {
    // What must be taken from which MSR for the requirement with this text to fail.
    let cases: &[(&str, u32, u64)] = &[
        ("virtual NMIs", msr::IA32_VMX_TRUE_PINBASED_CTLS, 1 << 37),
        ("NMI-window", msr::IA32_VMX_TRUE_PROCBASED_CTLS, 1 << 54),
        ("MSR bitmaps", msr::IA32_VMX_TRUE_PROCBASED_CTLS, 1 << 60),
        ("secondary processor-based", msr::IA32_VMX_TRUE_PROCBASED_CTLS, 1 << 63),
        ("extended page tables", msr::IA32_VMX_PROCBASED_CTLS2, 1 << 33),
        ("virtual-processor identifiers", msr::IA32_VMX_PROCBASED_CTLS2, 1 << 37),
        ("unrestricted guest", msr::IA32_VMX_PROCBASED_CTLS2, 1 << 39),
        ("4 levels", msr::IA32_VMX_EPT_VPID_CAP, 1 << 6),
        ("write-back EPT", msr::IA32_VMX_EPT_VPID_CAP, 1 << 14),
        ("INVEPT of a single", msr::IA32_VMX_EPT_VPID_CAP, 1 << 25),
        ("INVEPT of all", msr::IA32_VMX_EPT_VPID_CAP, 1 << 26),
        ("INVVPID of a single", msr::IA32_VMX_EPT_VPID_CAP, 1 << 41),
        ("INVVPID of all", msr::IA32_VMX_EPT_VPID_CAP, 1 << 42),
        ("64-bit host", msr::IA32_VMX_TRUE_EXIT_CTLS, 1 << 41),
        ("PAT saved", msr::IA32_VMX_TRUE_EXIT_CTLS, 1 << 50),
        ("EFER saved", msr::IA32_VMX_TRUE_EXIT_CTLS, 1 << 53),
        ("IA-32e mode", msr::IA32_VMX_TRUE_ENTRY_CTLS, 1 << 41),
        ("PAT loaded", msr::IA32_VMX_TRUE_ENTRY_CTLS, 1 << 46),
        ("EFER loaded", msr::IA32_VMX_TRUE_ENTRY_CTLS, 1 << 47),
        ("write-back memory type", msr::IA32_VMX_BASIC, 6 << 50),
    ];
    let mut named = BTreeSet::new();
    for &(text, index, bits) in cases {
        let hw = Capabilities::read(|i| if i == index { rich_msr(i) & !bits } else { rich_msr(i) }, 39, 48);
        let missing: Vec<_> = hw.missing_requirements().collect();
        assert!(missing.iter().any(|line| line.contains(text)), "{text}: {missing:?}");
        named.extend(missing);
    }
    for (text, bit) in [("4096", 1 << 44 | 1 << 32), ("above 4 GiB", 1 << 48)] {
        let basic = rich_msr(msr::IA32_VMX_BASIC) | bit;
        let hw = Capabilities::read(|i| if i == msr::IA32_VMX_BASIC { basic } else { rich_msr(i) }, 39, 48);
        let missing: Vec<_> = hw.missing_requirements().collect();
        assert!(missing.len() == 1 && missing[0].contains(text), "{text}: {missing:?}");
        named.extend(missing);
    }
    let all: BTreeSet<_> = REQUIREMENTS.iter().map(|r| r.text).collect();
    assert_eq!(named, all, "a requirement without a case here");
    assert!(all.iter().all(|text| text.contains("IA32_VMX_")), "each line names its MSR");
}

#[test]
fn msrs_that_only_exist_with_a_feature_are_not_read_without_it() {
    let no_secondary = |index| match index {
        msr::IA32_VMX_TRUE_PROCBASED_CTLS => rich_msr(index) & !(1 << 63),
        msr::IA32_VMX_PROCBASED_CTLS2 | msr::IA32_VMX_EPT_VPID_CAP | msr::IA32_VMX_VMFUNC => panic!("#GP: {index:#x}"),
        other => rich_msr(other),
    };
    let hw = Capabilities::read(no_secondary, 39, 48);
    assert!(!hw.has_secondary_controls());
    assert_eq!(hw.msr(msr::IA32_VMX_PROCBASED_CTLS2), None);
    assert_eq!(hw.msr(msr::IA32_VMX_EPT_VPID_CAP), None);
    assert!(!hw.has_field(Field::EPT_POINTER) && hw.has_field(Field::GUEST_RIP));
    assert_eq!(hw.msr(msr::IA32_VMX_BASIC - 1), None);
    assert_eq!(hw.msr(msr::LAST), None);
}

#[test]
fn addresses_and_registers_are_judged_by_the_machine_s_widths() {
    let hw = rich();
    assert!(hw.is_physical((1 << 39) - 1) && !hw.is_physical(1 << 39));
    for (address, canonical) in [
        (0, true),
        (0x0000_7FFF_FFFF_FFFF, true),
        (0x0000_8000_0000_0000, false),
        (0xFFFF_7FFF_FFFF_FFFF, false),
        (0xFFFF_8000_0000_0000, true),
        (u64::MAX, true),
    ] {
        assert_eq!(hw.is_canonical(address), canonical, "{address:#x}");
    }
    let wide = Capabilities { linear_width: 57, ..hw };
    assert!(wide.is_canonical(0x00FF_FFFF_FFFF_FFFF) && !wide.is_canonical(0x0100_0000_0000_0000));
    assert!(hw.cr0_ok(0x8000_0021) && !hw.cr0_ok(0x8000_0020) && !hw.cr0_ok(0x1_8000_0021));
    assert!(hw.cr4_ok(0x2000) && !hw.cr4_ok(0) && !hw.cr4_ok(0x2000 | 1 << 63));
}

#[test]
fn miscellaneous_data_is_read_by_its_bits() {
    let misc = Misc(7 | 3 << 16 | 2 << 25);
    assert_eq!((misc.preemption_timer_shift(), misc.cr3_targets(), misc.max_msr_list()), (7, 3, 1536));
    assert_eq!(u64::from(offered(&rich()).misc.max_msr_list()), nvmx::vmcs::msr_lists::MAX_ENTRIES);
    for (bits, supported) in [(0, 0b0001), (1 << 6, 0b0011), (1 << 7, 0b0101), (1 << 8, 0b1001)] {
        for state in 0..4 {
            assert_eq!(Misc(bits).supports_activity(state), supported >> state & 1 == 1, "{bits:#x} {state}");
        }
    }
    assert!(!Misc(u64::MAX).supports_activity(4));
}
