//! Sequences of VMX instructions on the pure part of what carries them out: vmcs12s loaded from and stored to L2's memory,
//! fields by encoding, checks and merge. A field keeps its value for as long as nobody writes it, L2's memory included; an
//! entry that the checks let through runs with all that L2 wants intercepted and nothing of L2's on the host side.
#![no_main]

#[path = "../input.rs"]
mod input;
#[allow(dead_code, unused_imports)]
#[path = "../../checks_model/main.rs"]
mod model;

use input::Input;
use libfuzzer_sys::fuzz_target;
use model::core_support::{APIC_PAGES, rich, valid_vmcs12};
use model::whole::{KINDS, compare, memory as checks_memory};
use nvmx::addr::{Gpa, Hpa};
use nvmx::mm::phys::{PhysMem, VecMem};
use nvmx::mm::{GuestMemory, Span};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{check_cached_controls, check_host};
use nvmx::rules::merge::{NvmxNeeds, Translated, merge};
use nvmx::vmcs::vmcs12::Vmcs12;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Capabilities, ExitControls, Field, Fields, PinControls, PrimaryControls, SecondaryControls};
use std::collections::HashMap;

const MEMORY: usize = 0x1_0000;
const OWN: Span = Span::new(0x8000, 0xA000);
const REGIONS: u64 = 4;

/// What L2 may expect of a vmcs12: the values that it wrote.
type Expected = HashMap<Field, u64>;

struct Machine<'a> {
    memory: &'a VecMem,
    guest: GuestMemory<&'a VecMem>,
    hardware: Capabilities,
    offered: Capabilities,
    active: HashMap<u64, Box<Vmcs12>>,
    current: Option<u64>,
    expected: HashMap<u64, Expected>,
}

