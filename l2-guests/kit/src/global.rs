//! State of an image that no two CPUs use at the same time.

use core::cell::Cell;

/// A static variable: whole values go in and out, so that no reference to it lives across a trap.
pub struct Global<T>(Cell<T>);

// SAFETY: a guest runs on one CPU, or lets no two CPUs use a variable at the same time unless all of them only read it.
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
