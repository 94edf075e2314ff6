//! Multiboot 2 boot information, read from a loader.
//!
//! Source: Multiboot2 Specification 2.0, "Boot information format".

use crate::{
    addr::Hpa,
    boot::{
        info::{BootInfo, InfoError, LoadedBy, Module, Rsdp, read_command_line, read_text},
        multiboot::tag,
    },
    mm::{PhysMem, Span, map::RangeKind},
};

/// What EAX holds when a multiboot2 loader starts an image.
pub const BOOT_MAGIC: u32 = 0x36D7_6289;

/// Longest information that is read, in bytes; longer ones are malformed.
const MAX_SIZE: u64 = 0x10_0000;

/// Reads the boot information at `at`.
pub fn read(at: Hpa, memory: &impl PhysMem) -> Result<BootInfo, InfoError> {
    let total = u64::from(memory.read_u32(at));
    if total > MAX_SIZE {
        return Err(InfoError::Malformed("its size is not plausible"));
    }
    let mut info = BootInfo { protocol: LoadedBy::Multiboot2, ..BootInfo::default() };
    let mut offset = 8;
    while offset + 8 <= total {
        let field = |of: u64| Hpa::new(at.get().wrapping_add(offset + of));
        let (kind, size) = (memory.read_u32(field(0)), u64::from(memory.read_u32(field(4))));
        if size < 8 || offset + size > total {
            return Err(InfoError::Malformed("a tag reaches beyond its end"));
        }
        match kind {
            tag::END => break,
            tag::COMMAND_LINE => info.command_line = read_command_line(field(8), memory)?,
            tag::LOADER_NAME => info.loader = read_text(field(8), memory).unwrap_or_default(),
            tag::MODULE => {
                let span = Span::new(memory.read_u32(field(8)).into(), memory.read_u32(field(12)).into());
                let command_line = read_command_line(field(16), memory)?;
                info.modules.try_push(Module { span, command_line }).map_err(|_| InfoError::TooManyModules)?;
            }
            tag::MAP => {
                let entry_size = u64::from(memory.read_u32(field(8)));
                if entry_size < 24 {
                    return Err(InfoError::Malformed("an entry of the memory map is too short"));
                }
                let mut entry = 16;
                while entry + entry_size <= size {
                    let span = Span::sized(memory.read_u64(field(entry)), memory.read_u64(field(entry + 8)));
                    info.memory.add(span, RangeKind::from_e820(memory.read_u32(field(entry + 16))))?;
                    entry += entry_size;
                }
            }
            // The new one wins, in whichever order they come.
            tag::RSDP_OLD if info.rsdp.is_none() => info.rsdp = Some(read_rsdp(field(8), size - 8, memory)),
            tag::RSDP_NEW => info.rsdp = Some(read_rsdp(field(8), size - 8, memory)),
            _ => info.extras.take_tag(kind, field(0), size, memory),
        }
        offset += size.next_multiple_of(8);
    }
    Ok(info)
}

fn read_rsdp(at: Hpa, size: u64, memory: &impl PhysMem) -> Rsdp {
    let mut bytes = [0; 36];
    memory.read_bytes(at, &mut bytes);
    bytes.into_iter().take(size as usize).collect()
}
