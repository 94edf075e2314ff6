//! The fuzzer's bytes as a source of values; zeros once they are used up.
#![allow(dead_code, reason = "each target takes what it needs")]

/// What is left of the input.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }

    pub fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.u8()) % from.len()]
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        u64::from(self.u16()) % end
    }

    /// A word that is often small or at an edge.
    pub fn word(&mut self) -> u64 {
        match self.u8() % 6 {
            0 => u64::from(self.u8()),
            1 => 1 << (self.u8() % 64),
            2 => u64::MAX << (self.u8() % 64),
            3 => u64::from(self.u32()),
            4 => u64::from(self.u16()) << 12,
            _ => self.u64(),
        }
    }
}
