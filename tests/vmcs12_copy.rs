//! nvmx's copy of a vmcs12: sets of fields, the page in L2's memory, and which values are whose.

use nvmx::addr::Gpa;
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, NotOwned, Span};
use nvmx::vmcs::vmcs12::{FieldSet, Vmcs12};
use nvmx::vmx::Field;
use nvmx::vmx::field::Home;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

const OWN: Span = Span::new(0x3000, 0x4000);
const REGION: Gpa = Gpa::new(0x1000);

fn guest(page: &[u8]) -> GuestMemory<VecMem> {
    let mut bytes = vec![0; 0x5000];
    bytes[0x1000..0x1000 + page.len()].copy_from_slice(page);
    GuestMemory::new(VecMem::from_bytes(bytes), OWN, 36)
}

fn any_field() -> impl Strategy<Value = Field> {
    (0..Field::COUNT).prop_map(|i| Field::ALL[i])
}

fn members(set: FieldSet) -> Vec<Field> {
    Field::ALL.iter().copied().filter(|f| set.contains(*f)).collect()
}

/// Bits that a field has by its encoding (SDM vol. 3C, table "Structure of VMCS Component Encoding": bits 14:13).
fn width_mask(field: Field) -> u64 {
    match field as u32 >> 13 & 3 {
        0 => 0xFFFF,
        2 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

proptest! {
    #[test]
    fn a_field_set_is_a_set(changes in prop::collection::vec((any_field(), any::<bool>()), 0..300)) {
        let (mut set, mut model) = (FieldSet::EMPTY, HashSet::new());
        for (field, insert) in changes {
            if insert {
                set.insert(field);
                model.insert(field);
            } else {
                set.remove(field);
                model.remove(&field);
            }
            prop_assert_eq!(set.is_empty(), model.is_empty());
        }
        let mut expected: Vec<_> = model.into_iter().collect();
        expected.sort_by_key(|f| f.index());
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), expected.clone());
        prop_assert_eq!(members(set), expected);
    }

    #[test]
    fn what_is_stored_is_loaded_again(values in prop::collection::vec(any::<u64>(), Field::COUNT), launched: bool, exits in 1u64..) {
        let memory = guest(&[]);
        let mut stored = Vmcs12::new();
        for (field, value) in Field::ALL.iter().zip(&values) {
            stored.fetched(*field, *value);
        }
        stored.exits = if launched { exits } else { 0 };
        prop_assert_eq!(stored.store(&memory, REGION), Ok(()));

        let mut loaded = Vmcs12::new();
        prop_assert_eq!(loaded.load(&memory, REGION), Ok(()));
        prop_assert_eq!(loaded.is_launched(), launched);
        for (field, value) in Field::ALL.iter().zip(&values) {
            prop_assert_eq!(loaded.get(*field), value & width_mask(*field), "{}", field);
        }
        let outside = |at, len| memory.phys().bytes(at, len).iter().all(|byte| *byte == 0);
        prop_assert!(outside(0, 0x1000) && outside(0x2000, 0x3000), "only the page of the region is written");
    }

    #[test]
    fn a_page_with_any_content_loads_to_values_of_the_fields_widths(page in prop::collection::vec(any::<u8>(), 4096)) {
        let mut vmcs12 = Vmcs12::new();
        prop_assert_eq!(vmcs12.load(&guest(&page), REGION), Ok(()));
        for &field in Field::ALL {
            prop_assert_eq!(vmcs12.get(field) & !width_mask(field), 0, "{}", field);
        }
        // Whatever the page says: no field is missing, and vmcs02 must get all that live there.
        let in_vmcs02: Vec<_> = Field::ALL.iter().copied().filter(|f| f.home() != Home::Cache).collect();
        prop_assert_eq!(members(vmcs12.valid), Field::ALL.to_vec());
        prop_assert_eq!(members(vmcs12.dirty), in_vmcs02);
    }

    /// The copy against a map: a written value counts until vmcs02 has it, a fetched one is never pending.
    #[test]
    fn writes_are_pending_and_fetches_are_not(
        steps in prop::collection::vec((any_field(), any::<u64>(), 0u8..3), 0..200),
    ) {
        let mut vmcs12 = Vmcs12::new();
        let (mut values, mut dirty) = (HashMap::new(), HashSet::new());
        let mut valid: HashSet<_> = Field::ALL.iter().copied().filter(|f| f.home() == Home::Cache).collect();
        for (field, value, step) in steps {
            match step {
                0 => vmcs12.set(field, value),
                1 => vmcs12.fetched(field, value),
                _ => vmcs12.written(field, value),
            }
            values.insert(field, value & width_mask(field));
            if step > 0 {
                valid.insert(field);
            }
            if step > 1 {
                dirty.insert(field);
            }
        }
        for &field in Field::ALL {
            prop_assert_eq!(vmcs12.get(field), values.get(&field).copied().unwrap_or(0));
            prop_assert_eq!(vmcs12.valid.contains(field), valid.contains(&field), "{} valid", field);
            prop_assert_eq!(vmcs12.dirty.contains(field), dirty.contains(&field), "{} dirty", field);
        }
    }
}

