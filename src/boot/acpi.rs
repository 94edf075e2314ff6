//! The processors, from ACPI: RSDP, then RSDT or XSDT, then MADT.
//!
//! Tables come from firmware: they are checked, not trusted. Without a list that is whole nvmx does not start, since L2 could
//! start a processor that nvmx does not know.
//!
//! Source: ACPI Specification 6.5, "Root System Description Pointer (RSDP)", "System Description Table Header", and
//! "Multiple APIC Description Table (MADT)".

use core::fmt;

use crate::{
    addr::{Gpa, Hpa},
    boot::{
        info::Rsdp,
        machine::{CpuList, MAX_CPUS},
    },
    mm::{GuestMemory, PhysMem},
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
    /// It lists more processors than nvmx can hold.
    TooManyCpus,
    /// It lies where nvmx lies.
    InOwnRange,
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
            Self::InOwnRange => f.write_str("an ACPI table lies in nvmx's own memory"),
            Self::NoMadt => f.write_str("ACPI lists no interrupt controllers (MADT)"),
            Self::TooManyCpus => {
                write!(f, "ACPI lists more than {MAX_CPUS} processors, which is the most that nvmx can hold")
            }
        }
    }
}

const HEADER: u64 = 36;
/// Where a table has its checksum.
const CHECKSUM: u64 = 9;
/// Flags of a processor: it can be started, or could be later.
const ENABLED: u32 = 1 << 0;
const ONLINE_CAPABLE: u32 = 1 << 1;
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

/// The processors that the MADT lists and that can be started.
pub fn cpus(rsdp: &Rsdp, memory: &impl PhysMem) -> Result<CpuList, AcpiError> {
    let madt = find_madt(rsdp, memory)?;
    let mut cpus = CpuList::new();
    for_each_cpu(&madt, memory, |cpu| {
        // A processor may be in both kinds of entries.
        if cpu.flags & ENABLED != 0 && !cpus.contains(&cpu.apic_id) {
            cpus.try_push(cpu.apic_id).map_err(|_| AcpiError::TooManyCpus)?;
        }
        Ok(())
    })?;
    Ok(cpus)
}

/// Marks all processors but those that `keep` names as not to be started, now or later, in the table where it lies; returns
/// how many are left.
pub fn disable(rsdp: &Rsdp, guest: &GuestMemory<impl PhysMem>, keep: impl Fn(u32) -> bool) -> Result<usize, AcpiError> {
    let memory = guest.phys();
    let put = |at: Hpa, bytes: &[u8]| guest.write_bytes(Gpa::new(at.get()), bytes).map_err(|_| AcpiError::InOwnRange);
    let madt = find_madt(rsdp, memory)?;
    let mut left = 0;
    for_each_cpu(&madt, memory, |cpu| {
        if cpu.flags & ENABLED != 0 && keep(cpu.apic_id) {
            left += 1;
        } else if cpu.flags & (ENABLED | ONLINE_CAPABLE) != 0 {
            put(cpu.flags_at, &(cpu.flags & !(ENABLED | ONLINE_CAPABLE)).to_le_bytes())?;
        }
        Ok(())
    })?;
    let at = Hpa::new(madt.at + CHECKSUM);
    let mut old = [0u8];
    memory.read_bytes(at, &mut old);
    put(at, &[old[0].wrapping_sub(total(madt.at, madt.length, memory))])?;
    Ok(left)
}

/// An entry of a processor.
struct CpuEntry {
    apic_id: u32,
    flags: u32,
    flags_at: Hpa,
}

fn for_each_cpu(
    madt: &Table,
    memory: &impl PhysMem,
    mut each: impl FnMut(CpuEntry) -> Result<(), AcpiError>,
) -> Result<(), AcpiError> {
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
            (0, 8..) => Some((u32::from(memory.read_u32(field(0)).to_le_bytes()[3]), field(4))),
            // Processor local x2APIC: reserved, x2APIC id, flags.
            (9, 16..) => Some((memory.read_u32(field(4)), field(8))),
            _ => None,
        };
        if let Some((apic_id, flags_at)) = cpu {
            each(CpuEntry { apic_id, flags: memory.read_u32(flags_at), flags_at })?;
        }
        offset += u64::from(length);
    }
    Ok(())
}

/// True if the tables are those of an emulated PC: Bochs and QEMU name the same maker.
pub fn is_emulator(rsdp: &Rsdp) -> bool {
    rsdp.get(9..15) == Some(b"BOCHS ")
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
    if total(at, length, memory) != 0 {
        return Err(AcpiError::BadChecksum(signature));
    }
    Ok(Table { at, length })
}

