//! Boot modules that no compiler makes, made on the spot: files that nvmx must refuse, and one in a format that it must load.

use anyhow::Result;
use std::path::{Path, PathBuf};

/// The files, in a folder of their own.
pub struct Fixtures {
    folder: PathBuf,
}

impl Fixtures {
    /// Writes all files.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(target: &Path, memory: u32) -> Result<Self> {
        let folder = target.join("nvmx").join("fixtures");
        std::fs::create_dir_all(&folder)?;
        let fixtures = Fixtures { folder };
        std::fs::write(fixtures.text(), "This is no ELF file, however long it is looked at.\n")?;
        std::fs::write(fixtures.headless(), elf(0x20_0000, false))?;
        std::fs::write(fixtures.high(), elf(inside_nvmx(memory), true))?;
        std::fs::write(fixtures.flat(), flat(FLAT_ADDRESS + FLAT_CODE))?;
        std::fs::write(fixtures.astray(), flat(FLAT_ADDRESS - 1))?;
        Ok(fixtures)
    }

    /// A text file.
    pub fn text(&self) -> PathBuf {
        self.folder.join("text")
    }

    /// An ELF file without a multiboot header.
    pub fn headless(&self) -> PathBuf {
        self.folder.join("headless")
    }

    /// A multiboot image that is no ELF file.
    pub fn flat(&self) -> PathBuf {
        self.folder.join("flat")
    }

    /// The same with an entry point in front of what is loaded.
    pub fn astray(&self) -> PathBuf {
        self.folder.join("astray")
    }

    /// A multiboot ELF file that is linked for the top of memory.
    pub fn high(&self) -> PathBuf {
        self.folder.join("high")
    }
}

/// An address that nvmx's memory surely covers on a machine with so many MiB: nvmx lives at the top, in some tens of MiB, and
/// firmware tables may lie above it.
pub fn inside_nvmx(memory: u32) -> u32 {
    memory.saturating_sub(8).saturating_mul(1 << 20)
}

const ELF_HEADER: u32 = 52;
const PROGRAM_HEADER: u32 = 32;
const SIZE: u32 = 0x1000;

/// A 32-bit ELF file of one page that halts, for this physical address.
fn elf(address: u32, multiboot: bool) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend([0x7F, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let halves = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let words = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    // Executable, 80386
    halves(&mut file, &[2, 3]);
    // Version, entry, program headers, no section headers, no flags
    words(&mut file, &[1, address + 0x100, ELF_HEADER, 0, 0]);
    halves(&mut file, &[52, 32, 1, 40, 0, 0]);
    // One segment that is the whole file: load, offset, addresses, sizes, readable and executable, alignment
    words(&mut file, &[1, 0, address, address, SIZE, SIZE, 5, SIZE]);
    assert_eq!(file.len() as u32, ELF_HEADER + PROGRAM_HEADER);
    if multiboot {
        file.resize(0x60, 0);
        words(&mut file, &[0x1BAD_B002, 0, 0x1BAD_B002u32.wrapping_neg()]);
    }
    file.resize(0x100, 0);
    // cli; hlt; jmp to the hlt
    file.extend([0xFA, 0xF4, 0xEB, 0xFD]);
    file.resize(SIZE as usize, 0);
    file
}

/// Where the flat image goes; a header is at its start.
const FLAT_ADDRESS: u32 = 0x20_0000;
/// Its code, after the header.
const FLAT_CODE: u32 = 0x20;
/// Its data.
const FLAT_TEXT: u32 = 0x100;

/// A multiboot 1 image of one piece, for a machine without anything else: it programs the serial port at once, pushes to the
/// stack that it was given, prints what it was given, and switches Bochs off.
fn flat(entry: u32) -> Vec<u8> {
    #[rustfmt::skip]
    const CODE: [u8; 148] = [
        // mov ebp, eax; mov esi, the data; seven times: register and value to the serial port; mov ecx, esp; push ebx
        0x89, 0xC5, 0xBE, 0x00, 0x01, 0x20, 0x00, 0xB9, 0x07, 0x00, 0x00, 0x00, 0xBA, 0xF8, 0x03, 0x00, 0x00,
        0x66, 0xAD, 0x00, 0xE2, 0xEE, 0xE2, 0xF4, 0x89, 0xE1, 0x53,
        // print; hex of ecx; print; hex of ebp; print; pop ebx; hex of [ebx]; print
        0xE8, 0x3B, 0x00, 0x00, 0x00, 0x89, 0xC8, 0xE8, 0x40, 0x00, 0x00, 0x00, 0xE8, 0x2F, 0x00, 0x00, 0x00,
        0x89, 0xE8, 0xE8, 0x34, 0x00, 0x00, 0x00, 0xE8, 0x23, 0x00, 0x00, 0x00, 0x5B, 0x8B, 0x03, 0xE8, 0x27,
        0x00, 0x00, 0x00, 0xE8, 0x16, 0x00, 0x00, 0x00,
        // until the last bit has left; eight bytes to port 0x8900; cli; hlt
        0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x40, 0x74, 0xF7, 0x66, 0xBA, 0x00, 0x89, 0xB9, 0x08, 0x00, 0x00,
        0x00, 0xF3, 0x6E, 0xFA, 0xF4,
        // print: a text up to its zero
        0xAC, 0x84, 0xC0, 0x74, 0x20, 0xE8, 0x1C, 0x00, 0x00, 0x00, 0xEB, 0xF4,
        // hex: eax in eight digits
        0xBF, 0x08, 0x00, 0x00, 0x00, 0xC1, 0xC0, 0x04, 0x50, 0x24, 0x0F, 0x3C, 0x0A, 0x1C, 0x69, 0x2F, 0xE8,
        0x05, 0x00, 0x00, 0x00, 0x58, 0x4F, 0x75, 0xEC, 0xC3,
        // put: al, when the port is ready
        0x88, 0xC4, 0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x20, 0x74, 0xFB, 0x66, 0xBA, 0xF8, 0x03, 0x88, 0xE0,
        0xEE, 0xC3,
    ];
    // Of the serial port: no interrupts, 115200 baud, 8N1, FIFOs on and cleared, ready.
    const UART: [[u8; 2]; 7] = [[0, 1], [0x80, 3], [1, 0], [0, 1], [3, 3], [0xC7, 2], [3, 4]];
    const TEXTS: &[u8] =
        b"@L2 check name=flat esp=\0 eax=\0\r\n@L2 say text=flags-\0\r\n@L2 end status=pass failed=0\r\n\0Shutdown";
    const ADDRESSES: u32 = 1 << 16;
    const MAGIC: u32 = 0x1BAD_B002;
    let header = [
        [MAGIC, ADDRESSES, MAGIC.wrapping_add(ADDRESSES).wrapping_neg(), FLAT_ADDRESS],
        [FLAT_ADDRESS, 0, FLAT_ADDRESS + 2 * SIZE, entry],
    ];
    let mut file: Vec<u8> = header.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
    file.extend(CODE);
    file.resize(FLAT_TEXT as usize, 0);
    file.extend(UART.as_flattened());
    file.extend(TEXTS);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{Object, ObjectSegment};

    #[test]
    fn the_made_elf_file_is_one_for_every_reader() {
        let data = elf(0x0FE0_0000, true);
        let elf = object::File::parse(&*data).unwrap();
        assert_eq!((elf.entry(), elf.segments().count()), (0x0FE0_0100, 1));
        let segment = elf.segments().next().unwrap();
        assert_eq!((segment.address(), segment.size()), (0x0FE0_0000, 0x1000));
    }
}
