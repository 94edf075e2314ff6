//! The processors, from ACPI: RSDP, then RSDT or XSDT, then MADT.
//!
//! Tables come from firmware: they are checked, not trusted, so that a broken one costs the list of processors and no more.
//!
//! Source: ACPI Specification 6.5, "Root System Description Pointer (RSDP)", "System Description Table Header", and
//! "Multiple APIC Description Table (MADT)".

use core::fmt;

use crate::{
    addr::Hpa,
    boot::{
        info::Rsdp,
        machine::{Cpu, CpuList},
    },
    mm::PhysMem,
};

/// The list of processors cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AcpiError {
    /// No RSDP from the loader, none where a BIOS puts it.
    NoRsdp,
    /// A table is shorter or longer than its format allows.
    BadLength([u8; 4]),
    /// The bytes of a table do not add up to zero.
    BadChecksum([u8; 4]),
    /// There is no MADT.
    NoMadt,
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |f: &mut fmt::Formatter<'_>, what, signature: &[u8; 4]| {
            write!(f, "ACPI table {} has a bad {what}", signature.escape_ascii())
        };
        match self {
            Self::NoRsdp => f.write_str("no ACPI tables"),
            Self::BadLength(signature) => name(f, "length", signature),
            Self::BadChecksum(signature) => name(f, "checksum", signature),
            Self::NoMadt => f.write_str("ACPI lists no interrupt controllers (MADT)"),
        }
    }
}

const HEADER: u64 = 36;
/// Longest table that is read. A MADT with a thousand processors has 16 KiB.
const LONGEST: u64 = 0x1_0000;
/// Length of the part that every RSDP has and that its first checksum covers.
const RSDP_1: usize = 20;

/// Looks for the RSDP where a PC's BIOS puts it: the first KiB of the extended BIOS data area, and the ROM below 1 MiB.
pub fn find_rsdp(memory: &impl PhysMem) -> Option<Rsdp> {
    let extended = u64::from(memory.read_u32(Hpa::new(0x40E)) & 0xFFFF) << 4;
    let areas = [(extended, extended + 1024), (0xE_0000, 0x10_0000)];
    areas.into_iter().filter(|(start, _)| *start != 0).find_map(|(start, end)| {
        (start..end).step_by(16).find_map(|at| {
            if memory.read_u64(Hpa::new(at)) != u64::from_le_bytes(*b"RSD PTR ") {
                return None;
            }
            let mut bytes = [0; 36];
            memory.read_bytes(Hpa::new(at), &mut bytes);
            let (old, revision) = (&bytes[..RSDP_1], bytes[15]);
            let length = if revision >= 2 { bytes.len() } else { RSDP_1 };
            (sum(old) == 0).then(|| bytes.iter().copied().take(length).collect())
        })
    })
}

/// The processors that the MADT lists, those that cannot be started included.
pub fn cpus(rsdp: &Rsdp, memory: &impl PhysMem) -> Result<CpuList, AcpiError> {
    let madt = find_madt(rsdp, memory)?;
    let mut cpus = CpuList::new();
    // Behind the header: the local APIC's address and flags, then entries of type, length, content.
    let mut offset = HEADER + 8;
    while offset + 2 <= madt.length {
        let field = |of: u64| Hpa::new(madt.at + offset + of);
        let [kind, length, ..] = memory.read_u32(field(0)).to_le_bytes();
        if length < 2 || offset + u64::from(length) > madt.length {
            return Err(AcpiError::BadLength(*b"APIC"));
        }
        let cpu = match (kind, length) {
            // Processor local APIC: processor uid, APIC id, flags.
            (0, 8..) => Some((u32::from(memory.read_u32(field(0)).to_le_bytes()[3]), memory.read_u32(field(4)))),
            // Processor local x2APIC: reserved, x2APIC id, flags.
            (9, 16..) => Some((memory.read_u32(field(4)), memory.read_u32(field(8)))),
            _ => None,
        };
        if let Some((apic_id, flags)) = cpu {
            let known = cpus.iter().any(|cpu| cpu.apic_id == apic_id);
            if !known && cpus.try_push(Cpu { apic_id, enabled: flags & 1 != 0 }).is_err() {
                break;
            }
        }
        offset += u64::from(length);
    }
    Ok(cpus)
}

/// A table whose length and checksum are right.
struct Table {
    at: u64,
    length: u64,
}

fn find_madt(rsdp: &Rsdp, memory: &impl PhysMem) -> Result<Table, AcpiError> {
    let word = |at: usize| rsdp.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let quad = |at: usize| rsdp.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let revision = rsdp.get(15).copied().unwrap_or(0);
    // The XSDT has 64-bit pointers; an old RSDP has the RSDT only.
    let (root, pointer) = match quad(24).filter(|xsdt| revision >= 2 && *xsdt != 0) {
        Some(xsdt) => (table(xsdt, *b"XSDT", memory)?, 8),
        None => (table(word(16).ok_or(AcpiError::NoRsdp)?.into(), *b"RSDT", memory)?, 4),
    };
    let mut offset = HEADER;
    while offset + pointer <= root.length {
        let at = Hpa::new(root.at + offset);
        let at = if pointer == 8 { memory.read_u64(at) } else { memory.read_u32(at).into() };
        if memory.read_u32(Hpa::new(at)).to_le_bytes() == *b"APIC" {
            return table(at, *b"APIC", memory);
        }
        offset += pointer;
    }
    Err(AcpiError::NoMadt)
}

