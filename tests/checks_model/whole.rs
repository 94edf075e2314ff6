//! Whole states near validity: valid ones of every kind with one to three changes, each a flipped bit or a value from the
//! edge of what is allowed. Both implementations must find the same first rule, or none.

use super::core_support::broken::{legacy, pae, real_mode, usable_ldtr, v86};
use super::core_support::{CONTEXT, CURRENT, Memory, Vmcs, rich, valid_vmcs12};
use super::{Violations, controls, guest, host};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{CheckId, check_controls, check_guest, check_host};
use nvmx::vmx::caps::Misc;
use nvmx::vmx::field::Area;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};
use nvmx::x86::lam::CR3_FLAGS;
use std::collections::BTreeMap;

/// xorshift64*
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        ((self.draw() >> 33) % end as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// What tells one valid state from another; several may be combined.
pub const KINDS: [fn(&mut Vmcs); 21] = [
    |_| (),
    |_| (),
    legacy,
    real_mode,
    |v| {
        real_mode(v);
        v.set(GUEST_CS_AR_BYTES, 0xC093);
    },
    |v| {
        real_mode(v);
        v.set(GUEST_CS_AR_BYTES, 0xC09F);
    },
    |v| _ = v.set(GUEST_CS_AR_BYTES, 0xA09F),
    |v| _ = v.set(GUEST_DS_AR_BYTES, 0xC09F).set(GUEST_ES_AR_BYTES, 0xC09B).set(GUEST_SS_AR_BYTES, 1 << 16),
    v86,
    usable_ldtr,
    pae,
    |v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7),
    |v| _ = v.set(GUEST_ACTIVITY_STATE, 1),
    |v| _ = v.set(VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 1 << 11 | 3 << 8 | 13),
    |v| _ = v.set(VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 2 << 8 | 2).or(PIN_BASED_VM_EXEC_CONTROL, 1 << 3 | 1 << 5),
    |v| _ = v.set(VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 0x60).or(GUEST_RFLAGS, 1 << 9),
    |v| _ = v.set(VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 6 << 8 | 3).set(VM_ENTRY_INSTRUCTION_LEN, 1),
    |v| _ = v.set(GUEST_INTERRUPTIBILITY_INFO, 1).or(GUEST_RFLAGS, 1 << 9),
    |v| {
        for rights in [GUEST_CS_AR_BYTES, GUEST_SS_AR_BYTES, GUEST_DS_AR_BYTES] {
            v.or(rights, 3 << 5);
        }
        v.or(GUEST_CS_SELECTOR, 3).or(GUEST_SS_SELECTOR, 3).or(GUEST_DS_SELECTOR, 3);
    },
    |v| _ = v.clear(SECONDARY_VM_EXEC_CONTROL, 1 << 1 | 1 << 7),
    |v| {
        v.or(VM_ENTRY_CONTROLS, 1 << 19 | 1 << 20 | 1 << 22).or(VM_EXIT_CONTROLS, 1 << 27 | 1 << 28 | 1 << 29);
        v.set(GUEST_S_CET, 0x401).set(GUEST_SSP, 0x7FF8).set(HOST_S_CET, 0x3B).set(GUEST_UINV, 0xEC);
    },
];

/// Values at the edges of rules.
const EDGES: [u64; 28] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    0x800,
    0xFFF,
    0x1000,
    0xFFFF,
    0x1_0000,
    0xF_FFFF,
    0x10_0000,
    0xFFFF_FFFF,
    1 << 32,
    (1 << 39) - 16,
    1 << 39,
    (1 << 47) - 1,
    1 << 47,
    1 << 48,
    u64::MAX << 47,
    u64::MAX << 48,
    CURRENT.get(),
    0x5000,
    u64::MAX,
];

/// Every field that a rule could be about.
pub fn fields() -> Vec<Field> {
    Field::ALL.iter().copied().filter(|field| field.area() != Area::ExitInfo).collect()
}

/// Fields with many rules, to be chosen as often as all others together.
const BUSY: [Field; 28] = [
    PIN_BASED_VM_EXEC_CONTROL,
    CPU_BASED_VM_EXEC_CONTROL,
    SECONDARY_VM_EXEC_CONTROL,
    VM_EXIT_CONTROLS,
    VM_ENTRY_CONTROLS,
    VM_ENTRY_INTR_INFO_FIELD,
    GUEST_CR0,
    GUEST_CR4,
    GUEST_RFLAGS,
    GUEST_RIP,
    GUEST_IA32_EFER,
    GUEST_ACTIVITY_STATE,
    GUEST_INTERRUPTIBILITY_INFO,
    GUEST_PENDING_DBG_EXCEPTIONS,
    GUEST_CS_AR_BYTES,
    GUEST_SS_AR_BYTES,
    GUEST_DS_AR_BYTES,
    GUEST_TR_AR_BYTES,
    GUEST_LDTR_AR_BYTES,
    GUEST_SS_SELECTOR,
    GUEST_CS_LIMIT,
    HOST_CR4,
    HOST_IA32_EFER,
    VMCS_LINK_POINTER,
    GUEST_S_CET,
    GUEST_SSP,
    HOST_S_CET,
    HOST_SSP,
];

