//! ACPI tables that list the CPUs: RSDP, RSDT, MADT.
//!
//! Source: ACPI Specification 6.5, "Root System Description Pointer (RSDP)", "System Description Table Header",
//! "Multiple APIC Description Table (MADT)".

/// Where the RSDP goes: a PC's BIOS area, where operating systems look for it.
pub const PLACE: u32 = 0xE_0000;
const LOCAL_APIC: u32 = 0xFEE0_0000;
const IO_APIC: u32 = 0xFEC0_0000;

/// The bytes from [`PLACE`] on, for so many CPUs, whose local APICs count up from 0.
pub fn tables(cpus: u8) -> Vec<u8> {
    let (rsdt_at, madt_at) = (PLACE + 64, PLACE + 128);
    let mut bytes = b"RSD PTR \0NVMX  \0".to_vec();
    bytes.extend(rsdt_at.to_le_bytes());
    seal(&mut bytes, 8);
    bytes.resize(64, 0);

    bytes.extend(table(b"RSDT", 1, &madt_at.to_le_bytes()));
    bytes.resize(128, 0);

    let mut madt = LOCAL_APIC.to_le_bytes().to_vec();
    // There are 8259s too.
    madt.extend(1u32.to_le_bytes());
    // Local APICs, enabled
    (0..cpus).for_each(|id| madt.extend([0, 8, id, id, 1, 0, 0, 0]));
    // An I/O APIC with interrupts from 0
    madt.extend([1, 12, cpus, 0]);
    madt.extend(IO_APIC.to_le_bytes());
    madt.extend(0u32.to_le_bytes());
    bytes.extend(table(b"APIC", 4, &madt));
    bytes
}

fn table(signature: &[u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    bytes.extend((36 + content.len() as u32).to_le_bytes());
    bytes.extend([revision, 0]);
    bytes.extend(b"NVMX  NVMXVMM ");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(b"NVMX");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(content);
    seal(&mut bytes, 9);
    bytes
}

/// Makes the bytes add up to 0.
fn seal(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_adds_up_and_is_where_the_one_before_says() {
        let bytes = tables(3);
        let sum = |part: &[u8]| part.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((sum(&bytes[..20]), &bytes[..8]), (0, &b"RSD PTR "[..]));
        let rsdt = (word(16) - PLACE) as usize;
        assert_eq!((&bytes[rsdt..rsdt + 4], word(rsdt + 4)), (&b"RSDT"[..], 40));
        assert_eq!(sum(&bytes[rsdt..rsdt + 40]), 0);
        let madt = (word(rsdt + 36) - PLACE) as usize;
        assert_eq!((&bytes[madt..madt + 4], sum(&bytes[madt..])), (&b"APIC"[..], 0));
        assert_eq!(word(madt + 4) as usize, bytes.len() - madt);
        assert_eq!((&bytes[madt + 44 + 16..madt + 44 + 20], bytes.len() - madt), (&[0, 8, 2, 2][..], 44 + 3 * 8 + 12));
    }
}
