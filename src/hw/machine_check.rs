//! Machine checks of this processor: whether nvmx goes on after one, and what its banks say if not.
//!
//! [ADR 0032](../../docs/adr/0032-machine-checks-in-nvmx.md). Source: SDM vol. 3B, chapter "Machine-Check Architecture".

use crate::hw::cpuid::decoded;
use crate::hw::{cr, msr};
use crate::x86::Cr4;
use crate::x86::machine_check::{BankStatus, CAP_COUNT, IA32_MCG_CAP, IA32_MCG_STATUS, McgStatus, bank};

/// From now on a machine check is an exception, not the end of this processor: its handler is there.
pub fn take() {
    if decoded().get_feature_info().is_some_and(|features| features.has_mce()) {
        // SAFETY: the processor has the bit; it changes nothing but where a machine check leads.
        unsafe { cr::set_cr4(cr::cr4() | Cr4::MCE.bits()) };
    }
}

/// IA32_MCG_STATUS; nothing on a processor without.
pub fn status() -> McgStatus {
    McgStatus::from_bits_retain(msr::rdmsr_safe(IA32_MCG_STATUS).unwrap_or(0))
}

/// Has the machine check that is in progress left nvmx as it was?
pub fn leaves_nvmx_alone() -> bool {
    status().leaves_program_alone()
}

/// The machine check has no guest that would do this: it is over, and the next one is not a shutdown.
pub fn end() {
    // SAFETY: nvmx relies on no machine check in progress.
    let _ = unsafe { msr::wrmsr_safe(IA32_MCG_STATUS, 0) };
}

/// Writes what the banks hold to the log.
#[cold]
pub fn tell_banks() {
    let banks = msr::rdmsr_safe(IA32_MCG_CAP).unwrap_or(0) & CAP_COUNT;
    let mut valid = 0;
    for number in 0..banks as u32 {
        let [status, address, misc] = bank(number);
        let Ok(value) = msr::rdmsr_safe(status).map(BankStatus::from_bits_retain) else { continue };
        if !value.contains(BankStatus::VALID) {
            continue;
        }
        valid += 1;
        let read = |register, present| if value.contains(present) { msr::rdmsr_safe(register).unwrap_or(0) } else { 0 };
        log::error!(
            "machine-check bank {number}: status {:#x}, address {:#x}, misc {:#x}",
            value.bits(),
            read(address, BankStatus::ADDRESS),
            read(misc, BankStatus::MISC)
        );
    }
    log::error!("machine check: {valid} of {banks} banks have an error, MCG_STATUS {:#x}", status().bits());
}
