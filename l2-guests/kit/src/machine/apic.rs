//! The local APIC, just enough to interrupt oneself and other CPUs.

use super::cpu::{rdmsr, wrmsr};
use crate::Global;

const IA32_APIC_BASE: u32 = 0x1B;
const X2APIC: u64 = 1 << 10;
/// Fixed interrupt to oneself, edge, asserted
const ICR_SELF: u32 = 1 << 18 | 1 << 14;
/// NMI to the CPU in the destination field, edge, asserted
const ICR_NMI: u32 = 1 << 14 | 0b100 << 8;

/// Messages to another CPU, as the low half of the interrupt command.
pub mod message {
    /// NMI
    pub const NMI: u32 = super::ICR_NMI;
    /// INIT, edge, asserted
    pub const INIT: u32 = 0x4500;
    /// Start-up at the page with this number
    pub const fn startup(page: u8) -> u32 {
        0x4600 | page as u32
    }
    /// Fixed interrupt, edge, asserted
    pub const fn interrupt(vector: u8) -> u32 {
        1 << 14 | vector as u32
    }
}

/// Base of the registers, 0 in x2APIC mode.
static BASE: Global<u64> = Global::new(0);

/// Finds out the mode and enables the APIC by its spurious-interrupt register.
pub fn init() {
    let base = rdmsr(IA32_APIC_BASE);
    BASE.set(if base & X2APIC != 0 { 0 } else { base & 0xF_FFFF_F000 });
    write(0xF0, 0x1FF);
}

/// Writes the register with that xAPIC offset.
#[inline(always)]
fn write(offset: u32, value: u32) {
    match BASE.get() {
        0 => wrmsr(0x800 + (offset >> 4), u64::from(value)),
        // SAFETY: the APIC's registers are mapped, uncached by the MTRRs.
        base => unsafe { core::ptr::write_volatile((base + u64::from(offset)) as *mut u32, value) },
    }
}

/// Sends a message to the CPU with this APIC id.
pub fn send(apic_id: u32, message: u32) {
    match BASE.get() {
        0 => wrmsr(0x830, u64::from(apic_id) << 32 | u64::from(message)),
        _ => {
            write(0x310, apic_id << 24);
            write(0x300, message);
        }
    }
}

/// Interrupts oneself with this vector after so many ticks of the APIC's clock, once.
pub fn start_timer(vector: u8, ticks: u32) {
    write(0x3E0, 0b1011);
    write(0x320, u32::from(vector));
    write(0x380, ticks);
}

/// Enables the APIC of a CPU that was started; [`init`] was called on the first.
pub fn enable() {
    write(0xF0, 0x1FF);
}

/// Interrupts oneself with a vector.
#[inline(always)]
pub fn send_self(vector: u8) {
    write(0x300, ICR_SELF | u32::from(vector));
}

/// Sends oneself an NMI. The shorthand "self" knows only fixed interrupts, so the CPU names itself.
pub fn send_self_nmi() {
    match BASE.get() {
        0 => wrmsr(0x830, rdmsr(0x802) << 32 | u64::from(ICR_NMI)),
        base => {
            // SAFETY: the APIC's registers are mapped.
            let id = unsafe { core::ptr::read_volatile((base + 0x20) as *const u32) };
            write(0x310, id);
            write(0x300, ICR_NMI);
        }
    }
}

/// Ends the interrupt in service.
#[inline(always)]
pub fn eoi() {
    write(0xB0, 0);
}
