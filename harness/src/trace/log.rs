//! The emulator's log of VM exits.
//!
//! Our build of Bochs writes to the file that the environment variable `NVMX_EXIT_LOG` names, at no cost for guests; nothing if
//! it is unset or empty. All numbers are little-endian. The file starts with `NVMXEXIT`, the format's version (u32, 3) and a
//! record's size (u32, 128); then records follow in the order in which things happened. Each begins with
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-7 | tick | instructions before the one that exits, enters or fails, plus skipped time: what the TSC counts; with several CPUs an average of them |
//! | 8-15 | vmcs | physical address of the current VMCS |
//! | 16-17 | cpu | number of the CPU, from 0 |
//! | 18-19 | kind | 1 VM exit, 2 VM entry, 3 a VMX instruction that fails with an error number, 4 changed fields |
//! | 20-23 | executed | instructions that this CPU has executed, modulo 2^32: costs are differences of it |
//! | 24-27 | reason | 1: exit reason, all 32 bits, bit 31 is an entry that failed; 3: the error; 4: how many fields |
//! | 28-31 | event | 1: VM-exit interruption information; 2: VM-entry interruption information |
//!
//! and goes on, for kinds 1 to 3 (what does not apply is 0), with
//!
//! | bytes | field | |
//! |---|---|---|
//! | 32-39 | rip | linear address of the guest's instruction; of the failing one for kind 3; of no use if the entry failed |
//! | 40-47 | qualification | |
//! | 48-55 | address | guest-physical address of an EPT violation or misconfiguration; encoding of the field of VMREAD and VMWRITE |
//! | 56-79 | rax, rcx, rdx | |
//! | 80-83 | vectoring | IDT-vectoring information |
//! | 84-87 | length | VM-exit instruction length |
//! | 88-91 | info | VM-exit instruction information |
//! | 92-95 | mode | bits 3:0 mode (0 real, 1 virtual-8086, 2 protected, 3 compatibility, 4 64-bit), 5:4 CPL, 8 non-root operation |
//! | 96-111 | counts | VMREAD, VMWRITE in root operation, VMREAD, VMWRITE of a shadow VMCS: u32 each, since power-on, of this CPU |
//! | 112-119 | counts | VMPTRLD, VMCLEAR, INVEPT, INVVPID in root operation: u16 each |
//! | 120-127 | operand | value of a VMREAD's or VMWRITE's register operand, before the instruction |
//!
//! or, for kind 4, with eight values (u64 each) and eight encodings (u32 each) of fields of this VMCS that differ from what they
//! were at its last record of this kind; all fields come with the first. Left out are exit information and what each exit
//! writes: RIP, RSP, RFLAGS, interruptibility, the event to be injected. They come before each entry, and before a failure
//! of one.
//!
//! The file is whole when Bochs ends by itself or on SIGINT; what is killed leaves the last record cut.

use anyhow::{Result, ensure};

/// The first bytes.
pub const MAGIC: &[u8; 8] = b"NVMXEXIT";
/// The format.
pub const VERSION: u32 = 3;
/// Bytes of a record.
pub const SIZE: usize = 128;
/// Bytes before the first record.
pub const HEAD: usize = 16;

/// VMX instructions that a CPU has executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// In root operation
    pub vmread: u32,
    /// In root operation
    pub vmwrite: u32,
    /// Of a shadow VMCS, without an exit
    pub shadow_vmread: u32,
    /// Of a shadow VMCS, without an exit
    pub shadow_vmwrite: u32,
    /// In root operation
    pub vmptrld: u16,
    /// In root operation
    pub vmclear: u16,
    /// In root operation
    pub invept: u16,
    /// In root operation
    pub invvpid: u16,
}

impl Counts {
    /// What came since `before`.
    pub fn since(self, before: Counts) -> Counts {
        Counts {
            vmread: self.vmread.wrapping_sub(before.vmread),
            vmwrite: self.vmwrite.wrapping_sub(before.vmwrite),
            shadow_vmread: self.shadow_vmread.wrapping_sub(before.shadow_vmread),
            shadow_vmwrite: self.shadow_vmwrite.wrapping_sub(before.shadow_vmwrite),
            vmptrld: self.vmptrld.wrapping_sub(before.vmptrld),
            vmclear: self.vmclear.wrapping_sub(before.vmclear),
            invept: self.invept.wrapping_sub(before.invept),
            invvpid: self.invvpid.wrapping_sub(before.invvpid),
        }
    }

