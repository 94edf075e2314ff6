//! The checks of a VM entry: a vmcs12 of any content, near a valid one or far from it, against the second implementation.
#![no_main]

#[path = "../input.rs"]
mod input;
#[allow(dead_code, unused_imports)]
#[path = "../../checks_model/main.rs"]
mod model;

use input::Input;
use libfuzzer_sys::fuzz_target;
use model::core_support::{rich, valid_vmcs12};
use model::whole::{KINDS, compare, fields, memory};
use nvmx::rules::caps::offered;
use nvmx::vmx::Fields;
use nvmx::vmx::caps::Misc;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut caps = offered(&rich());
    let odds = input.u8();
    if odds & 1 != 0 {
        caps.misc = Misc(caps.misc.0 | 7 << 6);
    }
    caps.basic.0 |= u64::from(odds >> 1 & 1) << 56;
    let long_mode = odds & 4 == 0;
    let mut v = valid_vmcs12(&caps);
    for _ in 0..odds >> 3 & 3 {
        input.pick(&KINDS)(&mut v);
    }
    let all = fields();
    while !input.is_empty() {
        let field = input.pick(&all);
        let value = match input.u8() % 4 {
            0 => input.word(),
            1 => v.get(input.pick(&all)),
            _ => v.get(field) ^ 1 << (input.u8() % 64),
        };
        v.set(field, value & field.mask());
    }
    compare(&v, &caps, &memory(), long_mode);
});