/// All bytes of a table added up.
fn total(at: u64, length: u64, memory: &impl PhysMem) -> u8 {
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
    total
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mm::{Span, phys::VecMem};

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
            assert_eq!(cpus(&rsdp, &memory).unwrap().as_slice(), [0, 2, 0x1234]);
        }
    }

    /// A machine whose MADT has this content behind its header and first eight bytes.
    fn with_entries(entries: &[u8]) -> (VecMem, Rsdp) {
        let memory = machine(2);
        let rsdp = find_rsdp(&memory).unwrap();
        let mut content = vec![0; 8];
        content.extend(entries);
        memory.write_bytes(Hpa::new(0x10_2000), &[0; 0x4000]);
        memory.write_bytes(Hpa::new(0x10_8000), &sdt(b"APIC", &content));
        memory.write_bytes(Hpa::new(0x10_1000), &sdt(b"XSDT", &0x10_8000u64.to_le_bytes()));
        (memory, rsdp)
    }

    fn x2apic(id: u32, flags: u8) -> Vec<u8> {
        let mut entry = vec![9, 16, 0, 0];
        entry.extend(id.to_le_bytes());
        entry.extend([flags, 0, 0, 0, 0, 0, 0, 0]);
        entry
    }

    #[test]
    fn as_many_processors_as_nvmx_holds_are_listed_and_one_more_is_an_error() {
        for count in [128, 256, MAX_CPUS] {
            let entries: Vec<u8> = (0..count as u32).flat_map(|id| x2apic(0x100 * id, 1)).collect();
            let (memory, rsdp) = with_entries(&entries);
            let found = cpus(&rsdp, &memory).unwrap();
            assert!(found.iter().copied().eq((0..count as u32).map(|id| 0x100 * id)));
        }
        let entries: Vec<u8> = (0..=MAX_CPUS as u32).flat_map(|id| x2apic(id, 1)).collect();
        let (memory, rsdp) = with_entries(&entries);
        assert_eq!(cpus(&rsdp, &memory), Err(AcpiError::TooManyCpus));
        assert!(AcpiError::TooManyCpus.to_string().contains(&MAX_CPUS.to_string()));
    }

    #[test]
    fn entries_of_sockets_that_are_empty_take_no_room() {
        let empty: Vec<u8> = (0..2 * MAX_CPUS as u32).flat_map(|_| x2apic(u32::MAX, 0)).collect();
        let entries = [x2apic(7, 1), empty, x2apic(8, 1), x2apic(8, 1)].concat();
        let (memory, rsdp) = with_entries(&entries);
        assert_eq!(cpus(&rsdp, &memory).unwrap().as_slice(), [7, 8]);
    }

    #[test]
    fn what_is_disabled_cannot_be_started_now_or_later_and_the_checksum_stays_right() {
        for revision in [0, 2] {
            let memory = machine(revision);
            let rsdp = find_rsdp(&memory).unwrap();
            assert_eq!(disable(&rsdp, &GuestMemory::new(&memory, Span::new(0, 0), 52), |id| id == 2), Ok(1));
            assert_eq!(cpus(&rsdp, &memory).unwrap().as_slice(), [2]);
        }
        let (memory, rsdp) = with_entries(&[x2apic(1, 1), x2apic(2, 2), x2apic(3, 3), x2apic(4, 0x80)].concat());
        assert_eq!(disable(&rsdp, &GuestMemory::new(&memory, Span::new(0, 0), 52), |id| id == 1), Ok(1));
        let madt = find_madt(&rsdp, &memory).unwrap_or_else(|e| panic!("{e}"));
        let mut flags = Vec::new();
        for_each_cpu(&madt, &memory, |cpu| {
            flags.push(cpu.flags);
            Ok(())
        })
        .unwrap();
        assert_eq!(flags, [1, 0, 0, 0x80], "online capable goes too, and what is not known stays");
    }

    #[test]
    fn the_maker_of_an_emulated_pc_is_known() {
        let memory = machine(0);
        assert!(!is_emulator(&find_rsdp(&memory).unwrap()));
        let mut rsdp: Rsdp = b"RSD PTR \0BOCHS ".iter().copied().collect();
        assert!(is_emulator(&rsdp));
        rsdp.truncate(12);
        assert!(!is_emulator(&rsdp));
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
