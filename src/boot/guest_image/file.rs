//! A boot module as a file: reads that cannot leave it.

use crate::{
    addr::Hpa,
    mm::{PhysMem, Span},
};

/// The bytes of a module where the loader put them.
#[derive(Clone, Copy, Debug)]
pub struct File<'a, M> {
    memory: &'a M,
    span: Span,
}

impl<'a, M: PhysMem> File<'a, M> {
    /// The module at `span`.
    pub const fn new(memory: &'a M, span: Span) -> Self {
        Self { memory, span }
    }

    /// Bytes.
    pub const fn len(&self) -> u64 {
        self.span.len()
    }

    /// `N` bytes at `offset`, if the file has them.
    pub fn bytes<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let end = offset.checked_add(N as u64)?;
        if end > self.len() {
            return None;
        }
        let mut bytes = [0; N];
        self.memory.read_bytes(Hpa::new(self.span.start().checked_add(offset)?), &mut bytes);
        Some(bytes)
    }

    /// A little-endian 16-bit value.
    pub fn u16(&self, offset: u64) -> Option<u16> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    /// A little-endian 32-bit value.
    pub fn u32(&self, offset: u64) -> Option<u32> {
        self.bytes(offset).map(u32::from_le_bytes)
    }

    /// A little-endian 64-bit value.
    pub fn u64(&self, offset: u64) -> Option<u64> {
        self.bytes(offset).map(u64::from_le_bytes)
    }
}
