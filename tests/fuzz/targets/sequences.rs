//! Programs of L2 and L3 on nvmx's own handlers, from the run loop down: VMX instructions, memory, INVEPT, exits. What they see
//! is what the bare machine shows, and nvmx asks nothing of the processor that it must not.
#![no_main]

#[path = "../input.rs"]
mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use nvmx_machine::Setup;
use nvmx_machine::sequences::{Numbers, Sequence};
use nvmx_machine::world::agree_on;
use std::rc::Rc;

/// Instructions of a program at most.
const STEPS: usize = 200;

/// The fuzzer's bytes, two for each decision; a program lasts as long as the machine that it runs on.
struct Decisions {
    bytes: Rc<[u8]>,
    at: usize,
}

impl Numbers for Decisions {
    fn next(&mut self) -> u64 {
        let number = Input(self.bytes.get(self.at..).unwrap_or(&[])).u16();
        self.at += 2;
        // The lowest bits are not used for decisions.
        u64::from(number) << 7
    }

    fn is_over(&self) -> bool {
        self.at >= self.bytes.len()
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let setups = Setup::all();
    let bytes: Rc<[u8]> = rest.into();
    agree_on(setups[usize::from(*first) % setups.len()], |guest| {
        Sequence::new(guest, Decisions { bytes: bytes.clone(), at: 0 }).run(STEPS)
    });
});
