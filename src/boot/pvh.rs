//! PVH start information, read from a loader.
//!
//! Source: Xen, "x86/HVM direct boot ABI", structures `hvm_start_info`, `hvm_modlist_entry`, `hvm_memmap_table_entry`.

use crate::{
    addr::Hpa,
    boot::{
        info::{BootInfo, InfoError, ListedModule, LoadedBy, ModuleList},
        text::Text,
    },
    mm::{PhysMem, Span, map::RangeKind},
};

/// First word of the start information; the entry code uses it as the protocol's name too.
pub const START_MAGIC: u32 = 0x336E_C578;

/// Longest memory map that is read; longer ones are malformed.
const MAX_MAP_ENTRIES: u64 = 1024;

/// Bytes of an entry of the module list.
const MODULE_SIZE: u64 = 32;

/// Reads the start information at `at`.
pub fn read(at: Hpa, memory: &impl PhysMem) -> Result<BootInfo, InfoError> {
    let word = |offset: u64| memory.read_u32(Hpa::new(at.get().wrapping_add(offset)));
    let quad = |offset: u64| Hpa::new(memory.read_u64(Hpa::new(at.get().wrapping_add(offset))));
    if word(0) != START_MAGIC {
        return Err(InfoError::Malformed("the PVH start information lacks its magic number"));
    }
    if word(4) < 1 {
        // Version 0 has no memory map; it would have to be asked from Xen.
        return Err(InfoError::NoMemoryMap);
    }
    let mut info = BootInfo { protocol: LoadedBy::Pvh, ..BootInfo::default() };
    info.command_line = Text::find(quad(24), memory)?;
    let (first, count) = (quad(16).get(), word(12));
    info.list = ModuleList { first, end: first.saturating_add(MODULE_SIZE * u64::from(count)), count, named: false };

    let map = quad(40).get();
    let entries = u64::from(word(48));
    if entries > MAX_MAP_ENTRIES {
        return Err(InfoError::Malformed("the memory map is too long"));
    }
    for n in 0..entries {
        let entry = |offset| Hpa::new(map.wrapping_add(n * 24 + offset));
        let span = Span::sized(memory.read_u64(entry(0)), memory.read_u64(entry(8)));
        info.given_up += info.memory.add_loaded(span, RangeKind::from_e820(memory.read_u32(entry(16))));
    }

    let rsdp = quad(32);
    if rsdp.get() != 0 {
        let mut bytes = [0; 36];
        memory.read_bytes(rsdp, &mut bytes);
        info.rsdp = Some(bytes.into());
    }
    Ok(info)
}

/// The module whose entry is at `at`, which becomes that of the next: address, bytes, command line, a reserved word, 64 bits each.
pub(super) fn module(at: &mut u64, memory: &impl PhysMem) -> Result<ListedModule, InfoError> {
    let entry = |offset| memory.read_u64(Hpa::new(at.wrapping_add(offset)));
    let span = Span::sized(entry(0), entry(8));
    let line = Text::find(Hpa::new(entry(16)), memory)?;
    *at = at.wrapping_add(MODULE_SIZE);
    Ok(ListedModule { span, line })
}
