//! Definitions of VMX without state.

pub mod field;

pub use field::Field;