fn table(at: u64, signature: [u8; 4], memory: &impl PhysMem) -> Result<Table, AcpiError> {
    let length = u64::from(memory.read_u32(Hpa::new(at.wrapping_add(4))));
    if !(HEADER..=LONGEST).contains(&length) || at.checked_add(length).is_none() {
        return Err(AcpiError::BadLength(signature));
    }
    let mut total = 0u8;
    let mut buffer = [0; 64];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(buffer.len() as u64);
        let chunk = &mut buffer[..part as usize];
        memory.read_bytes(Hpa::new(at + done), chunk);
        total = total.wrapping_add(sum(chunk));
        done += part;
    }
    if total != 0 {
        return Err(AcpiError::BadChecksum(signature));
    }
    Ok(Table { at, length })
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mm::phys::VecMem;

    fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        bytes[at] = bytes[at].wrapping_sub(sum(&bytes));
        bytes
    }

    fn sdt(signature: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 36];
        bytes[..4].copy_from_slice(signature);
        bytes[4..8].copy_from_slice(&(36 + content.len() as u32).to_le_bytes());
        bytes.extend(content);
        with_checksum(bytes, 9)
    }

    fn madt() -> Vec<u8> {
        let mut content = vec![0; 8];
        content.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        content.extend([1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
        content.extend([0, 8, 1, 2, 1, 0, 0, 0]);
        content.extend([0, 8, 2, 4, 0, 0, 0, 0]);
        content.extend([9, 16, 0, 0, 0x34, 0x12, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
        sdt(b"APIC", &content)
    }

    const RSDP_AT: u64 = 0xF_5A20;

    /// Memory with a MADT reached by an RSDT, or by an XSDT with a broken RSDT.
    fn machine(revision: u8) -> VecMem {
        let memory = VecMem::new(0x20_0000);
        memory.write_bytes(Hpa::new(0x10_2000), &madt());
        memory.write_bytes(Hpa::new(0x10_3000), &sdt(b"FACP", &[0; 80]));
        let pointers = [0x10_3000u64, 0x10_2000];
        let narrow: Vec<u8> = pointers.iter().flat_map(|p| (*p as u32).to_le_bytes()).collect();
        let wide: Vec<u8> = pointers.iter().flat_map(|p| p.to_le_bytes()).collect();
        if revision < 2 {
            memory.write_bytes(Hpa::new(0x10_0000), &sdt(b"RSDT", &narrow));
        }
        memory.write_bytes(Hpa::new(0x10_1000), &sdt(b"XSDT", &wide));
        let mut rsdp = b"RSD PTR \0NVMX  ".to_vec();
        rsdp.push(revision);
        rsdp.extend(0x10_0000u32.to_le_bytes());
        let mut rsdp = with_checksum(rsdp, 8);
        rsdp.extend(36u32.to_le_bytes());
        rsdp.extend(0x10_1000u64.to_le_bytes());
        rsdp.extend([0; 4]);
        memory.write_bytes(Hpa::new(RSDP_AT), &rsdp);
        memory
    }

    #[test]
    fn processors_are_found_by_rsdt_and_by_xsdt() {
        for revision in [0, 2] {
            let memory = machine(revision);
            let rsdp = find_rsdp(&memory).unwrap();
            assert_eq!(rsdp.len(), if revision == 0 { 20 } else { 36 });
            let ids: Vec<_> = cpus(&rsdp, &memory).unwrap().iter().map(|cpu| (cpu.apic_id, cpu.enabled)).collect();
            assert_eq!(ids, [(0, true), (2, true), (4, false), (0x1234, true)]);
        }
    }

    #[test]
    fn broken_tables_are_refused() {
        assert_eq!(find_rsdp(&VecMem::new(0x20_0000)), None);
        let memory = machine(0);
        let rsdp = find_rsdp(&memory).unwrap();
        memory.write_bytes(Hpa::new(0x10_2030), &[0x55]);
        assert_eq!(cpus(&rsdp, &memory), Err(AcpiError::BadChecksum(*b"APIC")));
        memory.write_bytes(Hpa::new(0x10_2000), b"NONE");
        assert_eq!(cpus(&rsdp, &memory), Err(AcpiError::NoMadt));
        memory.write_bytes(Hpa::new(0x10_0004), &[0; 4]);
        assert_eq!(cpus(&rsdp, &memory), Err(AcpiError::BadLength(*b"RSDT")));
        memory.write_bytes(Hpa::new(RSDP_AT + 9), b"X");
        assert_eq!(find_rsdp(&memory), None);
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_panic(
            content in prop::collection::vec(any::<u8>(), 0..200), length in any::<u32>(), keep_length: bool,
        ) {
            let memory = machine(0);
            let rsdp = find_rsdp(&memory).unwrap();
            let mut table = sdt(b"APIC", &content);
            if !keep_length { table[4..8].copy_from_slice(&length.to_le_bytes()); }
            memory.write_bytes(Hpa::new(0x10_2000), &with_checksum(table, 9));
            let _ = cpus(&rsdp, &memory);
        }
    }
}
