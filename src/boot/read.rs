//! Reading the loader's information, in whichever format.

use core::mem;

use crate::{
    addr::Hpa,
    boot::{
        info::{BootInfo, InfoError, ListedModule, LoadedBy, Module, ModuleList},
        multiboot1, multiboot2, pvh,
    },
    mm::{PhysMem, Span},
};

/// More modules are no list that a loader made.
const MOST_MODULES: u32 = 1 << 16;
/// All their command lines together.
const MOST_TEXT: u64 = 16 << 20;

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
        if info.list.count > MOST_MODULES {
            return Err(InfoError::Malformed("it lists more than 65,536 modules"));
        }
        for module in listed(info.protocol, info.list, memory) {
            info.text += module?.line.span().len();
            if info.text > MOST_TEXT {
                return Err(InfoError::Malformed("the command lines of its modules have more than 16 MiB"));
            }
        }
        Ok(info)
    }

    /// The modules in the loader's order; the first is L2.
    pub fn modules(&self, memory: &impl PhysMem) -> impl Iterator<Item = ListedModule> {
        listed(self.protocol, self.list, memory).flatten()
    }

    /// What must stay as it is until [`Self::keep`], but for the modules themselves.
    pub fn in_use(&self, memory: &impl PhysMem) -> impl Iterator<Item = Span> {
        let lines = self.modules(memory).map(|module| module.line.span());
        lines.chain([self.command_line.span(), Span::new(self.list.first, self.list.end)])
    }

    /// How many modules [`Self::keep`] needs room for, and how many bytes of text.
    pub const fn to_keep(&self) -> (usize, usize) {
        (self.list.count as usize, self.text as usize)
    }

    /// Copies the list to `modules` and its command lines to `text`. The loader's memory is not needed any more.
    ///
    /// # Errors
    /// If there is no room for what [`Self::to_keep`] says, or the list is not what it was.
    pub fn keep<'a>(
        &self,
        memory: &impl PhysMem,
        modules: &mut [Module<'a>],
        mut text: &'a mut [u8],
    ) -> Result<(), InfoError> {
        const LOST: InfoError = InfoError::Malformed("its list of modules changed after it was read");
        if modules.len() < self.list.count as usize {
            return Err(LOST);
        }
        for (kept, module) in modules.iter_mut().zip(listed(self.protocol, self.list, memory)) {
            let ListedModule { span, line } = module?;
            let Some((room, rest)) = mem::take(&mut text).split_at_mut_checked(line.span().len() as usize) else {
                return Err(LOST);
            };
            memory.read_bytes(Hpa::new(line.span().start()), room);
            *kept = Module { span, place: span, command_line: room };
            text = rest;
        }
        Ok(())
    }
}

