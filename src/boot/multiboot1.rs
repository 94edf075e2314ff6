//! Multiboot 1 boot information, read from a loader.
//!
//! Source: Multiboot Specification 0.6.96, "Boot information format".

use crate::{
    addr::Hpa,
    boot::{
        extras::Extras,
        info::{BootInfo, InfoError, ListedModule, ModuleList, read_text},
        multiboot::layout,
        text::Text,
    },
    mm::{PhysMem, Span, map::RangeKind},
};

/// What EAX holds when a multiboot loader starts an image.
pub const BOOT_MAGIC: u32 = 0x2BAD_B002;

/// Longest memory map that is read, in bytes; longer ones are malformed.
const MAX_MAP: u64 = 0x1_0000;

/// Reads the boot information at `at`.
pub fn read(at: Hpa, memory: &impl PhysMem) -> Result<BootInfo, InfoError> {
    let field = |offset: u64| memory.read_u32(Hpa::new(at.get().wrapping_add(offset)));
    let pointer = |offset: u64| Hpa::new(field(offset).into());
    let flags = field(layout::FLAGS);
    let mut info = BootInfo { extras: Extras::multiboot1(at, memory), ..BootInfo::default() };

    if flags & layout::HAS_LOADER_NAME != 0 {
        info.loader = read_text(pointer(layout::LOADER_NAME), memory).unwrap_or_default();
    }
    if flags & layout::HAS_COMMAND_LINE != 0 {
        info.command_line = Text::find(pointer(layout::COMMAND_LINE), memory)?;
    }
    if flags & layout::HAS_MODULES != 0 {
        let (first, count) = (pointer(layout::MODULES).get(), field(layout::MODULES_COUNT));
        info.list = ModuleList { first, end: first + layout::MODULE_SIZE * u64::from(count), count, named: false };
    }
    // QEMU puts the file's name in front of every command line, GRUB does not.
    if info.loader.as_str() == "qemu" {
        // No option has a slash; a folder's name may have a blank, but not in the list of modules.
        info.command_line = info.command_line.without_path(memory);
        info.list.named = true;
    }
    if flags & layout::HAS_MAP != 0 {
        read_map(&mut info, pointer(layout::MAP), field(layout::MAP_LENGTH).into(), memory)?;
    } else if flags & layout::HAS_MEMORY != 0 {
        info.given_up +=
            info.memory.add_loaded(Span::sized(0, u64::from(field(layout::MEM_LOWER)) << 10), RangeKind::Usable);
        info.given_up +=
            info.memory.add_loaded(Span::sized(1 << 20, u64::from(field(layout::MEM_UPPER)) << 10), RangeKind::Usable);
    }
    Ok(info)
}

/// The module whose entry is at `at`, which becomes that of the next: start, end, command line, 32 bits each.
pub(super) fn module(at: &mut u64, memory: &impl PhysMem) -> Result<ListedModule, InfoError> {
    let entry = |offset| u64::from(memory.read_u32(Hpa::new(at.wrapping_add(offset))));
    let span = Span::new(entry(0), entry(4));
    let line = Text::find(Hpa::new(entry(8)), memory)?;
    *at += layout::MODULE_SIZE;
    Ok(ListedModule { span, line })
}

/// Entries: size of what follows (32 bits), base, length (64 bits each), type.
fn read_map(info: &mut BootInfo, at: Hpa, length: u64, memory: &impl PhysMem) -> Result<(), InfoError> {
    if length > MAX_MAP {
        return Err(InfoError::Malformed("the memory map is too long"));
    }
    let mut offset = 0;
    while offset + 24 <= length {
        let entry = |field: u64| Hpa::new(at.get().wrapping_add(offset + field));
        let size = memory.read_u32(entry(0));
        if size < 20 {
            return Err(InfoError::Malformed("an entry of the memory map is too short"));
        }
        let span = Span::sized(memory.read_u64(entry(4)), memory.read_u64(entry(12)));
        info.given_up += info.memory.add_loaded(span, RangeKind::from_e820(memory.read_u32(entry(20))));
        offset += u64::from(size) + 4;
    }
    Ok(())
}