#[test]
fn cached_are_exactly_the_fields_whose_home_is_the_copy() {
    for &field in Field::ALL {
        assert_eq!(FieldSet::CACHED.contains(field), field.home() == Home::Cache, "{field}");
    }
    assert!(!FieldSet::CACHED.is_empty());
}

#[test]
fn a_new_vmcs12_is_clear_and_owes_vmcs02_nothing() {
    let vmcs12 = Vmcs12::new();
    assert!(!vmcs12.is_launched() && vmcs12.dirty.is_empty() && vmcs12.valid == FieldSet::CACHED);
    assert!(Field::ALL.iter().all(|f| vmcs12.get(*f) == 0));
}

#[test]
fn the_launch_state_is_one_value_of_its_word_and_nothing_else() {
    for (word, launched) in [(0u64, false), (1, true), (2, false), (3, false), (u64::MAX, false), (1 << 32, false)] {
        let mut page = [0; 16];
        page[8..].copy_from_slice(&word.to_le_bytes());
        let mut vmcs12 = Vmcs12::new();
        assert_eq!(vmcs12.load(&guest(&page), REGION), Ok(()));
        assert_eq!(vmcs12.is_launched(), launched, "{word:#x}");
    }
}

#[test]
fn clearing_a_region_changes_its_launch_state_alone() {
    let memory = guest(&[0xFF; 4096]);
    assert_eq!(Vmcs12::clear_region(&memory, REGION), Ok(()));
    let page = memory.phys().bytes(0x1000, 4096);
    assert_eq!(page[8..16], [0; 8]);
    assert!(page[..8].iter().chain(&page[16..]).all(|byte| *byte == 0xFF));
}

#[test]
fn the_revision_is_the_first_word_with_the_shadow_indicator() {
    assert_eq!(Vmcs12::revision(&guest(&[0x78, 0x6D, 0x76, 0xEE, 9, 9, 9, 9]), REGION), Ok(0xEE76_6D78));
}

#[test]
fn storing_keeps_revision_and_abort_indicator() {
    let memory = guest(&[7; 16]);
    assert_eq!(Vmcs12::new().store(&memory, REGION), Ok(()));
    assert_eq!(memory.phys().bytes(0x1000, 8), [7; 8]);
}

#[test]
fn nvmx_s_own_memory_is_neither_read_nor_written() {
    let memory = guest(&[]);
    let own = Gpa::new(OWN.start());
    let mut vmcs12 = Vmcs12::new();
    vmcs12.fetched(Field::GUEST_RIP, 1);
    assert_eq!(Vmcs12::revision(&memory, own), Err(NotOwned(own)));
    assert!(vmcs12.load(&memory, own).is_err());
    assert!(vmcs12.store(&memory, own).is_err());
    assert!(Vmcs12::clear_region(&memory, own).is_err());
    assert_eq!(memory.phys().bytes(OWN.start(), 0x1000), vec![0; 0x1000]);
}
