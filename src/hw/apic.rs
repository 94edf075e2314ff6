//! The local APIC of this processor, as far as nvmx uses it: to start and stop processors, and to do to it what an INIT
//! does. L2 owns it in every other way: it may move it to any page but those of nvmx, and nvmx finds it there.
//!
//! Source: Intel SDM vol. 3A, chapter "Advanced Programmable Interrupt Controller (APIC)": table "Local APIC Register
//! Address Map", "Local APIC State After It Receives an INIT Reset", "Interrupt Command Register (ICR)".

use crate::addr::{Gpa, Hpa};
use crate::hw::msr;
use crate::hw::phys::DirectMap;
use crate::hw::processor::Processor;
use crate::hw::this_processor;
use crate::mm::GuestMemory;
use crate::x86::Fault;

/// Index of IA32_APIC_BASE.
pub const IA32_APIC_BASE: u32 = 0x1B;
/// IA32_APIC_BASE: the processor that booted.
const BOOTED: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is on.
const ENABLED: u64 = 1 << 11;
const BASE: u64 = 0x000F_FFFF_FFFF_F000;
/// Where the registers are after reset.
const RESET_BASE: u64 = 0xFEE0_0000;
/// The MSR of the register at offset 0 in x2APIC mode.
const X2APIC_FIRST: u32 = 0x800;

/// Offsets of registers.
mod register {
    pub const VERSION: u32 = 0x030;
    pub const TASK_PRIORITY: u32 = 0x080;
    pub const EOI: u32 = 0x0B0;
    pub const LOGICAL_DESTINATION: u32 = 0x0D0;
    pub const DESTINATION_FORMAT: u32 = 0x0E0;
    pub const SPURIOUS: u32 = 0x0F0;
    pub const IN_SERVICE: u32 = 0x100;
    pub const ERROR_STATUS: u32 = 0x280;
    pub const COMMAND: u32 = 0x300;
    pub const COMMAND_HIGH: u32 = 0x310;
    /// LVT entries with the "max LVT entry" from which on they exist.
    pub const LVT: [(u32, u32); 7] =
        [(0x320, 0), (0x350, 0), (0x360, 0), (0x370, 3), (0x340, 4), (0x330, 5), (0x2F0, 6)];
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const DIVIDE: u32 = 0x3E0;
}

const INIT: u32 = 0x0_4500;
const STARTUP: u32 = 0x0_4600;
const ALL_OTHERS: u32 = 0b11 << 18;
const MASKED: u32 = 1 << 16;
/// Highest destination in xAPIC mode; 255 means everybody.
const XAPIC_LAST: u32 = 254;

/// This is the processor that booted the machine.
pub fn booted() -> bool {
    apic_base() & BOOTED != 0
}

fn apic_base() -> u64 {
    msr::rdmsr_safe(IA32_APIC_BASE).unwrap_or(0)
}

/// True if this value of IA32_APIC_BASE leaves nvmx its memory: the page of the registers hides what else is there from the
/// processor. In whatever mode: a later write of the other bits must find no base that does harm.
pub fn may_move_to<P>(value: u64, guest: &GuestMemory<P>) -> bool {
    guest.translate(Gpa::new(value & BASE)).is_ok()
}

/// WRMSR of a guest to IA32_APIC_BASE. A page that L2 does not own is refused like one beyond the physical-address width;
/// every other fault is the processor's own: reserved bits, transitions between the modes.
pub fn set_base<P>(value: u64, guest: &GuestMemory<P>) -> Result<(), Fault> {
    if !may_move_to(value, guest) {
        return Err(Fault::GeneralProtection(0));
    }
    // SAFETY: the registers lie over no memory of nvmx, and nvmx takes no interrupts.
    unsafe { msr::wrmsr_safe(IA32_APIC_BASE, value) }
}

/// The APIC of this processor in its present mode.
#[derive(Clone, Copy, Debug)]
pub enum LocalApic {
    /// Registers in memory
    Memory(Registers),
    /// Registers as MSRs
    Msrs,
}

/// The page of the registers, which is L2's.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    phys: DirectMap,
    page: Hpa,
}

impl Registers {
    fn at(&self, register: u32) -> Hpa {
        Hpa::new(self.page.get() + u64::from(register))
    }
}