impl Machine<'_> {
    fn vmclear(&mut self, at: u64) {
        match self.active.remove(&at) {
            Some(mut vmcs12) => {
                vmcs12.launched = false;
                assert!(vmcs12.store(&self.guest, Gpa::new(at)).is_ok(), "it was loaded from there");
            }
            None => {
                let owned = Vmcs12::clear_region(&self.guest, Gpa::new(at)).is_ok();
                assert_eq!(owned, !(OWN.start()..OWN.end()).contains(&at));
            }
        }
        if self.current == Some(at) {
            self.current = None;
        }
    }

    fn vmptrld(&mut self, at: u64) {
        if !self.active.contains_key(&at) {
            if Vmcs12::revision(&self.guest, Gpa::new(at)) != Ok(REVISION) {
                return;
            }
            let mut vmcs12 = Box::new(Vmcs12::new());
            if vmcs12.load(&self.guest, Gpa::new(at)).is_err() {
                return;
            }
            self.active.insert(at, vmcs12);
        }
        self.current = Some(at);
        let vmcs12 = &self.active[&at];
        for field in Field::ALL {
            assert_eq!(vmcs12.get(*field) & !field.mask(), 0, "{field} is wider than it can be");
            if let Some(value) = self.expected.get(&at).and_then(|e| e.get(field)) {
                assert_eq!(vmcs12.get(*field), *value, "{field} did not stay with its VMCS");
            }
        }
    }

    fn vmwrite(&mut self, encoding: u32, value: u64) {
        let Some((field, high)) = Field::decode(encoding).filter(|(field, _)| self.offered.has_field(*field)) else {
            return;
        };
        let Some((at, vmcs12)) = self.current.and_then(|at| Some((at, self.active.get_mut(&at)?))) else { return };
        if field.is_read_only() {
            return;
        }
        let value = if high { vmcs12.get(field) & 0xFFFF_FFFF | value << 32 } else { value };
        vmcs12.written(field, value);
        self.expected.entry(at).or_default().insert(field, value & field.mask());
    }

    /// L2 writes to its memory by itself: what was there counts no longer, unless it is active.
    fn poke(&mut self, at: u64, value: u64) {
        if self.guest.write_u64(Gpa::new(at), value).is_ok() {
            for page in [at & !0xFFF, at.wrapping_add(7) & !0xFFF] {
                if !self.active.contains_key(&page) {
                    self.expected.remove(&page);
                }
            }
        }
    }

    fn vmentry(&mut self, long_mode: bool) {
        let Some(vmcs12) = self.current.and_then(|at| self.active.get_mut(&at)) else { return };
        let Ok(checked) = check_cached_controls(&**vmcs12, &self.offered) else { return };
        if check_host(&**vmcs12, &self.offered, long_mode).is_err() {
            return;
        }
        let word = |field| vmcs12.get(field) as u32;
        let pin = PinControls::from_bits_retain(word(Field::PIN_BASED_VM_EXEC_CONTROL));
        let primary = PrimaryControls::from_bits_retain(word(Field::CPU_BASED_VM_EXEC_CONTROL));
        let to = Translated { io_bitmaps: None, msr_bitmap: None, shadow_bitmaps: None, apic: APIC_PAGES };
        let merged = merge(&NvmxNeeds::new(&self.hardware), &**vmcs12, checked, &to);
        let bitmaps = PrimaryControls::USE_IO_BITMAPS | PrimaryControls::USE_MSR_BITMAPS;
        assert!(merged.pin.contains(pin) && merged.primary.contains(primary - bitmaps), "I3");
        if primary.contains(PrimaryControls::USE_IO_BITMAPS) {
            assert!(merged.primary.contains(PrimaryControls::UNCONDITIONAL_IO_EXITING), "I3: a bitmap is lost");
        }
        assert!(merged.secondary.contains(SecondaryControls::ENABLE_EPT));
        let from_l2 = ExitControls::ACK_INTERRUPT_ON_EXIT | ExitControls::SAVE_PREEMPTION_TIMER;
        let fixed = merged.exit - from_l2;
        let none = valid_vmcs12(&self.offered);
        if let Ok(checked) = check_cached_controls(&none, &self.offered) {
            let plain = merge(&NvmxNeeds::new(&self.hardware), &none, checked, &to);
            assert_eq!(fixed, plain.exit - from_l2, "I4");
        }
        for (accepted, name) in [
            (self.hardware.pin.accepts(merged.pin.bits()), "pin"),
            (self.hardware.primary.accepts(merged.primary.bits()), "primary"),
            (self.hardware.secondary.accepts(merged.secondary.bits()), "secondary"),
            (self.hardware.exit.accepts(merged.exit.bits()), "exit"),
            (self.hardware.entry.accepts(merged.entry.bits()), "entry"),
        ] {
            assert!(accepted, "the processor would refuse the {name} controls");
        }
        vmcs12.launched = true;
    }

    /// The same state before both implementations of the checks.
    fn judge(&self) {
        let Some(vmcs12) = self.current.and_then(|at| self.active.get(&at)) else { return };
        let mut v = valid_vmcs12(&self.offered);
        for field in Field::ALL {
            v.set(*field, vmcs12.get(*field));
        }
        compare(&v, &self.offered, &checks_memory(), true);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let memory = VecMem::new(MEMORY);
    let hardware = rich();
    let mut machine = Machine {
        memory: &memory,
        guest: GuestMemory::new(&memory, OWN, 39),
        hardware,
        offered: offered(&hardware),
        active: HashMap::new(),
        current: None,
        expected: HashMap::new(),
    };
    for region in 1..=REGIONS {
        machine.memory.write_u64(Hpa::new(region << 12), REVISION.into());
    }
    while !input.is_empty() {
        // Four regions, and now and then nvmx's own memory or none at all.
        let pages = [1, 1, 2, 2, 3, 4, 8, 9, 0x200];
        match input.u8() % 9 {
            0 => machine.vmclear(input.pick(&pages) << 12),
            1 | 2 => machine.vmptrld(input.pick(&pages) << 12),
            3 | 4 => {
                let field = Field::ALL[usize::from(input.u8()) % Field::COUNT];
                machine.vmwrite(field.encoding() | u32::from(input.u8() & 1), input.word());
            }
            5 => machine.vmwrite(input.u32(), input.word()),
            6 => machine.poke(u64::from(input.u16()), input.word()),
            7 => {
                // A valid state all at once, as a hypervisor writes it.
                let mut v = valid_vmcs12(&machine.offered);
                input.pick(&KINDS)(&mut v);
                Field::ALL.iter().for_each(|field| machine.vmwrite(field.encoding(), v.get(*field)));
            }
            _ => {
                machine.judge();
                machine.vmentry(input.u8() % 8 != 0);
            }
        }
    }
    assert!(memory.bytes(OWN.start(), OWN.len() as usize).iter().all(|byte| *byte == 0), "nvmx's memory was written");
});