    /// Both together.
    pub fn plus(self, more: Counts) -> Counts {
        Counts::default().since(Counts::default().since(self).since(more))
    }
}

/// What a VM exit, entry or failure says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Exit reason, or VM-instruction error
    pub reason: u32,
    /// Interruption information
    pub event: u32,
    /// Linear address of the instruction
    pub rip: u64,
    /// Exit qualification
    pub qualification: u64,
    /// Guest-physical address, or encoding of a field
    pub address: u64,
    /// RAX
    pub rax: u64,
    /// RCX
    pub rcx: u64,
    /// RDX
    pub rdx: u64,
    /// IDT-vectoring information
    pub vectoring: u32,
    /// Instruction length
    pub length: u32,
    /// Instruction information
    pub info: u32,
    /// Mode and CPL
    pub mode: u32,
    /// Value of a register operand of VMREAD or VMWRITE
    pub operand: u64,
    /// So far
    pub counts: Counts,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// A guest is left
    Exit(Facts),
    /// A guest is entered
    Entry(Facts),
    /// A VMX instruction fails with an error number
    Fail(Facts),
    /// Fields and their values
    Fields(Vec<(u32, u64)>),
}

/// One record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// When
    pub tick: u64,
    /// The current VMCS
    pub vmcs: u64,
    /// On which CPU
    pub cpu: u32,
    /// What this CPU has executed until then, modulo 2^32: instructions, or ticks where they are not counted
    pub executed: u32,
    /// What
    pub what: What,
}

/// Checks the first bytes of a log and returns the records' bytes.
///
/// # Errors
/// If it is no such log, or of another version.
pub fn body(log: &[u8]) -> Result<&[u8]> {
    let (head, body) = log.split_at_checked(HEAD).unwrap_or_default();
    ensure!(head.get(..8) == Some(MAGIC), "it is no log of VM exits");
    let (version, size) = (u32_at(head, 8), u32_at(head, 12));
    ensure!(
        version == VERSION && size as usize == SIZE,
        "the log of VM exits has version {version}, not {VERSION}: another build of Bochs wrote it"
    );
    Ok(body)
}

/// The records; one that is cut at the end is left out, and so is one of a kind that is not known.
pub fn records(body: &[u8]) -> impl Iterator<Item = Record> {
    body.chunks_exact(SIZE).filter_map(record)
}

fn record(bytes: &[u8]) -> Option<Record> {
    let (tick, vmcs, executed, reason) = (u64_at(bytes, 0), u64_at(bytes, 8), u32_at(bytes, 20), u32_at(bytes, 24));
    let cpu = u16_at(bytes, 16).into();
    let what = match u16_at(bytes, 18) {
        1 => What::Exit(facts(bytes)),
        2 => What::Entry(facts(bytes)),
        3 => What::Fail(facts(bytes)),
        4 => {
            let count = (reason as usize).min(8);
            What::Fields((0..count).map(|n| (u32_at(bytes, 96 + 4 * n), u64_at(bytes, 32 + 8 * n))).collect())
        }
        _ => return None,
    };
    Some(Record { tick, vmcs, cpu, executed, what })
}

fn facts(bytes: &[u8]) -> Facts {
    Facts {
        reason: u32_at(bytes, 24),
        event: u32_at(bytes, 28),
        rip: u64_at(bytes, 32),
        qualification: u64_at(bytes, 40),
        address: u64_at(bytes, 48),
        rax: u64_at(bytes, 56),
        rcx: u64_at(bytes, 64),
        rdx: u64_at(bytes, 72),
        vectoring: u32_at(bytes, 80),
        length: u32_at(bytes, 84),
        info: u32_at(bytes, 88),
        mode: u32_at(bytes, 92),
        counts: Counts {
            vmread: u32_at(bytes, 96),
            vmwrite: u32_at(bytes, 100),
            shadow_vmread: u32_at(bytes, 104),
            shadow_vmwrite: u32_at(bytes, 108),
            vmptrld: u16_at(bytes, 112),
            vmclear: u16_at(bytes, 114),
            invept: u16_at(bytes, 116),
            invvpid: u16_at(bytes, 118),
        },
        operand: u64_at(bytes, 120),
    }
}

