//! A Linux kernel as L2: the setup header of a bzImage, and the zero page from which the kernel learns everything.
//!
//! The kernel is entered at its 32-bit entry point, which every x86 kernel has, 64-bit ones included.
//! Source: Linux documentation, "The Linux/x86 Boot Protocol" ("The Real-Mode Kernel Header", "32-bit Boot Protocol") and
//! "Zero Page".

use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::boot::guest_image::file::File;
use crate::boot::guest_image::header::{FileSegment, Image, Segments};
use crate::boot::guest_image::info::Told;
use crate::boot::guest_image::plan::{INFO_SIZE, PLACES};
use crate::boot::guest_image::{LoadError, Protocol};
use crate::mm::map::RangeKind;
use crate::mm::{GuestMemory, MemoryMap, PhysMem, Span};

/// Offsets, the same in the file and in the zero page.
mod setup {
    pub const FIRST: u64 = 0x1F1;
    pub const SECTORS: u64 = 0x1F1;
    /// Displacement of a jump over the header: where the header ends.
    pub const JUMP: u64 = 0x201;
    pub const MAGIC: u64 = 0x202;
    pub const VERSION: u64 = 0x206;
    pub const LOADER: u64 = 0x210;
    pub const FLAGS: u64 = 0x211;
    pub const INITRD: u64 = 0x218;
    pub const INITRD_SIZE: u64 = 0x21C;
    pub const COMMAND_LINE: u64 = 0x228;
    pub const INITRD_MAX: u64 = 0x22C;
    pub const ALIGNMENT: u64 = 0x230;
    pub const RELOCATABLE: u64 = 0x234;
    pub const COMMAND_LINE_SIZE: u64 = 0x238;
    pub const PREFERRED: u64 = 0x258;
    pub const INIT_SIZE: u64 = 0x260;
}
/// Offsets in the zero page alone.
mod zero_page {
    pub const SCREEN: u64 = 0x000;
    pub const RSDP: u64 = 0x070;
    pub const MAP_COUNT: u64 = 0x1E8;
    pub const MAP: u64 = 0x2D0;
    /// Behind the room for the header.
    pub const HEADER_END: u64 = 0x290;
}

const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version whose header says where the kernel wants to lie and how much room it takes (Linux 2.6.31).
const OLDEST: u16 = 0x020A;
const SECTOR: u64 = 512;
/// A header that says 0 means so many.
const DEFAULT_SECTORS: u64 = 4;
const LOADED_HIGH: u8 = 1 << 0;
/// A loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xFF;

/// What the boot information's pages hold, by offset: the zero page, then these.
const GDT: u64 = PAGE_SIZE;
const RSDP: u64 = 2 * PAGE_SIZE;
/// To the end; the pages were zeros before.
const COMMAND_LINE: u64 = 3 * PAGE_SIZE;
const _: () = assert!(COMMAND_LINE < INFO_SIZE);
/// Two unused descriptors, then flat code (selector 0x10) and flat data (0x18).
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];

/// Whether the file is a Linux kernel, however old.
pub fn is_kernel<M: PhysMem>(file: &File<'_, M>) -> bool {
    file.u32(setup::MAGIC) == Some(MAGIC)
}

/// Reads the setup header: the kernel as one piece, for the place that it prefers or, if there is no memory and it can be
/// moved, for another one.
pub fn read<M: PhysMem>(file: &File<'_, M>, memory: &MemoryMap) -> Result<Image, LoadError> {
    const CUT: LoadError = LoadError::BrokenLinux("it is cut short in its header");
    let version = file.u16(setup::VERSION).ok_or(CUT)?;
    if version < OLDEST {
        return Err(LoadError::OldLinux { version, oldest: OLDEST });
    }
    let byte = |at| file.bytes::<1>(at).map(|[byte]| byte).ok_or(CUT);
    if byte(setup::FLAGS)? & LOADED_HIGH == 0 {
        return Err(LoadError::Unsupported("to be loaded below 1 MiB (a zImage)"));
    }
    let sectors = match byte(setup::SECTORS)? {
        0 => DEFAULT_SECTORS,
        sectors => sectors.into(),
    };
    let offset = (sectors + 1) * SECTOR;
    let in_file = match file.len().checked_sub(offset) {
        None | Some(0) => return Err(LoadError::BrokenLinux("it ends before the kernel's code")),
        Some(len) => len,
    };
    let preferred = file.u64(setup::PREFERRED).ok_or(CUT)?;
    let room = u64::from(file.u32(setup::INIT_SIZE).ok_or(CUT)?).max(in_file);
    let alignment = u64::from(file.u32(setup::ALIGNMENT).ok_or(CUT)?);
    let movable = byte(setup::RELOCATABLE)? != 0 && alignment.is_power_of_two();
    let wanted = preferred.checked_add(room).map(|end| Span::new(preferred, end));
    let wanted = wanted.ok_or(LoadError::BrokenLinux("it wants to end beyond the address space"))?;
    let to = match memory.highest_free(room, alignment.max(PAGE_SIZE), PLACES) {
        Some(other) if movable && !memory.is_usable(wanted) => other,
        _ => wanted,
    };
    // 0 where the header has no such field; the initial file system must then end below 896 MiB.
    let modules_end = match u64::from(file.u32(setup::INITRD_MAX).ok_or(CUT)?) {
        0 => 0x3800_0000,
        last => last + 1,
    };
    Ok(Image {
        protocol: Protocol::Linux,
        entry: to.start(),
        segments: Segments::from_iter([FileSegment { offset, in_file, to, zeroed: false }]),
        modules_end,
    })
}