/// Reads a list module by module.
fn listed(
    protocol: LoadedBy,
    list: ModuleList,
    memory: &impl PhysMem,
) -> impl Iterator<Item = Result<ListedModule, InfoError>> {
    let mut at = list.first;
    (0..list.count).map(move |_| {
        let mut module = match protocol {
            LoadedBy::Multiboot1 => multiboot1::module(&mut at, memory),
            LoadedBy::Multiboot2 => multiboot2::module(&mut at, memory),
            LoadedBy::Pvh => pvh::module(&mut at, memory),
        }?;
        if list.named {
            module.line = module.line.without_file_name(memory);
        }
        Ok(module)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::text::Text;
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

    /// The modules as they are kept, with their command lines.
    fn kept(info: &BootInfo, memory: &VecMem) -> Vec<(Span, String)> {
        let (count, bytes) = info.to_keep();
        let mut text = vec![0; bytes];
        let mut modules = vec![Module::default(); count];
        info.keep(memory, &mut modules, &mut text).unwrap();
        let text = |module: &Module<'_>| String::from_utf8(module.command_line.to_vec()).unwrap();
        modules.iter().map(|module| (module.span, text(module))).collect()
    }

    /// The words of nvmx's own command line.
    fn own_words(info: &BootInfo, memory: &VecMem) -> Vec<String> {
        info.command_line.words(memory).map(|word| word.to_string()).collect()
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
        assert_eq!(own_words(&info, &memory), ["log=warn"]);
        assert_eq!(kept(&info, &memory), [(Span::new(0x20_0000, 0x20_1000), "a /b".to_string())]);
        assert_eq!(usable(&info), [Span::new(0, 0x9_F000), Span::sized(0x10_0000, 0x700_0000)]);
    }

    #[test]
    fn file_names_go_whatever_they_look_like_and_options_stay() {
        let text_at = |text: &str| {
            let memory = VecMem::new(0x100);
            memory.write_bytes(Hpa::new(0x10), text.as_bytes());
            (Text::find(Hpa::new(0x10), &memory).unwrap(), memory)
        };
        let of = |text: Text, memory: &VecMem| {
            String::from_utf8(memory.bytes(text.span().start(), text.span().len() as usize)).unwrap()
        };
        let own = |text: &str| {
            let (text, memory) = text_at(text);
            of(text.without_path(&memory), &memory)
        };
        let of_a_module = |text: &str| {
            let (text, memory) = text_at(text);
            of(text.without_file_name(&memory), &memory)
        };
        assert_eq!(own("nvmx log=debug"), "log=debug");
        assert_eq!(own("nvmx "), "");
        assert_eq!(of_a_module("nvmx"), "");
        assert_eq!(own(""), "");
        assert_eq!(own("/a b/nvmx  log=debug fields=auto"), "log=debug fields=auto");
        // A module's words may have slashes.
        assert_eq!(of_a_module("bzImage root=/dev/sda ro"), "root=/dev/sda ro");
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
        assert_eq!(own_words(&info, &memory), ["a", "b", "c"]);
        assert_eq!(kept(&info, &memory), [(Span::new(0x1000, 0x2000), "m".to_string())]);
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
        assert_eq!(own_words(&info, &memory), ["/my", "files/nvmx", "log=warn"]);
        assert_eq!(kept(&info, &memory), [(Span::new(0x20_0000, 0x20_1000), "l2 a /b".to_string())]);
        let kinds: Vec<_> = info.memory.iter().map(|r| r.kind).collect();
        assert_eq!(kinds, [RangeKind::Usable, RangeKind::Reserved]);
    }

    /// Information of multiboot with so many modules, each with this command line.
    fn with_modules(count: u32, line: &[u8]) -> VecMem {
        let list: Vec<u32> = (0..count).flat_map(|n| [n * 0x1000, n * 0x1000 + 0x800, 0x1100, 0]).collect();
        let memory = VecMem::new(0x20_0000 + list.len() * 4);
        let mut fixed = [0u32; 22];
        fixed[0] = 1 << 0 | 1 << 3;
        (fixed[1], fixed[2], fixed[5], fixed[6]) = (640, 1024, count, 0x20_0000);
        memory.write_bytes(Hpa::new(0x1000), fixed.map(u32::to_le_bytes).as_flattened());
        memory.write_bytes(Hpa::new(0x1100), line);
        let list: Vec<u8> = list.into_iter().flat_map(u32::to_le_bytes).collect();
        memory.write_bytes(Hpa::new(0x20_0000), &list);
        memory
    }

    #[test]
    fn modules_and_command_lines_of_any_number_and_length_are_kept() {
        for (count, bytes) in [(0, 0), (1, 100_000), (1, 1 << 20), (1000, 1000), (1 << 16, 10)] {
            let memory = with_modules(count, &vec![b'x'; bytes]);
            let info = BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
            assert_eq!(info.to_keep(), (count as usize, count as usize * bytes));
            let kept = kept(&info, &memory);
            assert!(kept.iter().all(|(_, line)| *line == "x".repeat(bytes)));
            let spans = (0..u64::from(count)).map(|n| Span::sized(n * 0x1000, 0x800));
            assert!(spans.eq(kept.iter().map(|(span, _)| *span)), "{count}");
        }
    }

    #[test]
    fn a_list_that_is_lost_or_has_no_room_is_told() {
        let memory = with_modules(2, b"x y");
        let info = BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        let keep =
            |modules, text| info.keep(&memory, &mut vec![Module::default(); modules], &mut vec![0; text]).is_ok();
        assert!(keep(2, 6) && !keep(1, 6) && !keep(2, 5));
        memory.write_bytes(Hpa::new(0x1100), b"longer");
        assert!(!keep(2, 6));
    }

    #[test]
    fn what_lists_the_modules_is_known_to_be_in_use() {
        let memory = with_modules(3, b"x y");
        let info = BootInfo::read(multiboot1::BOOT_MAGIC, Hpa::new(0x1000), &memory).unwrap();
        let in_use: Vec<_> = info.in_use(&memory).filter(|span| !span.is_empty()).collect();
        assert_eq!(in_use, [[Span::sized(0x1100, 3); 3].as_slice(), &[Span::sized(0x20_0000, 48)]].concat());
    }

    #[test]
    fn words_of_any_length_are_told_apart_and_none_is_taken_for_another() {
        let long = format!("frames={}1", "0".repeat(56));
        let longer = format!("frames={}12", "0".repeat(56));
        let memory = VecMem::new(0x1000);
        memory.write_bytes(Hpa::new(0x7B), format!(" \ta  {long} {longer} \u{e4}\n").as_bytes());
        let words: Vec<_> = Text::find(Hpa::new(0x7B), &memory).unwrap().words(&memory).collect();
        let [a, kept, cut, foreign] = &words[..] else { panic!("{words:?}") };
        assert_eq!([a, kept, foreign].map(|word| word.as_str()), ["a", long.as_str(), "??"]);
        assert_eq!(cut.as_str(), format!("{}…", &longer[..61]));
    }

    #[test]
    fn information_that_nvmx_cannot_use_is_refused() {
        let read = |magic, at, memory: &VecMem| BootInfo::read(magic, Hpa::new(at), memory).unwrap_err();
        let endless = |line| read(multiboot1::BOOT_MAGIC, 0x1000, &with_modules(1, &vec![b'x'; line])).to_string();
        let memory = with_modules(1, b"x");
        assert_eq!(read(0x1234, 0, &memory), InfoError::UnknownProtocol(0x1234));
        assert_eq!(read(multiboot1::BOOT_MAGIC, 0x7000, &memory), InfoError::NoMemoryMap);
        assert!(matches!(read(pvh::START_MAGIC, 0x7000, &memory), InfoError::Malformed(_)));
        assert!(endless(0x10_1000).contains("does not end within 1 MiB"));
        let many = read(multiboot1::BOOT_MAGIC, 0x1000, &with_modules((1 << 16) + 1, b""));
        assert!(many.to_string().contains("more than 65,536 modules"), "{many}");
        let much = read(multiboot1::BOOT_MAGIC, 0x1000, &with_modules(17, &[b'x'; 1 << 20]));
        assert!(much.to_string().contains("more than 16 MiB"), "{much}");
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
            let memory = VecMem::from_bytes(bytes);
            if let Ok(info) = BootInfo::read(magic, Hpa::new(0), &memory) {
                let (count, bytes) = info.to_keep();
                prop_assert_eq!(info.modules(&memory).count(), count);
                let length = |span: Span| span.len() as usize;
                prop_assert_eq!(info.modules(&memory).map(|module| length(module.line.span())).sum::<usize>(), bytes);
            }
        }
    }
}
