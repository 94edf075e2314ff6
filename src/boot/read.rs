//! Reading the loader's information, in whichever format.

use crate::{
    addr::Hpa,
    boot::{
        info::{BootInfo, InfoError},
        multiboot1, multiboot2, pvh,
    },
    mm::PhysMem,
};

impl BootInfo {
    /// Reads the information at `at`; `magic` says in which format it is.
    pub fn read(magic: u32, at: Hpa, memory: &impl PhysMem) -> Result<Self, InfoError> {
        let mut info = match magic {
            multiboot1::BOOT_MAGIC => multiboot1::read(at, memory)?,
            multiboot2::BOOT_MAGIC => multiboot2::read(at, memory)?,
            pvh::START_MAGIC => pvh::read(at, memory)?,
            other => return Err(InfoError::UnknownProtocol(other)),
        };
        if info.memory.usable_bytes() == 0 {
            return Err(InfoError::NoMemoryMap);
        }
        // QEMU puts the file's name in front of every command line, GRUB does not.
        if info.loader.as_str() == "qemu" {
            let lines = &info.lines;
            let path = lines.get(info.command_line).rfind('/').unwrap_or(0);
            // No option has a slash; a folder's name may have a blank, but not in the list of modules.
            info.command_line = lines.without_file_name(info.command_line, path);
            info.modules.iter_mut().for_each(|m| m.command_line = lines.without_file_name(m.command_line, 0));
        }
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::info::{CommandLines, MAX_COMMAND_LINES, MAX_MODULES};
    use crate::mm::{Span, map::RangeKind, phys::VecMem};

    /// Memory with 32-bit words at addresses, and bytes at others.
    fn memory(words: &[(u64, &[u32])], texts: &[(u64, &str)]) -> VecMem {
        let memory = VecMem::new(0x8000);
        for (at, words) in words {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            memory.write_bytes(Hpa::new(*at), &bytes);
        }
        for (at, text) in texts {
            memory.write_bytes(Hpa::new(*at), text.as_bytes());
        }
        memory
    }

    fn usable(info: &BootInfo) -> Vec<Span> {
        info.memory.usable().collect()
    }

    const TEXTS: [(u64, &str); 3] = [(0x2000, "/my files/nvmx log=warn"), (0x2100, "l2 a /b"), (0x2200, "qemu")];

    #[test]
    fn multiboot1_information_of_qemu_is_read_without_file_names() {
        let mut fixed = [0u32; 22];
        fixed[0] = 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
        (fixed[4], fixed[5], fixed[6]) = (0x2000, 1, 0x3000);
        (fixed[11], fixed[12], fixed[16]) = (48, 0x4000, 0x2200);
        let map = [20, 0, 0, 0x9_F000, 0, 1, 20, 0x10_0000, 0, 0x700_0000, 0, 1];
        let memory = memory(&[(0x1000, &fixed), (0x3000, &[0x20_0000, 0x20_1000, 0x2100, 0]), (0x4000, &map)], &TEXTS);
        let info = BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        assert_eq!(info.lines.get(info.command_line), "log=warn");
        assert_eq!(info.lines.get(info.modules[0].command_line), "a /b");
        assert_eq!(info.modules[0].span, Span::new(0x20_0000, 0x20_1000));
        assert_eq!(usable(&info), [Span::new(0, 0x9_F000), Span::sized(0x10_0000, 0x700_0000)]);
    }

    #[test]
    fn file_names_go_whatever_they_look_like_and_options_stay() {
        let stripped = |text: &str, from| {
            let mut lines = CommandLines::default();
            lines.push("before").unwrap();
            let line = lines.push(text).unwrap();
            lines.push("behind").unwrap();
            let line = lines.get(lines.without_file_name(line, from));
            line.to_string()
        };
        assert_eq!(stripped("nvmx log=debug", 0), "log=debug");
        assert_eq!(stripped("nvmx ", 0), "");
        assert_eq!(stripped("nvmx", 0), "");
        assert_eq!(stripped("", 7), "");
        assert_eq!(stripped("/a b/nvmx  log=debug fields=auto", 4), "log=debug fields=auto");
        // A module's words may have slashes.
        assert_eq!(stripped("bzImage root=/dev/sda ro", 0), "root=/dev/sda ro");
    }

    #[test]
    fn multiboot1_information_without_a_map_has_two_sizes() {
        let memory = memory(&[(0x1000, &[1, 640, 1024])], &[]);
        let info = BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        assert_eq!(usable(&info), [Span::new(0, 0xA_0000), Span::new(0x10_0000, 0x20_0000)]);
    }

    #[test]
    fn multiboot2_information_is_read_tag_by_tag() {
        let memory = memory(
            &[
                (0x1000, &[96, 0]),
                (0x1008, &[1, 14]),
                (0x1018, &[6, 40, 24, 0, 0, 0, 0x10_0000, 0, 1, 0]),
                (0x1058, &[0, 8]),
            ],
            &[(0x1010, "a b c")],
        );
        memory.write_bytes(Hpa::new(0x1040), &[3, 0, 0, 0, 18, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0, b'm']);
        let info = BootInfo::read(multiboot2::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        assert_eq!(info.lines.get(info.command_line), "a b c");
        assert_eq!(info.modules[0].span, Span::new(0x1000, 0x2000));
        assert_eq!(info.lines.get(info.modules[0].command_line), "m");
        assert_eq!(usable(&info), [Span::new(0, 0x10_0000)]);
    }

    /// Information with the EFI map alone: 4 pages of boot services, a reserved page, ACPI's, 2 MiB of free memory of which the
    /// second half is for a special purpose.
    fn efi_only(map: &[(u32, u64, u64, u64)]) -> VecMem {
        let memory = VecMem::new(0x8000);
        let total = 8 + 16 + 48 * map.len() as u32 + 8;
        for (at, words) in [(0x1000, [total, 0]), (0x1008, [17, 16 + 48 * map.len() as u32]), (0x1010, [48, 1])] {
            memory.write_bytes(Hpa::new(at), words.map(u32::to_le_bytes).as_flattened());
        }
        for (n, (kind, start, pages, attributes)) in (0..).zip(map) {
            let at = 0x1018 + 48 * n;
            memory.write_bytes(Hpa::new(at), &kind.to_le_bytes());
            [(8, start), (24, pages), (32, attributes)]
                .into_iter()
                .for_each(|(of, value)| memory.write_u64(Hpa::new(at + of), *value));
        }
        memory.write_bytes(Hpa::new(0x1018 + 48 * map.len() as u64), &[0, 0, 0, 0, 8, 0, 0, 0]);
        memory
    }

    #[test]
    fn the_map_of_efi_counts_where_there_is_no_other() {
        let memory = efi_only(&[
            (4, 0, 4, 0xF),
            (0, 0x4000, 1, 0xF),
            (9, 0x5000, 1, 0xF),
            (7, 0x10_0000, 256, 0xF),
            (7, 0x20_0000, 256, 0xF | 1 << 18),
            (8, 0x30_0000, 1, 0xF),
        ]);
        let info = BootInfo::read(multiboot2::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        let ranges: Vec<_> = info.memory.iter().map(|r| (r.span.start(), r.span.end(), r.kind)).collect();
        assert_eq!(
            ranges,
            [
                (0, 0x4000, RangeKind::Usable),
                (0x4000, 0x5000, RangeKind::Reserved),
                (0x5000, 0x6000, RangeKind::AcpiReclaimable),
                (0x10_0000, 0x20_0000, RangeKind::Usable),
                (0x20_0000, 0x30_0000, RangeKind::Reserved),
                (0x30_0000, 0x30_1000, RangeKind::Bad),
            ]
        );
    }

    #[test]
    fn a_map_with_more_ranges_than_nvmx_keeps_loses_the_smallest_memory() {
        // 200 pieces of memory with holes between them, the odd ones larger.
        let pieces: Vec<_> = (0..200u64).map(|n| (7, n * 0x10_0000, 1 + n % 2, 0xF)).collect();
        let info = BootInfo::read(multiboot2::BOOT_MAGIC, Hpa::new(0x1000), &efi_only(&pieces)).unwrap();
        assert_eq!(info.memory.iter().count(), crate::mm::map::MOST_LOADED);
        assert_eq!(info.given_up, 80 * 0x1000, "only small ones");
    }

    #[test]
    fn pvh_start_information_is_read() {
        let start = [pvh::START_MAGIC, 1, 0, 1, 0x3000, 0, 0x2000, 0, 0, 0, 0x4000, 0, 2, 0];
        let list = [0x20_0000, 0, 0x1000, 0, 0x2100, 0, 0, 0];
        let map = [0, 0, 0x9_F000, 0, 1, 0, 0x10_0000, 0, 0x700_0000, 0, 2, 0];
        let memory = memory(&[(0x1000, &start), (0x3000, &list), (0x4000, &map)], &TEXTS);
        let info = BootInfo::read(pvh::START_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        assert_eq!(info.lines.get(info.command_line), "/my files/nvmx log=warn");
        assert_eq!(info.modules[0].span, Span::new(0x20_0000, 0x20_1000));
        let kinds: Vec<_> = info.memory.iter().map(|r| r.kind).collect();
        assert_eq!(kinds, [RangeKind::Usable, RangeKind::Reserved]);
    }

    /// Information with so many modules, each with a command line of so many bytes.
    fn with_modules(count: u32, bytes: usize) -> Result<BootInfo, InfoError> {
        let mut fixed = [0u32; 22];
        fixed[0] = 1 << 0 | 1 << 3;
        (fixed[1], fixed[2], fixed[5], fixed[6]) = (640, 1024, count, 0x2000);
        let list: Vec<u32> =
            (0..count).flat_map(|n| [0x20_0000 + n * 0x1000, 0x20_0800 + n * 0x1000, 0x3000, 0]).collect();
        let memory = memory(&[(0x1000, &fixed), (0x2000, &list)], &[(0x3000, &"x".repeat(bytes))]);
        BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory)
    }

    #[test]
    fn more_modules_and_longer_command_lines_than_nvmx_takes_are_refused_and_never_cut() {
        let each = MAX_COMMAND_LINES / MAX_MODULES;
        let most = with_modules(MAX_MODULES as u32, each).unwrap();
        assert_eq!(most.modules.len(), MAX_MODULES);
        assert!(most.modules.iter().all(|module| most.lines.get(module.command_line) == "x".repeat(each)));
        assert_eq!(with_modules(MAX_MODULES as u32 + 1, 10).unwrap_err(), InfoError::TooManyModules);
        assert_eq!(with_modules(MAX_MODULES as u32, each + 1).unwrap_err(), InfoError::CommandLinesTooLong);
        let longest = with_modules(1, MAX_COMMAND_LINES).unwrap();
        assert_eq!(longest.lines.get(longest.modules[0].command_line).len(), MAX_COMMAND_LINES);
        assert_eq!(with_modules(1, MAX_COMMAND_LINES + 1).unwrap_err(), InfoError::CommandLinesTooLong);
    }

    #[test]
    fn information_that_nvmx_cannot_use_is_refused() {
        let memory = memory(&[(0x1000, &[1 << 2, 0, 0, 0, 0x3000])], &[(0x3000, &"x".repeat(MAX_COMMAND_LINES + 1))]);
        let read = |magic, at| BootInfo::read(magic, Hpa::new(at), &memory).unwrap_err();
        assert_eq!(read(0x1234, 0), InfoError::UnknownProtocol(0x1234));
        assert_eq!(read(multiboot1::BOOT_MAGIC, 0x7000), InfoError::NoMemoryMap);
        assert_eq!(read(multiboot1::BOOT_MAGIC, 0x1000), InfoError::CommandLinesTooLong);
        assert!(matches!(read(pvh::START_MAGIC, 0x7000), InfoError::Malformed(_)));
    }

    proptest! {
        #[test]
        fn no_information_makes_a_reader_panic_or_hang(
            bytes in prop::collection::vec(any::<u8>(), 0x400), small in prop::collection::vec(0u8..32, 0x100),
            which in 0usize..3,
        ) {
            let mut bytes = bytes;
            // Small numbers make tags and counts that lead further in.
            for (n, byte) in small.iter().enumerate() { if n % 4 != 0 { bytes[n] = 0 } else { bytes[n] = *byte } }
            bytes.extend([0; 64]);
            let magic = [multiboot1::BOOT_MAGIC, multiboot2::BOOT_MAGIC, pvh::START_MAGIC][which];
            if which == 2 { bytes[..4].copy_from_slice(&magic.to_le_bytes()) }
            let _ = BootInfo::read(magic, Hpa::new(0), &VecMem::from_bytes(bytes));
        }
    }
}