/// Writes the zero page to the start of `at`, and behind it the descriptor table, which is returned, the command line and
/// the RSDP. `file` is the kernel's.
pub fn write<P: PhysMem>(
    file: &File<'_, P>,
    told: &Told<'_>,
    guest: &GuestMemory<P>,
    at: Span,
) -> Result<Span, LoadError> {
    let initrd = match told.modules {
        [] => Span::new(0, 0),
        [initrd] => initrd.place,
        more => return Err(LoadError::TooManyForLinux(more.len())),
    };
    let longest = file.u32(setup::COMMAND_LINE_SIZE).unwrap_or(0);
    if told.command_line.len() as u64 > u64::from(longest) {
        return Err(LoadError::LineTooLongForLinux { longest });
    }
    let no_room = |_| LoadError::NoRoom { bytes: at.len() };
    let put = |offset: u64, bytes: &[u8]| guest.write_bytes(Gpa::new(at.start() + offset), bytes).map_err(no_room);
    guest.zero(at).map_err(no_room)?;

    // The header ends where the jump at its start leads to.
    let end = file.bytes::<1>(setup::JUMP).map_or(0, |[jump]| setup::MAGIC + u64::from(jump));
    for offset in setup::FIRST..end.min(zero_page::HEADER_END) {
        if let Some(byte) = file.bytes::<1>(offset) {
            put(offset, &byte)?;
        }
    }
    put(setup::LOADER, &[UNKNOWN_LOADER])?;
    put(setup::INITRD, &(initrd.start() as u32).to_le_bytes())?;
    put(setup::INITRD_SIZE, &(initrd.len() as u32).to_le_bytes())?;
    put(setup::COMMAND_LINE, &((at.start() + COMMAND_LINE) as u32).to_le_bytes())?;
    put(COMMAND_LINE, told.command_line)?;
    put(zero_page::SCREEN, &screen(guest.phys()))?;

    let mut memory = told.memory.clone();
    if let Some(rsdp) = told.rsdp {
        // A copy, since the loader's may be gone; in a page that Linux leaves alone until it has read it.
        let place = Span::sized(at.start() + RSDP, PAGE_SIZE);
        memory.set(place, RangeKind::AcpiReclaimable).map_err(|_| LoadError::NoRoom { bytes: PAGE_SIZE })?;
        put(RSDP, rsdp)?;
        put(zero_page::RSDP, &place.start().to_le_bytes())?;
    }
    let mut count = 0;
    for (n, range) in (0..).zip(memory.iter()) {
        let entry = zero_page::MAP + n * 20;
        put(entry, &range.span.start().to_le_bytes())?;
        put(entry + 8, &range.span.len().to_le_bytes())?;
        put(entry + 16, &range.kind.e820().to_le_bytes())?;
        count = n + 1;
    }
    put(zero_page::MAP_COUNT, &[count as u8])?;
    for (n, descriptor) in (0..).zip(DESCRIPTORS) {
        put(GDT + n * 8, &descriptor.to_le_bytes())?;
    }
    Ok(Span::sized(at.start() + GDT, DESCRIPTORS.len() as u64 * 8))
}

