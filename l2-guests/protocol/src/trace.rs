//! An exit as nvmx's own trace has it (`trace=N` of nvmx's command line): 16 words in memory, and on the serial line a record
//! `@L1 trace cpu=0 n=7 words=...` with the words in hexadecimal.
//!
//! A record `@L1 trace cpu=0 written=900 kept=512` comes before those of a processor: how many exits it had, and how many of them,
//! the last, are to follow.

use crate::record::Value;
use core::fmt;

/// Words of an exit.
pub const WORDS: usize = 16;

/// The words of an exit, as text: in hexadecimal with commas, without the zeros at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Words(pub [u64; WORDS]);

/// A hardware exit, and what nvmx entered next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TracedExit {
    /// TSC after the exit
    pub exited: u64,
    /// TSC before the next entry; 0: there was none
    pub entered: u64,
    /// Level of the guest that was left: 2 or 3
    pub level: u8,
    /// Level of the guest that was entered; 0: none
    pub next_level: u8,
    /// Physical address of the VMCS of the guest that was left, a multiple of 4 KiB
    pub vmcs: u64,
    /// ... that was entered
    pub next_vmcs: u64,
    /// Linear address of the instruction that exited
    pub rip: u64,
    /// Linear address at which the next guest goes on
    pub next_rip: u64,
    /// Exit qualification
    pub qualification: u64,
    /// Guest-physical address of an EPT violation or misconfiguration; encoding of the field of a VMREAD or VMWRITE
    pub address: u64,
    /// RAX, RCX, RDX of the guest that was left
    pub registers: [u64; 3],
    /// Exit reason, all 32 bits
    pub reason: u32,
    /// VM-exit interruption information
    pub event: u32,
    /// VM-exit instruction information
    pub info: u32,
    /// IDT-vectoring information
    pub vectoring: u32,
    /// Primary processor-based controls that the guest ran with
    pub primary: u32,
    /// Secondary ones
    pub secondary: u32,
    /// VMREAD, VMWRITE, VMPTRLD, VMCLEAR, INVEPT, INVVPID of nvmx in between, each up to what its place holds
    pub counts: [u16; 6],
    /// VM-entry interruption information of the entry
    pub injected: u32,
}

/// Bits of a VMCS's address in which a level stands.
const PAGE: u64 = 0xFFF;

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

impl TracedExit {
    /// As it lies in memory.
    pub fn words(&self) -> Words {
        let [reads, writes, rest @ ..] = self.counts;
        let few = rest.map(|count| count.min(0xFF) as u8);
        let counts = pair(u32::from(reads) | u32::from(writes) << 16, u32::from_le_bytes(few));
        let [rax, rcx, rdx] = self.registers;
        Words([
            self.exited,
            self.entered,
            self.vmcs & !PAGE | u64::from(self.level),
            self.next_vmcs & !PAGE | u64::from(self.next_level),
            self.rip,
            self.next_rip,
            self.qualification,
            self.address,
            rax,
            rcx,
            rdx,
            pair(self.reason, self.event),
            pair(self.info, self.vectoring),
            pair(self.primary, self.secondary),
            counts,
            u64::from(self.injected),
        ])
    }

    /// The reverse of [`Self::words`].
    pub fn of(words: Words) -> Self {
        let [exited, entered, left, next, rip, next_rip, qualification, address, rest @ ..] = words.0;
        let [rax, rcx, rdx, why, info, controls, counts, injected] = rest;
        let ((reason, event), (info, vectoring), (primary, secondary)) = (halves(why), halves(info), halves(controls));
        let (many, few) = halves(counts);
        let [ptrld, clear, invept, invvpid] = few.to_le_bytes().map(u16::from);
        TracedExit {
            exited,
            entered,
            level: (left & PAGE) as u8,
            next_level: (next & PAGE) as u8,
            vmcs: left & !PAGE,
            next_vmcs: next & !PAGE,
            rip,
            next_rip,
            qualification,
            address,
            registers: [rax, rcx, rdx],
            reason,
            event,
            info,
            vectoring,
            primary,
            secondary,
            counts: [many as u16, (many >> 16) as u16, ptrld, clear, invept, invvpid],
            injected: injected as u32,
        }
    }
}

impl Words {
    /// The reverse of the text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = [0; WORDS];
        for (n, word) in text.split(',').enumerate() {
            *words.get_mut(n)? = u64::from_str_radix(word, 16).ok()?;
        }
        Some(Words(words))
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.0.iter().rposition(|word| *word != 0).map_or(1, |last| last + 1);
        for (n, word) in self.0.iter().take(used).enumerate() {
            write!(f, "{}{word:x}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl Value for Words {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;

    fn exit() -> TracedExit {
        TracedExit {
            exited: 1,
            entered: 2,
            level: 3,
            next_level: 2,
            vmcs: 0x1000,
            next_vmcs: 0xFFFF_F000,
            rip: 5,
            next_rip: u64::MAX,
            qualification: 7,
            address: 8,
            registers: [9, 10, 11],
            reason: 0x8000_0021,
            event: 13,
            info: 14,
            vectoring: 15,
            primary: 16,
            secondary: 17,
            counts: [60_000, 2, 3, 4, 5, 255],
            injected: 0x8000_0302,
        }
    }

    #[test]
    fn an_exit_is_what_it_was_after_memory_and_serial_line() {
        for exit in [exit(), TracedExit { injected: 0, counts: [0; 6], ..exit() }, TracedExit::default()] {
            let text = exit.words().to_string();
            assert_eq!(Words::parse(&text).map(TracedExit::of), Some(exit), "{text}");
        }
        assert_eq!(TracedExit::default().words().to_string(), "0");
    }

    #[test]
    fn what_a_place_does_not_hold_is_the_most_that_it_holds() {
        let many = TracedExit { counts: [u16::MAX; 6], ..exit() };
        assert_eq!(TracedExit::of(many.words()).counts, [u16::MAX, u16::MAX, 255, 255, 255, 255]);
    }

    #[test]
    fn other_text_is_no_exit() {
        for text in ["", "x", "1,,2", "1 2", "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1"] {
            assert_eq!(Words::parse(text), None, "{text}");
        }
    }
}