/// A record as the emulator writes it.
pub fn bytes(record: &Record) -> Vec<u8> {
    let (kind, reason, event) = match &record.what {
        What::Exit(f) => (1u16, f.reason, f.event),
        What::Entry(f) => (2, f.reason, f.event),
        What::Fail(f) => (3, f.reason, f.event),
        What::Fields(list) => (4, list.len() as u32, 0),
    };
    let mut out = Vec::new();
    let mut add = |bytes: &[u8]| out.extend_from_slice(bytes);
    add(&record.tick.to_le_bytes());
    add(&record.vmcs.to_le_bytes());
    add(&(record.cpu as u16).to_le_bytes());
    add(&kind.to_le_bytes());
    for word in [record.executed, reason, event] {
        add(&word.to_le_bytes());
    }
    match &record.what {
        What::Exit(f) | What::Entry(f) | What::Fail(f) => {
            [f.rip, f.qualification, f.address, f.rax, f.rcx, f.rdx].iter().for_each(|v| add(&v.to_le_bytes()));
            let c = f.counts;
            let words = [f.vectoring, f.length, f.info, f.mode, c.vmread, c.vmwrite, c.shadow_vmread, c.shadow_vmwrite];
            words.iter().for_each(|v| add(&v.to_le_bytes()));
            [c.vmptrld, c.vmclear, c.invept, c.invvpid].iter().for_each(|v| add(&v.to_le_bytes()));
            add(&f.operand.to_le_bytes());
        }
        What::Fields(list) => {
            let of = |n: usize| list.get(n).copied().unwrap_or_default();
            (0..8).for_each(|n| add(&of(n).1.to_le_bytes()));
            (0..8).for_each(|n| add(&of(n).0.to_le_bytes()));
        }
    }
    out
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    part.map(u64::from_le_bytes).unwrap_or_default()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let part = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    part.map(u32::from_le_bytes).unwrap_or_default()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let part = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    part.map(u16::from_le_bytes).unwrap_or_default()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A log of these records.
    pub fn log(records: &[Record]) -> Vec<u8> {
        let mut log = MAGIC.to_vec();
        log.extend(VERSION.to_le_bytes());
        log.extend((SIZE as u32).to_le_bytes());
        records.iter().for_each(|record| log.extend(bytes(record)));
        log
    }

    #[test]
    fn what_the_emulator_writes_is_read_and_a_cut_record_is_left_out() {
        let counts = Counts { vmread: 70_000, vmptrld: 3, ..Counts::default() };
        let facts = Facts { reason: 10, rip: 7, operand: 9, rax: 1, mode: 0x104, counts, ..Facts::default() };
        let all = [
            Record { tick: 5, vmcs: 0x1000, cpu: 1, executed: 100 + 5, what: What::Exit(facts) },
            Record {
                tick: 6,
                vmcs: 0x1000,
                cpu: 1,
                executed: 100 + 6,
                what: What::Fields(vec![(0x4000, 1), (0x681c, u64::MAX)]),
            },
            Record { tick: 7, vmcs: 0x1000, cpu: 1, executed: 100 + 7, what: What::Entry(Facts::default()) },
            Record {
                tick: 8,
                vmcs: 0x1000,
                cpu: 1,
                executed: 100 + 8,
                what: What::Fail(Facts { reason: 7, ..Facts::default() }),
            },
        ];
        let mut log = log(&all);
        assert_eq!(records(body(&log).unwrap()).collect::<Vec<_>>(), all);
        log.truncate(log.len() - 1);
        assert_eq!(records(body(&log).unwrap()).count(), 3);
    }

    #[test]
    fn another_file_or_version_is_refused() {
        assert!(body(b"hello").is_err() && body(b"").is_err());
        let mut old = log(&[]);
        old[8] = 1;
        assert!(body(&old).unwrap_err().to_string().contains("version 1, not 3"));
    }

    #[test]
    fn counts_go_on_when_their_words_are_full() {
        let before = Counts { vmptrld: u16::MAX, vmread: u32::MAX, ..Counts::default() };
        let after = Counts { vmptrld: 1, vmread: 2, ..Counts::default() };
        let since = after.since(before);
        assert_eq!((since.vmptrld, since.vmread), (2, 3));
        assert_eq!(since.plus(since).vmread, 6);
    }
}
