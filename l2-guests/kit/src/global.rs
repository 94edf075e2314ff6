//! Shared state of an image that runs on one CPU.

use core::cell::Cell;

/// A static variable: whole values go in and out, so that no reference to it lives across a trap.
pub struct Global<T>(Cell<T>);

// SAFETY: a guest runs on one CPU (see the crate's text), so no two threads ever share the cell.
unsafe impl<T> Sync for Global<T> {}

impl<T: Copy> Global<T> {
    /// A variable with its first value.
    pub const fn new(value: T) -> Self {
        Self(Cell::new(value))
    }

    /// The value.
    pub fn get(&self) -> T {
        self.0.get()
    }

    /// Sets the value.
    pub fn set(&self, value: T) {
        self.0.set(value);
    }

    /// Sets the value and returns the one before.
    pub fn replace(&self, value: T) -> T {
        self.0.replace(value)
    }
}
