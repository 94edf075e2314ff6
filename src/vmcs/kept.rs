//! A field of a VMCS that nvmx alone writes, together with what is in it.

use crate::vmx::{Field, FieldAccess};

/// A field, written through: a VMWRITE is executed only where another value is in the VMCS.
///
/// All accesses to the field go through its cell, so what is in the VMCS is known in this one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kept {
    field: Field,
    /// What is in the VMCS, if that is known.
    value: Option<u64>,
}

impl Kept {
    /// Nothing is known of the value.
    pub const fn new(field: Field) -> Self {
        Kept { field, value: None }
    }

    /// The field has this value from now on. Its VMCS is current.
    #[inline(always)]
    pub fn put(&mut self, vmcs: &mut impl FieldAccess, value: u64) {
        if self.value != Some(value) {
            self.value = Some(value);
            vmcs.write(self.field, value);
        }
    }

    /// The VMCS is known to have this value.
    #[inline(always)]
    pub fn holds(&self, value: u64) -> bool {
        self.value == Some(value)
    }

    /// What is in the VMCS, which is current: read if it is not known.
    #[inline(always)]
    pub fn get(&mut self, vmcs: &mut impl FieldAccess) -> u64 {
        *self.value.get_or_insert_with(|| vmcs.read(self.field))
    }

    /// The processor may give the field another value.
    #[inline(always)]
    pub fn forget(&mut self) {
        self.value = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A field that counts accesses to it.
    #[derive(Default)]
    struct One {
        value: u64,
        reads: u32,
        writes: u32,
    }

    impl FieldAccess for One {
        fn read(&mut self, field: Field) -> u64 {
            assert_eq!(field, Field::EPT_POINTER);
            self.reads += 1;
            self.value
        }

        fn write(&mut self, field: Field, value: u64) {
            assert_eq!(field, Field::EPT_POINTER);
            self.writes += 1;
            self.value = value;
        }
    }

    proptest! {
        /// What was put is in the VMCS, and is what the cell tells; a value that stays is neither written nor read again.
        #[test]
        fn the_field_has_what_was_put_and_each_value_is_written_once(
            steps in prop::collection::vec((0u8..4, 0u64..3), 1..60),
        ) {
            let (mut vmcs, mut cell) = (One::default(), Kept::new(Field::EPT_POINTER));
            let mut known = false;
            for (step, value) in steps {
                let (before, reads, writes) = (vmcs.value, vmcs.reads, vmcs.writes);
                match step {
                    0 | 1 => {
                        cell.put(&mut vmcs, value);
                        prop_assert_eq!(vmcs.value, value);
                        prop_assert_eq!(vmcs.writes - writes, u32::from(!known || before != value));
                        known = true;
                    }
                    2 => {
                        prop_assert_eq!(cell.get(&mut vmcs), before);
                        prop_assert_eq!((vmcs.reads - reads, vmcs.writes), (u32::from(!known), writes));
                        known = true;
                    }
                    _ => {
                        cell.forget();
                        vmcs.value = value;
                        known = false;
                    }
                }
            }
        }
    }
}