/// The text screen as a BIOS left it, for Linux's console; nothing if there is none.
///
/// Source: Linux documentation, "Zero Page", screen_info; IBM PC BIOS data area (segment 0x40).
fn screen(memory: &impl PhysMem) -> [u8; 18] {
    const COLOR_TEXT: u8 = 3;
    let mut info = [0; 18];
    let byte = |at: u64| {
        let mut byte = [0];
        memory.read_bytes(Hpa::new(0x400 + at), &mut byte);
        byte[0]
    };
    let (mode, columns, rows) = (byte(0x49), byte(0x4A), byte(0x84));
    if mode == COLOR_TEXT && columns != 0 && rows != 0 {
        // Cursor; mode and columns; lines, is VGA, points per character.
        (info[0], info[1], info[6], info[7]) = (byte(0x50), byte(0x51), mode, columns);
        (info[14], info[15], info[16]) = (rows.saturating_add(1), 1, byte(0x85));
    }
    info
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::extras::Extras;
    use crate::boot::guest_image::Start;
    use crate::boot::guest_image::load;
    use crate::boot::guest_image::tests::{MEMORY, MIB, OWN, machine, memory_map};
    use crate::boot::info::Rsdp;

    const LINE: &str = "console=ttyS0 quiet";

    /// A kernel that prefers `at` and needs `room`; what the header says can be overwritten.
    pub fn kernel(at: u64, room: u32, code: &[u8], over: &[(u64, &[u8])]) -> Vec<u8> {
        let mut file = vec![0x11; 3 * SECTOR as usize];
        let mut put = |at: u64, bytes: &[u8]| file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        put(setup::FIRST, &[0; 0x80]);
        put(setup::SECTORS, &[2]);
        put(setup::JUMP, &[0x6A]);
        put(setup::MAGIC, b"HdrS");
        put(setup::VERSION, &0x020Fu16.to_le_bytes());
        put(setup::FLAGS, &[LOADED_HIGH]);
        put(setup::INITRD_MAX, &0x7FFF_FFFFu32.to_le_bytes());
        put(setup::ALIGNMENT, &(MIB as u32 / 2).to_le_bytes());
        put(setup::RELOCATABLE, &[1]);
        put(setup::COMMAND_LINE_SIZE, &255u32.to_le_bytes());
        put(setup::PREFERRED, &at.to_le_bytes());
        put(setup::INIT_SIZE, &room.to_le_bytes());
        over.iter().for_each(|(at, bytes)| put(*at, bytes));
        file.extend(code);
        file
    }

    fn words(guest: &GuestMemory<impl PhysMem>, page: u64, at: u64) -> u64 {
        guest.read_u64(Gpa::new(page + at)).unwrap()
    }

    #[test]
    fn kernel_zero_page_and_file_system_are_where_the_protocol_says() {
        let file = kernel(2 * MIB, MIB as u32, b"the code", &[]);
        let rsdp = Rsdp::from([7; 36]);
        // The initial file system lies where the kernel goes.
        let (guest, mut modules) = machine(&[(4 * MIB, &file, LINE), (2 * MIB + 0x100, b"files", "")]);
        let (mode, rows) = ([3, 80], [24, 16]);
        guest.phys().write_bytes(Hpa::new(0x449), &mode);
        guest.phys().write_bytes(Hpa::new(0x484), &rows);
        let start = load(&guest, &memory_map(), &mut modules, Some(&rsdp), &Extras::default()).unwrap();
        let Start { protocol, entry, esi, gdt, .. } = start;
        assert_eq!((protocol, entry), (Protocol::Linux, Gpa::new(2 * MIB)));
        assert_eq!(guest.phys().bytes(2 * MIB, 8), b"the code");
        let page = esi.get();
        let word = |at| words(&guest, page, at) & 0xFFFF_FFFF;
        assert_eq!(guest.phys().bytes(page + setup::MAGIC, 4), b"HdrS");
        assert_eq!(guest.phys().bytes(page + setup::LOADER, 1), [0xFF]);
        assert_eq!(guest.phys().bytes(word(setup::COMMAND_LINE), LINE.len() + 1), [LINE.as_bytes(), &[0]].concat());
        assert_eq!(word(setup::INITRD_SIZE), 5);
        assert_eq!(guest.phys().bytes(word(setup::INITRD), 5), b"files");
        assert_eq!(guest.phys().bytes(page + 6, 2), mode);
        assert_eq!(guest.phys().bytes(page + 14, 3), [25, 1, 16]);
        assert_eq!(guest.phys().bytes(words(&guest, page, zero_page::RSDP), 36), [7; 36]);
        let gdt = gdt.unwrap();
        assert_eq!(words(&guest, gdt.start(), 0x10) >> 40 & 0xFF, 0x9B, "flat code");
        assert_eq!(words(&guest, gdt.start(), 0x18) >> 40 & 0xFF, 0x93, "flat data");
        assert_eq!(gdt.len(), 0x20);
    }

    #[test]
    fn the_map_has_nvmx_reserved_and_the_rsdp_kept() {
        let file = kernel(2 * MIB, MIB as u32, b"the code", &[]);
        let (guest, mut modules) = machine(&[(4 * MIB, &file, "")]);
        let start = load(&guest, &memory_map(), &mut modules, Some(&Rsdp::from([7; 36])), &Extras::default()).unwrap();
        let page = start.esi.get();
        let count = words(&guest, page, zero_page::MAP_COUNT) & 0xFF;
        let mut told = MemoryMap::new();
        for entry in (0..count).map(|n| zero_page::MAP + 20 * n) {
            let (base, len) = (words(&guest, page, entry), words(&guest, page, entry + 8));
            let kind = RangeKind::from_e820(words(&guest, page, entry + 16) as u32);
            told.add(Span::sized(base, len), kind).unwrap();
        }
        let mut expected = memory_map();
        expected.set(Span::sized(page + RSDP, PAGE_SIZE), RangeKind::AcpiReclaimable).unwrap();
        assert_eq!(told, expected);
        assert!(told.iter().any(|r| r.span.contains(OWN) && r.kind == RangeKind::Reserved));
    }

    #[test]
    fn a_kernel_without_memory_at_its_place_is_moved_if_it_can_be() {
        let place = |over: &[(u64, &[u8])]| {
            let file = kernel(OWN.start(), MIB as u32, b"the code", over);
            let (guest, mut modules) = machine(&[(MIB, &file, "")]);
            load(&guest, &memory_map(), &mut modules, None, &Extras::default()).map(|start| start.entry.get())
        };
        assert_eq!(place(&[]), Ok(OWN.start() - MIB));
        assert!(matches!(place(&[(setup::RELOCATABLE, &[0])]), Err(LoadError::OverlapsNvmx { .. })));
    }

    #[test]
    fn kernels_that_cannot_be_started_are_refused_with_a_reason() {
        let error = |file: &[u8], line: &str, others: usize| {
            let mut list: Vec<(u64, &[u8], &str)> = vec![(MIB, file, line)];
            (0..others as u64).for_each(|n| list.push((4 * MIB + n * 4096, b"x", "")));
            let (guest, mut modules) = machine(&list);
            load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap_err().to_string()
        };
        let good = kernel(2 * MIB, MIB as u32, b"the code", &[]);
        let old = kernel(2 * MIB, MIB as u32, b"", &[(setup::VERSION, &0x0204u16.to_le_bytes())]);
        assert!(error(&old, "", 0).contains("boot protocol 2.4; nvmx needs 2.10"), "{}", error(&old, "", 0));
        assert!(error(&good[..0x210], "", 0).contains("cut short"));
        assert!(error(&good[..3 * SECTOR as usize], "", 0).contains("ends before the kernel's code"));
        let low = kernel(2 * MIB, MIB as u32, b"x", &[(setup::FLAGS, &[0])]);
        assert!(error(&low, "", 0).contains("zImage"));
        assert!(error(&good, &"x".repeat(300), 0).contains("at most 255"));
        assert!(error(&good, "", 2).contains("2 modules"));
        let large = kernel(2 * MIB, MEMORY as u32, b"x", &[]);
        assert!(error(&large, "", 0).contains("no usable memory") || error(&large, "", 0).contains("overlaps nvmx"));
    }

    proptest! {
        #[test]
        fn any_header_is_loaded_or_refused(
            header in prop::collection::vec(any::<u8>(), 0x80), real in 0usize..0x80, len in 0usize..0x700,
        ) {
            let good = kernel(2 * MIB, MIB as u32, &[5; 0x100], &[]);
            let mut file = good.clone();
            let from = setup::FIRST as usize;
            file[from + real..from + 0x80].copy_from_slice(&header[real..]);
            file[0x202..0x208].copy_from_slice(&good[0x202..0x208]);
            file.truncate(len.max(0x208));
            let (guest, mut modules) = machine(&[(3 * MIB, &file, "line"), (5 * MIB, b"files", "")]);
            let _ = load(&guest, &memory_map(), &mut modules, None, &Extras::default());
            prop_assert!(guest.phys().bytes(OWN.start(), OWN.len() as usize).iter().all(|b| *b == 0));
        }
    }
}
