//! Checks that nvmx does not run again after a write of L2 would have had the same result as before.

mod core_support;

use core_support::{APIC_PAGES, Vmcs, rich, valid_vmcs12};
use nvmx::addr::Hpa;
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{check_cached_controls, check_host, host_field_holds};
use nvmx::rules::merge::{NvmxNeeds, Translated, Vmcs02Controls, merge};
use nvmx::vmcs::stale::Stale;
use nvmx::vmx::field::Home;
use nvmx::vmx::{Capabilities, Field, Fields, PrimaryControls};
use proptest::prelude::*;

const TO: Translated = Translated {
    io_bitmaps: Some((Hpa::new(0xA000), Hpa::new(0xB000))),
    msr_bitmap: Some(Hpa::new(0xC000)),
    apic: APIC_PAGES,
    shadow_bitmaps: Some((Hpa::new(0xD000), Hpa::new(0xE000))),
};

fn outcome(v: &Vmcs, hw: &Capabilities) -> Option<Vmcs02Controls> {
    check_cached_controls(v, &offered(hw)).ok().map(|checked| merge(&NvmxNeeds::new(hw), v, checked, &TO))
}

fn with(v: &Vmcs, field: Field, value: u64) -> Vmcs {
    let mut changed = v.clone();
    changed.set(field, value & field.mask());
    changed
}

/// Values near what fields hold: a bit flipped, or anything.
fn values() -> impl Strategy<Value = (u64, u32)> {
    (any::<u64>(), 0u32..64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_group_that_a_field_does_not_belong_to_does_not_look_at_it((anything, bit) in values()) {
        let hw = rich();
        let caps = offered(&hw);
        let valid = valid_vmcs12(&caps);
        let (merged, host) = (outcome(&valid, &hw), check_host(&valid, &caps, true));
        for &field in Field::ALL {
            for value in [anything, valid.get(field) ^ 1 << bit] {
                let v = with(&valid, field, value);
                let stale = Stale::of(field);
                if !stale.contains(Stale::CONTROLS) {
                    prop_assert_eq!(outcome(&v, &hw), merged, "{}", field);
                }
                if !stale.contains(Stale::HOST) {
                    prop_assert_eq!(check_host(&v, &caps, true), host, "{}", field);
                }
            }
        }
    }

    #[test]
    fn a_host_field_that_holds_alone_keeps_the_host_state_good((anything, bit) in values()) {
        let caps = offered(&rich());
        let valid = valid_vmcs12(&caps);
        let mut settled = 0;
        for &field in Field::ALL {
            for value in [anything, valid.get(field) ^ 1 << bit] {
                let good = check_host(&with(&valid, field, value), &caps, true).is_ok();
                let holds = host_field_holds(field, value & field.mask(), &caps);
                prop_assert!(good || !holds, "{field} = {value:#x}");
                settled += u32::from(holds);
            }
        }
        prop_assert!(settled > 0);
    }

    #[test]
    fn primary_controls_that_are_followed_are_what_a_merge_makes_of_them(changed: u32, bit in 0u32..32) {
        let hw = rich();
        let caps = offered(&hw);
        let valid = valid_vmcs12(&caps);
        let old = valid.get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32;
        for new in [old ^ changed, old ^ 1 << bit] {
            let mut followed = outcome(&valid, &hw).unwrap();
            let words = [old, new].map(PrimaryControls::from_bits_retain);
            let merged = outcome(&with(&valid, Field::CPU_BASED_VM_EXEC_CONTROL, new.into()), &hw);
            if followed.follow(words[0], words[1], &caps) {
                prop_assert_eq!(Some(followed), merged);
            } else {
                prop_assert_eq!(Some(followed), outcome(&valid, &hw), "untouched");
            }
        }
    }
}

#[test]
fn an_interrupt_window_is_followed() {
    let hw = rich();
    let mut merged = outcome(&valid_vmcs12(&offered(&hw)), &hw).unwrap();
    let (old, window) = (merged.primary, PrimaryControls::INTERRUPT_WINDOW_EXITING);
    assert!(merged.follow(old, old ^ window, &offered(&hw)));
    assert_eq!(merged.primary, old ^ window);
}

#[test]
fn what_lives_in_vmcs02_is_the_processor_s_to_check() {
    for &field in Field::ALL {
        let expected = match field.home() {
            Home::Vmcs02 => Stale::empty(),
            Home::Watched => Stale::GUEST,
            Home::Cache => continue,
        };
        assert_eq!(Stale::of(field), expected, "{field}");
    }
}
