//! A boot sector as L2: what firmware would start, from a drive that is L2's.
//!
//! nvmx reads no drives. The loader's user hands over the first sectors as a module with the command line `boot-sector=0x80`, the
//! drive's number. They are put where firmware puts them, and L2 starts there in real mode with firmware's vectors and data
//! below it: its own code reads the rest by INT 13h.
//!
//! Source: BIOS Boot Specification 1.01, "Boot via INT 19h"; "El Torito" Bootable CD-ROM Format Specification 1.0, "INT 13
//! Functions" (both hand DL and 0000:7C00 over).

use super::{LoadError, Protocol, Start};
use crate::addr::Gpa;
use crate::mm::{GuestMemory, MemoryMap, PhysMem, Span, map::RangeKind};

/// Where firmware loads a boot sector.
const PLACE: u64 = 0x7C00;
/// What the module's command line starts with.
const WORD: &str = "boot-sector=";

/// The number of the drive, if this is a boot sector's command line.
///
/// # Errors
/// If the word is there and its number is none of 8 bits.
pub fn drive(command_line: &[u8]) -> Option<Result<u8, LoadError>> {
    let mut words = command_line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let text = words.next()?.strip_prefix(WORD.as_bytes())?;
    let digits = text.strip_prefix(b"0x").and_then(|digits| core::str::from_utf8(digits).ok());
    let number = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
    Some(number.ok_or(LoadError::BadDrive))
}

/// Puts the sectors at `module` in their place.
pub fn load<P: PhysMem>(
    guest: &GuestMemory<P>,
    memory: &MemoryMap,
    module: Span,
    drive: u8,
) -> Result<Start, LoadError> {
    let to = Span::sized(PLACE, module.len());
    let fits = memory.iter().any(|range| range.kind == RangeKind::Usable && range.span.contains(to));
    if module.is_empty() || !fits {
        return Err(LoadError::NoMemory(to));
    }
    super::copy(guest, module, to)?;
    let none = Gpa::new(0);
    let protocol = Protocol::BootSector;
    Ok(Start {
        protocol,
        entry: Gpa::new(PLACE),
        eax: 0,
        ebx: none,
        edx: drive.into(),
        esi: none,
        // Below itself, as most firmware leaves it.
        esp: Gpa::new(PLACE),
        gdt: None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MIB, OWN, machine, memory_map};
    use super::super::{Extras, load as load_module};
    use super::*;
    use crate::addr::Hpa;

    fn start(content: &[u8], line: &str, more: usize) -> (Result<Start, LoadError>, Vec<u8>) {
        let mut modules = vec![(2 * MIB, content, line)];
        modules.resize(1 + more, (3 * MIB, &[1, 2, 3][..], ""));
        let (guest, mut modules) = machine(&modules);
        let result = load_module(&guest, &memory_map(), &mut modules, None, &Extras::default());
        (result, guest.phys().bytes(PLACE, 4))
    }

    #[test]
    fn a_boot_sector_lies_where_firmware_puts_it_and_gets_its_drive() {
        let (started, there) = start(&[0xEB, 0xFE, 0x55, 0xAA], "boot-sector=0x81 more", 0);
        let started = started.unwrap();
        assert_eq!((started.protocol, started.entry, started.edx), (Protocol::BootSector, Gpa::new(0x7C00), 0x81));
        assert_eq!(there, [0xEB, 0xFE, 0x55, 0xAA]);
    }

    #[test]
    fn what_is_below_and_behind_it_is_firmwares() {
        let (guest, mut modules) = machine(&[(2 * MIB, &[7; 512], "boot-sector=0xe0")]);
        guest.phys().write_u64(Hpa::new(0x54), 0xF000_FF53_F000_FEA5);
        let before = guest.phys().bytes(0, PLACE as usize);
        load_module(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
        assert_eq!(guest.phys().bytes(0, PLACE as usize), before);
        assert_eq!(guest.phys().bytes(PLACE + 512, 64), [0; 64]);
    }

    #[test]
    fn a_number_that_is_none_modules_beside_it_and_too_many_sectors_are_refused() {
        for line in ["boot-sector=", "boot-sector=80", "boot-sector=0x100", "boot-sector=0xZZ"] {
            assert_eq!(start(&[0; 512], line, 0).0.err(), Some(LoadError::BadDrive), "{line}");
        }
        assert_eq!(start(&[0; 512], "boot-sector=0x80", 2).0.err(), Some(LoadError::TooManyForSector(2)));
        let (large, none) = (vec![0; 0x9_8000], Vec::new());
        for content in [&large, &none] {
            let error = start(content, "boot-sector=0x80", 0).0.err();
            assert!(matches!(error, Some(LoadError::NoMemory(_))), "{error:?}");
        }
        assert!(OWN.start() > PLACE);
        // The words of other images are theirs.
        assert!(drive(b"events=5 boot-sector=0x80").is_none() && drive(b"").is_none());
    }
}
