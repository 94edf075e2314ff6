//! Multiboot 2 boot information, read from a loader.
//!
//! Source: Multiboot2 Specification 2.0, "Boot information format".

use crate::{
    addr::{Hpa, PAGE_SIZE},
    boot::{
        info::{BootInfo, InfoError, ListedModule, LoadedBy, ModuleList, Rsdp, read_text},
        multiboot::tag,
        text::Text,
    },
    mm::{PhysMem, Span, map::RangeKind},
};

/// What EAX holds when a multiboot2 loader starts an image.
pub const BOOT_MAGIC: u32 = 0x36D7_6289;

/// Longest information that is read, in bytes; longer ones are malformed.
const MAX_SIZE: u64 = 0x10_0000;

/// Bytes in front of the first tag, and of a tag's type and size.
const HEAD: u64 = 8;

/// Reads the boot information at `at`.
pub fn read(at: Hpa, memory: &impl PhysMem) -> Result<BootInfo, InfoError> {
    let total = u64::from(memory.read_u32(at));
    if total > MAX_SIZE {
        return Err(InfoError::Malformed("its size is not plausible"));
    }
    let mut info = BootInfo { protocol: LoadedBy::Multiboot2, ..BootInfo::default() };
    info.list = ModuleList { first: at.get() + HEAD, end: at.get() + total, ..ModuleList::default() };
    let mut efi_map = None;
    let mut offset = HEAD;
    while offset + 8 <= total {
        let field = |of: u64| Hpa::new(at.get().wrapping_add(offset + of));
        let (kind, size) = (memory.read_u32(field(0)), u64::from(memory.read_u32(field(4))));
        if size < 8 || offset + size > total {
            return Err(InfoError::Malformed("a tag reaches beyond its end"));
        }
        match kind {
            tag::END => break,
            tag::COMMAND_LINE => info.command_line = Text::find(field(8), memory)?,
            tag::LOADER_NAME => info.loader = read_text(field(8), memory).unwrap_or_default(),
            tag::MODULE => info.list.count += 1,
            tag::MAP => {
                let entry_size = u64::from(memory.read_u32(field(8)));
                if entry_size < 24 {
                    return Err(InfoError::Malformed("an entry of the memory map is too short"));
                }
                let mut entry = 16;
                while entry + entry_size <= size {
                    let span = Span::sized(memory.read_u64(field(entry)), memory.read_u64(field(entry + 8)));
                    info.given_up +=
                        info.memory.add_loaded(span, RangeKind::from_e820(memory.read_u32(field(entry + 16))));
                    entry += entry_size;
                }
            }
            // Only where the loader gives no map of its own: it made that one from this.
            tag::EFI_MAP if size >= 16 => efi_map = Some((field(16), size - 16, memory.read_u32(field(8)).into())),
            // The new one wins, in whichever order they come.
            tag::RSDP_OLD if info.rsdp.is_none() => info.rsdp = Some(read_rsdp(field(8), size - 8, memory)),
            tag::RSDP_NEW => info.rsdp = Some(read_rsdp(field(8), size - 8, memory)),
            _ => info.extras.take_tag(kind, field(0), size, memory),
        }
        offset += size.next_multiple_of(8);
    }
    let without = info.memory.iter().next().is_none();
    if let Some((at, length, entry)) = efi_map.filter(|_| without) {
        read_efi_map(&mut info, at, length, entry, memory)?;
    }
    Ok(info)
}

/// The module of the first tag at or behind `at`, which becomes the place of the next tag. The tags were read before.
pub(super) fn module(at: &mut u64, memory: &impl PhysMem) -> Result<ListedModule, InfoError> {
    loop {
        let field = |of: u64| Hpa::new(at.wrapping_add(of));
        let word = |of: u64| u64::from(memory.read_u32(field(of)));
        let (kind, size) = (memory.read_u32(field(0)), word(4));
        let module = (kind == tag::MODULE)
            .then(|| Ok(ListedModule { span: Span::new(word(8), word(12)), line: Text::find(field(16), memory)? }));
        *at += size.next_multiple_of(8);
        match module {
            Some(module) => return module,
            None if kind == tag::END || size < HEAD => {
                return Err(InfoError::Malformed("it changed while it was read"));
            }
            None => {}
        }
    }
}

/// Descriptors of `entry` bytes: type (32 bits), at 8 the address, at 24 the number of 4 KiB pages, at 32 the attributes.
///
/// Source: UEFI Specification 2.10, "GetMemoryMap()".
fn read_efi_map(info: &mut BootInfo, at: Hpa, length: u64, entry: u64, memory: &impl PhysMem) -> Result<(), InfoError> {
    /// Memory for a special purpose: firmware wants it left alone.
    const SPECIAL: u64 = 1 << 18;
    if entry < 40 {
        return Err(InfoError::Malformed("an entry of the EFI memory map is too short"));
    }
    let mut offset = 0;
    while offset + entry <= length {
        let field = |of: u64| Hpa::new(at.get().wrapping_add(offset + of));
        let kind = match memory.read_u32(field(0)) {
            _ if memory.read_u64(field(32)) & SPECIAL != 0 => RangeKind::Reserved,
            // Loader and boot services, which are over, and free memory
            1..=4 | 7 => RangeKind::Usable,
            8 => RangeKind::Bad,
            9 => RangeKind::AcpiReclaimable,
            10 => RangeKind::AcpiNvs,
            _ => RangeKind::Reserved,
        };
        let bytes = memory.read_u64(field(24)).saturating_mul(PAGE_SIZE);
        info.given_up += info.memory.add_loaded(Span::sized(memory.read_u64(field(8)), bytes), kind);
        offset += entry;
    }
    Ok(())
}

fn read_rsdp(at: Hpa, size: u64, memory: &impl PhysMem) -> Rsdp {
    let mut bytes = [0; 36];
    memory.read_bytes(at, &mut bytes);
    bytes.into_iter().take(size as usize).collect()
}
