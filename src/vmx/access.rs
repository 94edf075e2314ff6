//! Access to the fields of a VMCS.

use super::field::Field;

/// Reading and writing the fields of a VMCS, by instructions or in its image.
pub trait FieldAccess {
    /// Reads a field.
    fn read(&mut self, field: Field) -> u64;
    /// Writes a field.
    fn write(&mut self, field: Field, value: u64);
}
