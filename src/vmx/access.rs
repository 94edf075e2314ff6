//! Access to the fields of a VMCS.

use super::field::Field;

/// Reading and writing the fields of a VMCS, by instructions or in its image.
pub trait FieldAccess {
    /// Reads a field.
    fn read(&mut self, field: Field) -> u64;
    /// Writes a field.
    fn write(&mut self, field: Field, value: u64);
    /// This way takes one write less than the other: where writes are counted together, so that the count is the same for both.
    #[inline(always)]
    fn one_less(&mut self) {}
}
