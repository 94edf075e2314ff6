//! Boot modules that nvmx must refuse, made on the spot.

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
