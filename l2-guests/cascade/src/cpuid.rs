//! What the guests see of CPUID: the CPU's answers, asked for once.
//!
//! A hypervisor that executes CPUID to answer CPUID pays twice as soon as it is nested itself; so those that people use
//! keep a table, and so does this one.

use l2_kit::{arrayvec::ArrayVec, cpu};

/// Leaf, subleaf and EAX, EBX, ECX, EDX.
type Entry = ((u32, u32), [u32; 4]);

/// The leaves asked for so far.
#[derive(Default)]
pub struct Leaves(ArrayVec<Entry, 32>);

impl Leaves {
    /// EAX, EBX, ECX, EDX of a leaf.
    pub fn answer(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        if let Some((_, registers)) = self.0.iter().find(|(key, _)| *key == (leaf, subleaf)) {
            return *registers;
        }
        let registers = cpu::cpuid(leaf, subleaf);
        // With the table full a leaf is asked for each time.
        let _ = self.0.try_push(((leaf, subleaf), registers));
        registers
    }
}