impl LocalApic {
    /// `None` if it is off. The answer holds until L2 runs again.
    pub fn find(guest: &GuestMemory<DirectMap>) -> Option<Self> {
        let base = apic_base();
        match (base & ENABLED, base & X2APIC) {
            (0, _) => None,
            (_, 0) => {
                let page = guest.translate(Gpa::new(base & BASE)).ok()?;
                Some(Self::Memory(Registers { phys: *guest.phys(), page }))
            }
            _ => Some(Self::Msrs),
        }
    }

    /// [`find`](Self::find); one that L2 has switched off is switched on again. For the end of the machine.
    pub fn find_or_enable(guest: &GuestMemory<DirectMap>) -> Option<Self> {
        Self::find(guest).or_else(|| {
            set_base(apic_base() & BOOTED | ENABLED | RESET_BASE, guest).ok()?;
            Self::find(guest)
        })
    }

    /// Can this APIC reach a processor by its number?
    pub fn reaches(self, apic_id: u32) -> bool {
        matches!(self, Self::Msrs) || apic_id <= XAPIC_LAST
    }

    /// Sends an INIT.
    pub fn send_init(self, apic_id: u32) {
        self.command(apic_id, INIT);
    }

    /// Sends a start-up message: the processor begins at `page` (below 1 MiB, in units of 4 KiB).
    pub fn send_startup(self, apic_id: u32, page: u8) {
        self.command(apic_id, STARTUP | u32::from(page));
    }

    /// Sends an INIT to all other processors: it makes those that run a guest exit.
    pub fn stop_others(self) {
        self.command(0, INIT | ALL_OTHERS);
    }

    /// Lets it take no more interrupts, the first of what an INIT does.
    pub fn disable(self) {
        self.write(register::SPURIOUS, 0xFF);
    }

    /// Does what an INIT does. Interrupts that are requested but not in service yet cannot be withdrawn.
    pub fn reset(self) {
        use register::*;
        self.disable();
        let last = self.read(VERSION) >> 16 & 0xFF;
        for (entry, from) in LVT {
            if last >= from {
                self.write(entry, MASKED);
            }
        }
        self.write(INITIAL_COUNT, 0);
        self.write(DIVIDE, 0);
        self.write(TASK_PRIORITY, 0);
        if let Self::Memory(_) = self {
            self.write(LOGICAL_DESTINATION, 0);
            self.write(DESTINATION_FORMAT, u32::MAX);
        }
        // An EOI ends one interrupt in service; there are 256 at most.
        for _ in 0..256 {
            if (0..8).all(|word| self.read(IN_SERVICE + word * 0x10) == 0) {
                break;
            }
            self.write(EOI, 0);
        }
        self.write(ERROR_STATUS, 0);
    }

    fn command(self, apic_id: u32, low: u32) {
        match self {
            Self::Memory(_) => {
                self.write(register::COMMAND_HIGH, apic_id << 24);
                self.write(register::COMMAND, low);
            }
            Self::Msrs => {
                let value = u64::from(apic_id) << 32 | u64::from(low);
                // SAFETY: the register exists in x2APIC mode; what other processors do of it is the caller's business.
                let _ = unsafe { msr::wrmsr_safe(X2APIC_FIRST + (register::COMMAND >> 4), value) };
            }
        }
    }

    fn read(self, register: u32) -> u32 {
        match self {
            Self::Memory(registers) => this_processor().device_read(&registers.phys, registers.at(register)),
            Self::Msrs => msr::rdmsr_safe(X2APIC_FIRST + (register >> 4)).unwrap_or(0) as u32,
        }
    }

    fn write(self, register: u32, value: u32) {
        match self {
            Self::Memory(registers) => {
                // SAFETY: the page is L2's to use, so no memory of nvmx is behind it; of interrupts nvmx takes none.
                unsafe { this_processor().device_write(&registers.phys, registers.at(register), value) };
            }
            Self::Msrs => {
                // SAFETY: the registers written here affect interrupts only, of which nvmx takes none.
                let _ = unsafe { msr::wrmsr_safe(X2APIC_FIRST + (register >> 4), u64::from(value)) };
            }
        }
    }
}
