//! ELF headers: which pieces of the file go where.

use crate::boot::guest_image::LoadError;
use crate::boot::guest_image::file::File;
use crate::boot::guest_image::header::{FileSegment, Segments};
use crate::mm::{PhysMem, Span};

const PT_LOAD: u32 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const LITTLE_ENDIAN: u8 = 1;

/// One program header, from either class.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    in_file: u64,
    in_memory: u64,
}

/// Checks that it is an ELF file of this processor.
pub fn check<M: PhysMem>(file: &File<'_, M>) -> Result<(), LoadError> {
    let right_class = matches!(file.bytes(0), Some([0x7F, b'E', b'L', b'F', 1 | 2, LITTLE_ENDIAN]));
    if right_class && matches!(file.u16(18), Some(EM_386 | EM_X86_64)) {
        return Ok(());
    }
    let mut first = [0; 8];
    for (offset, byte) in (0..file.len()).zip(&mut first) {
        *byte = file.bytes(offset).map_or(0, u8::from_le_bytes);
    }
    Err(LoadError::NotElf { size: file.len(), first })
}

/// The entry point as a physical address, and the loadable segments. [`check`] has passed.
pub fn read<M: PhysMem>(file: &File<'_, M>) -> Result<(u64, Segments), LoadError> {
    const CUT: LoadError = LoadError::BrokenElf("its headers are cut short");
    let wide = file.bytes(4) == Some([2]);
    let (entry, table, size, count) = if wide {
        (file.u64(24), file.u64(32), file.u16(54), file.u16(56))
    } else {
        (file.u32(24).map(u64::from), file.u32(28).map(u64::from), file.u16(42), file.u16(44))
    };
    let (entry, table) = (entry.ok_or(CUT)?, table.ok_or(CUT)?);
    let (size, count) = (u64::from(size.ok_or(CUT)?), u64::from(count.ok_or(CUT)?));

    let mut segments = Segments::new();
    let mut start = None;
    for n in 0..count {
        let at = table.checked_add(n * size).ok_or(CUT)?;
        let header = program_header(file, at, wide).ok_or(CUT)?;
        if header.kind != PT_LOAD || header.in_memory == 0 {
            continue;
        }
        if header.in_file > header.in_memory {
            return Err(LoadError::BrokenElf("a segment is larger in the file than in memory"));
        }
        if header.offset.checked_add(header.in_file).is_none_or(|end| end > file.len()) {
            return Err(LoadError::BrokenElf("a segment lies beyond the end of the file"));
        }
        let end = header.physical_address.checked_add(header.in_memory);
        let end = end.ok_or(LoadError::BrokenElf("a segment ends beyond the address space"))?;
        if let Some(within) = entry.checked_sub(header.virtual_address) {
            if within < header.in_memory && start.is_none() {
                start = Some(header.physical_address + within);
            }
        }
        let to = Span::new(header.physical_address, end);
        segments
            .try_push(FileSegment { offset: header.offset, in_file: header.in_file, to, zeroed: true })
            .map_err(|_| LoadError::BrokenElf("it has too many segments"))?;
    }
    if segments.is_empty() {
        return Err(LoadError::BrokenElf("it has no loadable segment"));
    }
    // Some images give the physical address itself.
    let start = start.or_else(|| segments.iter().any(|s| s.to.contains(Span::sized(entry, 1))).then_some(entry));
    Ok((start.ok_or(LoadError::BrokenElf("its entry point lies in no segment"))?, segments))
}

fn program_header<M: PhysMem>(file: &File<'_, M>, at: u64, wide: bool) -> Option<ProgramHeader> {
    let at = |offset: u64| at.checked_add(offset);
    let kind = file.u32(at(0)?)?;
    Some(if wide {
        ProgramHeader {
            kind,
            offset: file.u64(at(8)?)?,
            virtual_address: file.u64(at(16)?)?,
            physical_address: file.u64(at(24)?)?,
            in_file: file.u64(at(32)?)?,
            in_memory: file.u64(at(40)?)?,
        }
    } else {
        ProgramHeader {
            kind,
            offset: file.u32(at(4)?)?.into(),
            virtual_address: file.u32(at(8)?)?.into(),
            physical_address: file.u32(at(12)?)?.into(),
            in_file: file.u32(at(16)?)?.into(),
            in_memory: file.u32(at(20)?)?.into(),
        }
    })
}
