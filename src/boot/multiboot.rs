//! Constants of both multiboot formats, shared by what reads the loader's information and what writes L2's.
//!
//! Source: "Multiboot Specification version 0.6.96", "Multiboot2 Specification version 2.0".

/// Multiboot: offsets and flags of the boot information.
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

/// Multiboot2: types of tags.
pub mod tag {
    /// End of the list
    pub const END: u32 = 0;
    /// Command line
    pub const COMMAND_LINE: u32 = 1;
    /// Name of the loader
    pub const LOADER_NAME: u32 = 2;
    /// A module
    pub const MODULE: u32 = 3;
    /// `mem_lower` and `mem_upper`
    pub const MEMORY: u32 = 4;
    /// The BIOS's boot device
    pub const BOOT_DEVICE: u32 = 5;
    /// Memory map
    pub const MAP: u32 = 6;
    /// VBE
    pub const VBE: u32 = 7;
    /// Framebuffer
    pub const FRAMEBUFFER: u32 = 8;
    /// APM table
    pub const APM: u32 = 10;
    /// Pointer to the EFI system table of 32-bit firmware
    pub const EFI32: u32 = 11;
    /// Pointer to the EFI system table of 64-bit firmware
    pub const EFI64: u32 = 12;
    /// SMBIOS tables
    pub const SMBIOS: u32 = 13;
    /// Copy of an ACPI 1.0 RSDP
    pub const RSDP_OLD: u32 = 14;
    /// Copy of an RSDP of ACPI 2.0 or later
    pub const RSDP_NEW: u32 = 15;
    /// Memory map of EFI
    pub const EFI_MAP: u32 = 17;
    /// What DHCP said
    pub const NETWORK: u32 = 16;
}