fn machine(numbers: &mut Numbers) -> Capabilities {
    let mut caps = offered(&rich());
    if numbers.below(4) == 0 {
        // All activity states, as on hardware, and other odds.
        caps.misc = Misc(caps.misc.0 | 7 << 6);
        caps.basic.0 |= (numbers.draw() & 1) << 56;
        caps.cr3_flags = (numbers.draw() & 1) * CR3_FLAGS;
    }
    caps
}

fn change(v: &mut Vmcs, numbers: &mut Numbers, all: &[Field]) {
    let field = if numbers.below(2) == 0 { numbers.pick(all) } else { numbers.pick(&BUSY) };
    let value = match numbers.below(8) {
        0 => numbers.pick(&EDGES),
        // Two fields that are to agree.
        1 => v.get(numbers.pick(&BUSY)),
        _ => {
            let width = 64 - field.mask().leading_zeros() as usize;
            v.get(field) ^ 1 << numbers.below(width)
        }
    };
    v.set(field, value & field.mask());
}

/// The first of the rules in their order.
fn first(broken: &Violations) -> Option<&'static str> {
    CheckId::ALL.iter().map(|check| check.name()).find(|name| broken.contains(name))
}

/// Both implementations on one state; the rule that both found.
pub fn compare(v: &Vmcs, caps: &Capabilities, memory: &Memory, long_mode: bool) -> Option<&'static str> {
    let controls = (check_controls(v, caps).err().map(|f| f.check.name()), controls::violations(v, caps));
    let host = (check_host(v, caps, long_mode).err().map(|f| f.check.name()), host::violations(v, caps, long_mode));
    let guest = (check_guest(v, caps, &CONTEXT, memory).err(), guest::violations(v, caps, memory));
    assert_eq!(controls.0, first(&controls.1), "controls; all that are broken: {:?}", controls.1);
    assert_eq!(host.0, first(&host.1), "host; all that are broken: {:?}", host.1);
    let found = guest.0.map(|f| f.check.name());
    assert_eq!(found, first(&guest.1), "guest; all that are broken: {:?}", guest.1);
    let qualification = match found {
        Some("GuestPdptes") => 2,
        Some("GuestBlockingNmiSti") => 3,
        Some(name) if name.starts_with("GuestLinkPointer") => 4,
        _ => 0,
    };
    assert!(guest.0.is_none_or(|f| f.qualification == qualification), "{:?}", guest.0);
    controls.0.or(host.0).or(found)
}

pub fn memory() -> Memory {
    let ordinary = u64::from(REVISION);
    Memory([(0x5000, ordinary), (0x6000, ordinary | 1 << 31), (0x3000, 0x4001), (0x3018, 0x7001)].into())
}

#[test]
fn both_implementations_agree_on_a_hundred_thousand_states_near_validity() {
    const STATES: usize = 100_000;
    let (mut numbers, all, memory) = (Numbers(0x5EED), fields(), memory());
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for state in 0..STATES {
        let before = numbers.0;
        let caps = machine(&mut numbers);
        let mut v = valid_vmcs12(&caps);
        for _ in 0..numbers.below(3) {
            numbers.pick(&KINDS)(&mut v);
        }
        for _ in 0..numbers.below(4) {
            change(&mut v, &mut numbers, &all);
        }
        let long_mode = numbers.below(16) != 0;
        let agree = std::panic::AssertUnwindSafe(|| compare(&v, &caps, &memory, long_mode));
        match std::panic::catch_unwind(agree) {
            Ok(rule) => *found.entry(rule.unwrap_or("none")).or_default() += 1,
            Err(_) => panic!("state {state}, from seed {before:#x}: see above"),
        }
    }
    // The states are near validity only if many are valid, and they try the rules only if nearly all are met.
    assert!(found["none"] > STATES / 10, "{found:?}");
    assert!(found.len() > 90, "{} rules met: {found:?}", found.len());
}

#[test]
fn both_implementations_agree_on_every_single_bit_of_every_kind_of_state() {
    let (caps, memory, mut count) = (offered(&rich()), memory(), 0);
    for kind in KINDS {
        let mut base = valid_vmcs12(&caps);
        kind(&mut base);
        for field in fields() {
            for bit in 0..64 - field.mask().leading_zeros() {
                let mut v = base.clone();
                v.set(field, base.get(field) ^ 1 << bit);
                compare(&v, &caps, &memory, true);
                count += 1;
            }
        }
    }
    assert!(count > 80_000, "{count}");
}
