//! APIC virtualization (SDM chapter "APIC Virtualization and Virtual Interrupts"): each case says by a model of its own what
//! the SDM wants.
//!
//! Left out, since Bochs departs from the SDM there: instruction fetches from the APIC-access page (it stops), page walks
//! through it, and writes inside of a register beyond its first byte.

mod halted;
mod interrupts;
mod posted;
mod registers;
mod rules;
mod tpr;
mod x2apic;

use crate::guest::Guest;
use l2_kit::{
    Global,
    ept::rights,
    fields as f,
    pages::{self, PAGE},
    setup::{self, Controls, Kind, Missing, exit_controls, pin, primary, secondary as s},
    vmx,
};

/// Offsets of registers in the virtual-APIC page.
mod offset {
    pub const TPR: u64 = 0x80;
    pub const PPR: u64 = 0xA0;
    pub const EOI: u64 = 0xB0;
    pub const ISR: u64 = 0x100;
    pub const IRR: u64 = 0x200;
    pub const ICR: u64 = 0x300;
    pub const ICR_HIGH: u64 = 0x310;
    pub const SELF_IPI: u64 = 0x3F0;
}

/// Controls without which a mode is not what it is called.
const fn mode(primary: u32, secondary: u32) -> Controls {
    Controls { pin: 0, primary, secondary, exit: 0, entry: 0 }
}

const NOTHING: Controls = mode(0, 0);
const TPR: Controls = mode(primary::TPR_SHADOW, 0);
const REGISTERS: Controls = mode(primary::TPR_SHADOW, s::APIC_REGISTERS);
const DELIVERY: Controls =
    Controls { pin: pin::EXTERNAL_INTERRUPT, ..mode(primary::TPR_SHADOW, s::VIRTUAL_INTERRUPTS) };
const BOTH: Controls =
    Controls { pin: pin::EXTERNAL_INTERRUPT, ..mode(primary::TPR_SHADOW, s::APIC_REGISTERS | s::VIRTUAL_INTERRUPTS) };
const POSTED: Controls = Controls { pin: BOTH.pin | pin::POSTED_INTERRUPTS, exit: exit_controls::ACKNOWLEDGE, ..BOTH };

/// The modes in which registers are looked at; the names are keys of records.
const MODES: [(&str, Controls); 5] =
    [("off", NOTHING), ("tpr", TPR), ("registers", REGISTERS), ("delivery", DELIVERY), ("both", BOTH)];

/// These controls and more secondary ones.
fn and(mode: Controls, secondary: u32) -> Controls {
    Controls { secondary: mode.secondary | secondary, ..mode }
}

fn offered(mode: &Controls) -> bool {
    [(Kind::Pin, mode.pin), (Kind::Primary, mode.primary), (Kind::Secondary, mode.secondary), (Kind::Exit, mode.exit)]
        .into_iter()
        .all(|(kind, bits)| setup::allowed_one(kind, bits))
}

/// A value for programs that need more than an address.
static OPERAND: Global<u64> = Global::new(0);

/// A guest with pages for a virtual APIC.
struct Apic {
    guest: Guest,
    /// The virtual-APIC page.
    page: u64,
    /// The APIC-access page.
    access: u64,
    /// The posted-interrupt descriptor.
    descriptor: u64,
    /// The control words without APIC virtualization.
    plain: [(u32, u64); 4],
}

impl Apic {
    fn new(secondary: u32) -> Result<Self, Missing> {
        let guest = Guest::new(Controls { secondary, ..Controls::default() })?;
        let [page, access, descriptor] = [(); 3].map(|()| pages::address(pages::page()));
        // Not at the start of a page.
        let descriptor = descriptor + 0x40;
        match &guest.ept {
            Some(ept) => ept.map(access, PAGE, rights::RWX),
            None => pages::set_entry(guest.cr3, access, access | 3),
        }
        for (mode, field, value) in [
            (TPR, f::VIRTUAL_APIC, page),
            (TPR, f::TPR_THRESHOLD, 0),
            (mode(0, s::APIC_ACCESSES), f::APIC_ACCESS, access),
            (POSTED, f::POSTED_INT_DESCRIPTOR, descriptor),
            (POSTED, f::POSTED_INT_VECTOR, posted::NOTIFICATION.into()),
        ] {
            if offered(&mode) {
                vmx::write(field, value);
            }
        }
        let plain = [Kind::Pin, Kind::Primary, Kind::Secondary, Kind::Exit].map(|k| (k.field(), vmx::read(k.field())));
        Ok(Self { guest, page, access, descriptor, plain })
    }

    /// Chooses a mode, if the CPU offers it, and a fresh virtual-APIC page.
    fn choose(&mut self, mode: &Controls) -> bool {
        if !offered(mode) {
            return false;
        }
        for ((field, plain), bits) in self.plain.iter().zip([mode.pin, mode.primary, mode.secondary, mode.exit]) {
            vmx::write(*field, plain | u64::from(bits));
        }
        if offered(&DELIVERY) {
            self.status(0);
            (0..4).for_each(|word| vmx::write(f::EOI_EXIT0 + 2 * word, 0));
        }
        // SAFETY: the page is this part's, and nobody holds a reference.
        unsafe { pages::at(self.page) }.fill(0);
        self.threshold(0);
        true
    }

    fn threshold(&self, value: u64) {
        if offered(&TPR) {
            vmx::write(f::TPR_THRESHOLD, value);
        }
    }

    /// Sets requested (bits 7:0) and in-service (bits 15:8) vector.
    fn status(&self, value: u64) {
        vmx::write(f::GUEST_INTERRUPT_STATUS, value);
    }

    fn get(&self, offset: u64) -> u32 {
        // SAFETY: the page is this part's.
        unsafe { ((self.page + offset) as *const u32).read_volatile() }
    }

    fn set(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.page + offset) as *mut u32).write_volatile(value) };
    }

    /// Sets a vector in the registers at `array` (ISR, IRR).
    fn set_vector(&self, array: u64, vector: u8) {
        let register = array + u64::from(vector) / 32 * 16;
        self.set(register, self.get(register) | 1 << (vector % 32));
    }

    /// The vectors in the registers at `array`.
    fn vectors(&self, array: u64) -> Vectors {
        let mut all = Vectors::default();
        for (word, register) in (0..).zip(all.0.iter_mut()) {
            *register = self.get(array + 16 * word);
        }
        all
    }
}

/// 256 bits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Vectors([u32; 8]);

impl Vectors {
    fn put(&mut self, vector: u8, on: bool) {
        let bit = 1 << (vector % 32);
        let word = &mut self.0[usize::from(vector / 32)];
        *word = if on { *word | bit } else { *word & !bit };
    }

    fn highest(self) -> u8 {
        (0..=255u8).rev().find(|v| self.0[usize::from(v / 32)] >> (v % 32) & 1 != 0).unwrap_or(0)
    }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut apic = Apic::new(s::EPT)?;
    rules::all(&mut apic);
    registers::all(&mut apic);
    tpr::all(&mut apic);
    x2apic::all(&mut apic);
    interrupts::all(&mut apic);
    posted::all(&mut apic);
    halted::all(&mut apic);
    // Without EPT the page is looked for by the guest's own tables.
    registers::some(&mut Apic::new(0)?);
    Ok(())
}
