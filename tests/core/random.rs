//! Random programs of L2 and L3: what they see under nvmx is what they see on the bare machine, by every strategy.
//!
//! `NVMX_SEQUENCES=N` runs N of them instead of a few, `NVMX_SEED=S` one from this seed.

use nvmx_machine::sequences::{Seed, Sequence};
use nvmx_machine::world::agree;

const STEPS: usize = 80;

#[test]
fn what_a_hypervisor_sees_is_what_the_machine_would_show() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let (first, count) = match number("NVMX_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("NVMX_SEQUENCES").unwrap_or(20)),
    };
    for seed in first..first + count {
        let run = std::panic::AssertUnwindSafe(|| {
            agree(move |guest| Sequence::new(guest, Seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))).run(STEPS));
        });
        if std::panic::catch_unwind(run).is_err() {
            panic!("seed {seed}: NVMX_SEED={seed} runs it alone");
        }
    }
}
