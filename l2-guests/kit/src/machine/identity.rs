//! Where the guest runs, and nvmx's counters.

use super::cpu::cpuid;
use arrayvec::{ArrayString, ArrayVec};
use l2_protocol::abi::{
    BELOW, Counter, FRAMES_FREE, LEAF_COUNTERS, LEAF_CPUS, LEAF_REFUSAL, LEAF_SIGNATURE, NO_FIELD, OF_ALL_CPUS,
    REFUSAL_FIELDS, REFUSAL_NAME, REFUSAL_RULE, REFUSAL_SUMMARY, SIGNATURE, SNAPSHOT, STACK_USED,
};

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
        match cpuid(1, 0)[2] >> 31 {
            _ if signature(LEAF_SIGNATURE) == SIGNATURE => Slot::Nvmx,
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

fn signature(leaf: u32) -> [u8; 12] {
    let [_, b, c, d] = cpuid(leaf, 0);
    let mut name = [0; 12];
    for (four, register) in name.chunks_exact_mut(4).zip([b, c, d]) {
        four.copy_from_slice(&register.to_le_bytes());
    }
    name
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
    counters_below(0)
}

/// How many nvmx there are below this guest, one in the other; at most eight are looked for.
pub fn depth() -> u32 {
    let is_nvmx = |k: &u32| signature(LEAF_SIGNATURE + k * BELOW) == SIGNATURE;
    (0..8).take_while(is_nvmx).count() as u32
}

/// [`counters`] of the `k`-th nvmx below the innermost.
pub fn counters_below(k: u32) -> Counters {
    let leaf = LEAF_COUNTERS + k * BELOW;
    cpuid(leaf, SNAPSHOT);
    let mut values = [0; Counter::ALL.len()];
    for (counter, value) in Counter::ALL.iter().zip(values.iter_mut()) {
        let [low, _, _, high] = cpuid(leaf, *counter as u32);
        *value = u64::from(low) | u64::from(high) << 32;
    }
    values
}

/// What nvmx refused last, as it tells.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// What was refused: a number of `l2_protocol::abi::Refused`
    pub what: u32,
    /// VM-instruction error or basic exit reason
    pub number: u32,
    /// Exit qualification
    pub qualification: u32,
    /// Refusals so far
    pub count: u32,
    /// Name of the rule
    pub name: ArrayString<64>,
    /// The fields it is about, as far as they fit
    pub fields: ArrayVec<u32, 16>,
}

/// Reads it.
pub fn refusal() -> Refusal {
    let [what, number, qualification, count] = cpuid(LEAF_REFUSAL, REFUSAL_SUMMARY);
    let [_, fields, length, _] = cpuid(LEAF_REFUSAL, REFUSAL_RULE);
    let parts = |from: u32, words: u32| (from..from + words.div_ceil(4)).flat_map(|part| cpuid(LEAF_REFUSAL, part));
    let mut name = ArrayString::new();
    for byte in parts(REFUSAL_NAME, length.div_ceil(4)).flat_map(u32::to_le_bytes).filter(|&byte| byte != 0) {
        let _ = name.try_push(char::from(byte));
    }
    let encodings = parts(REFUSAL_FIELDS, fields.min(16)).filter(|&field| field != NO_FIELD);
    Refusal { what, number, qualification, count, name, fields: encodings.take(16).collect() }
}

/// Frames of nvmx's that are free on this CPU, and the most bytes of its stack that were in use.
pub fn frames_and_stack() -> (u64, u64) {
    let value = |index| {
        let [low, _, _, high] = cpuid(LEAF_COUNTERS, index);
        u64::from(low) | u64::from(high) << 32
    };
    (value(FRAMES_FREE), value(STACK_USED))
}

/// The sum of a counter over all CPUs, each as it was at its last [`counters`].
pub fn counter_of_all_cpus(counter: Counter) -> u64 {
    let [low, _, _, high] = cpuid(LEAF_COUNTERS, OF_ALL_CPUS | counter as u32);
    u64::from(low) | u64::from(high) << 32
}

/// How many CPUs nvmx gives, and which one this is.
pub fn cpus() -> (u32, u32) {
    let [count, index, ..] = cpuid(LEAF_CPUS, 0);
    (count, index)
}
