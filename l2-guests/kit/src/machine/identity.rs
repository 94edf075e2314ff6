//! Where the guest runs, and nvmx's counters.

use super::cpu::cpuid;
use arrayvec::ArrayString;
use l2_protocol::abi::{Counter, LEAF_COUNTERS, LEAF_SIGNATURE, SIGNATURE, SNAPSHOT};

/// What is below the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// The machine itself
    Bare,
    /// nvmx
    Nvmx,
    /// Another hypervisor
    Hypervisor,
}

impl Slot {
    /// Asks CPUID.
    pub fn find() -> Self {
        let [_, b, c, d] = cpuid(LEAF_SIGNATURE, 0);
        let mut name = [0; 12];
        for (four, register) in name.chunks_exact_mut(4).zip([b, c, d]) {
            four.copy_from_slice(&register.to_le_bytes());
        }
        match cpuid(1, 0)[2] >> 31 {
            _ if name == SIGNATURE => Slot::Nvmx,
            0 => Slot::Bare,
            _ => Slot::Hypervisor,
        }
    }

    /// The word in records.
    pub fn word(self) -> &'static str {
        match self {
            Slot::Bare => "bare",
            Slot::Nvmx => "nvmx",
            Slot::Hypervisor => "hypervisor",
        }
    }
}

/// The CPU's name.
pub fn cpu_name() -> ArrayString<48> {
    let mut name = ArrayString::new();
    if cpuid(0x8000_0000, 0)[0] >= 0x8000_0004 {
        for byte in (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0)).flat_map(u32::to_le_bytes) {
            let c = char::from(byte);
            if (c.is_ascii_graphic() || c == ' ' && !name.is_empty()) && !name.ends_with("  ") {
                let _ = name.try_push(c);
            }
        }
    }
    while name.ends_with(' ') {
        name.pop();
    }
    name
}

/// The values of all counters of nvmx at one moment.
pub type Counters = [u64; Counter::ALL.len()];

/// Reads nvmx's counters: one snapshot, then value by value; the exits for this are not counted.
pub fn counters() -> Counters {
    cpuid(LEAF_COUNTERS, SNAPSHOT);
    let mut values = [0; Counter::ALL.len()];
    for (counter, value) in Counter::ALL.iter().zip(values.iter_mut()) {
        let [low, _, _, high] = cpuid(LEAF_COUNTERS, *counter as u32);
        *value = u64::from(low) | u64::from(high) << 32;
    }
    values
}
