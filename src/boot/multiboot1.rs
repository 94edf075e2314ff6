//! Multiboot 1 boot information, read from a loader.
//!
//! Source: Multiboot Specification 0.6.96, "Boot information format".

use crate::{
    addr::Hpa,
    boot::{
        extras::Extras,
        info::{BootInfo, InfoError, Module, read_command_line, read_text},
    },
    mm::{PhysMem, Span, map::RangeKind},
};

/// What EAX holds when a multiboot loader starts an image.
pub const BOOT_MAGIC: u32 = 0x2BAD_B002;

/// Offsets and flags of the boot information; shared with what nvmx writes for L2.
pub mod layout {
    /// `flags`
    pub const FLAGS: u64 = 0;
    /// `mem_lower`, KiB from address 0
    pub const MEM_LOWER: u64 = 4;
    /// `mem_upper`, KiB from 1 MiB
    pub const MEM_UPPER: u64 = 8;
    /// `boot_device`
    pub const BOOT_DEVICE: u64 = 12;
    /// `cmdline`
    pub const COMMAND_LINE: u64 = 16;
    /// `mods_count`
    pub const MODULES_COUNT: u64 = 20;
    /// `mods_addr`
    pub const MODULES: u64 = 24;
    /// `mmap_length`
    pub const MAP_LENGTH: u64 = 44;
    /// `mmap_addr`
    pub const MAP: u64 = 48;
    /// `drives_length`
    pub const DRIVES_LENGTH: u64 = 52;
    /// `drives_addr`
    pub const DRIVES: u64 = 56;
    /// `config_table`
    pub const CONFIG_TABLE: u64 = 60;
    /// `boot_loader_name`
    pub const LOADER_NAME: u64 = 64;
    /// `apm_table`
    pub const APM: u64 = 68;
    /// `vbe_control_info`
    pub const VBE_CONTROL: u64 = 72;
    /// `vbe_mode_info`
    pub const VBE_MODE_INFO: u64 = 76;
    /// `vbe_mode`, `vbe_interface_seg`, `vbe_interface_off`, `vbe_interface_len`
    pub const VBE_FIELDS: u64 = 80;
    /// `framebuffer_addr` to `framebuffer_type`
    pub const FRAMEBUFFER: u64 = 88;
    /// `color_info` of direct colours
    pub const COLOURS: u64 = 110;
    /// `framebuffer_palette_addr`
    pub const PALETTE: u64 = 110;
    /// `framebuffer_palette_num_colors`
    pub const PALETTE_LENGTH: u64 = 114;
    /// Bytes
    pub const SIZE: u64 = 116;
    /// Bytes of an entry of the module list
    pub const MODULE_SIZE: u64 = 16;
    /// `mem_lower` and `mem_upper` are valid
    pub const HAS_MEMORY: u32 = 1 << 0;
    /// `boot_device` is valid
    pub const HAS_BOOT_DEVICE: u32 = 1 << 1;
    /// `cmdline` is valid
    pub const HAS_COMMAND_LINE: u32 = 1 << 2;
    /// `mods_*` are valid
    pub const HAS_MODULES: u32 = 1 << 3;
    /// `mmap_*` are valid
    pub const HAS_MAP: u32 = 1 << 6;
    /// `drives_*` are valid
    pub const HAS_DRIVES: u32 = 1 << 7;
    /// `config_table` is valid
    pub const HAS_CONFIG_TABLE: u32 = 1 << 8;
    /// `boot_loader_name` is valid
    pub const HAS_LOADER_NAME: u32 = 1 << 9;
    /// `apm_table` is valid
    pub const HAS_APM: u32 = 1 << 10;
    /// `vbe_*` are valid
    pub const HAS_VBE: u32 = 1 << 11;
    /// `framebuffer_*` are valid
    pub const HAS_FRAMEBUFFER: u32 = 1 << 12;
}

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
        info.command_line = read_command_line(pointer(layout::COMMAND_LINE), memory)?;
    }
    if flags & layout::HAS_MODULES != 0 {
        let list = pointer(layout::MODULES).get();
        for n in 0..u64::from(field(layout::MODULES_COUNT)) {
            let entry = |offset| memory.read_u32(Hpa::new(list.wrapping_add(n * layout::MODULE_SIZE + offset)));
            let span = Span::new(entry(0).into(), entry(4).into());
            let command_line = read_command_line(Hpa::new(entry(8).into()), memory)?;
            info.modules.try_push(Module { span, command_line }).map_err(|_| InfoError::TooManyModules)?;
        }
    }
    if flags & layout::HAS_MAP != 0 {
        read_map(&mut info, pointer(layout::MAP), field(layout::MAP_LENGTH).into(), memory)?;
    } else if flags & layout::HAS_MEMORY != 0 {
        info.memory.add(Span::sized(0, u64::from(field(layout::MEM_LOWER)) << 10), RangeKind::Usable)?;
        info.memory.add(Span::sized(1 << 20, u64::from(field(layout::MEM_UPPER)) << 10), RangeKind::Usable)?;
    }
    Ok(info)
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
        info.memory.add(span, RangeKind::from_e820(memory.read_u32(entry(20))))?;
        offset += u64::from(size) + 4;
    }
    Ok(())
}
