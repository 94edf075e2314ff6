//! Words of the machine-check architecture.
//!
//! Source: SDM vol. 3B, chapter "Machine-Check Architecture": "IA32_MCG_CAP MSR", "IA32_MCG_STATUS MSR",
//! "IA32_MCi_STATUS MSRs".

use bitflags::bitflags;

/// IA32_MCG_CAP
pub const IA32_MCG_CAP: u32 = 0x179;
/// IA32_MCG_CAP: how many banks there are.
pub const CAP_COUNT: u64 = 0xFF;
/// IA32_MCG_STATUS
pub const IA32_MCG_STATUS: u32 = 0x17A;

bitflags! {
    /// IA32_MCG_STATUS.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct McgStatus: u64 {
        /// The program can be restarted at the pushed instruction pointer.
        const RIPV = 1 << 0;
        /// The instruction at the pushed instruction pointer is associated with the error.
        const EIPV = 1 << 1;
        /// A machine check is in progress: the next one shuts the processor down.
        const MCIP = 1 << 2;
    }
}

impl McgStatus {
    /// True if the program that was interrupted is only a witness: another processor's error was broadcast, or one was found in memory
    /// that nobody uses. With EIPV the program's own instruction met the error, and would meet it again.
    pub const fn leaves_program_alone(self) -> bool {
        self.contains(Self::RIPV) && !self.contains(Self::EIPV)
    }
}

bitflags! {
    /// IA32_MCi_STATUS.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct BankStatus: u64 {
        /// IA32_MCi_ADDR has an address.
        const ADDRESS = 1 << 58;
        /// IA32_MCi_MISC has something.
        const MISC = 1 << 59;
        /// The bank has an error.
        const VALID = 1 << 63;
    }
}

/// Numbers of IA32_MCi_STATUS, IA32_MCi_ADDR and IA32_MCi_MISC.
pub const fn bank(number: u32) -> [u32; 3] {
    let first = 0x400 + 4 * number;
    [first + 1, first + 2, first + 3]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDM vol. 3B, table "IA32_MCG_STATUS Flag Indication for SRAR Errors", and "UCR Error Classification".
    #[test]
    fn who_only_hears_of_an_error_goes_on() {
        let goes_on = |bits| McgStatus::from_bits_retain(bits).leaves_program_alone();
        // Other processors than the one that met the error; an error that somebody is to look at some time.
        assert!(goes_on(0b101) && goes_on(0b1101));
        // The one that met it: the instruction cannot be restarted, or meets it again; or nothing is known.
        assert!(!goes_on(0b110) && !goes_on(0b111) && !goes_on(0b100) && !goes_on(0));
    }
}
