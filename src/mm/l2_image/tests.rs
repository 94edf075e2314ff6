//! Loading small images in small machines.

use proptest::prelude::*;

use super::{
    header::{Segment, Segments},
    plan::{INFO_SIZE, plan},
    *,
};
use crate::{
    boot::{
        BootInfo,
        info::{CommandLine, Module},
    },
    mm::{map::RangeKind, phys::VecMem},
};

pub const MIB: u64 = 1 << 20;
pub const MEMORY: u64 = 8 * MIB;
pub const OWN: Span = Span::new(6 * MIB, 8 * MIB);

pub fn memory_map() -> MemoryMap {
    let mut map = MemoryMap::new();
    map.add(Span::new(0, 0x9_F000), RangeKind::Usable).unwrap();
    map.add(Span::new(MIB, MEMORY), RangeKind::Usable).unwrap();
    map.set(OWN, RangeKind::Reserved).unwrap();
    map
}

/// A machine with the modules' bytes where the loader put them.
pub fn machine(modules: &[(u64, &[u8], &str)]) -> (GuestMemory<VecMem>, Modules) {
    let memory = VecMem::new(MEMORY as usize);
    let mut list = Modules::new();
    for (at, bytes, line) in modules {
        memory.write_bytes(Hpa::new(*at), bytes);
        let command_line = CommandLine::from(line).unwrap();
        list.push(Module { span: Span::sized(*at, bytes.len() as u64), command_line });
    }
    (GuestMemory::new(memory, OWN, 36), list)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn with_checksum(mut header: Vec<u32>, at: usize, summed: &[usize]) -> Vec<u8> {
    header[at] = summed.iter().fold(0u32, |sum, i| sum.wrapping_sub(header[*i]));
    words(&header)
}

fn multiboot1_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let mut header = vec![0x1BAD_B002, flags, 0];
    header.extend(addresses);
    with_checksum(header, 2, &[0, 1])
}

fn multiboot2_header(tags: &[u32]) -> Vec<u8> {
    let mut header = vec![0xE852_50D6, 0, 16 + 4 * tags.len() as u32, 0];
    header.extend(tags);
    with_checksum(header, 3, &[0, 1, 2])
}

/// A 64-bit ELF: one segment with the whole file at `to`, `bss` zeros behind it, then a header, then `content`.
fn elf64(header: &[u8], to: u64, content: &[u8], bss: u64) -> Vec<u8> {
    let mut file = vec![0; 120];
    let len = (120 + header.len() + content.len()) as u64;
    let virtual_address = to.wrapping_add(0xFFFF_FFFF_8000_0000);
    file[..7].copy_from_slice(&[0x7F, b'E', b'L', b'F', 2, 1, 1]);
    file[16] = 2;
    file[18] = 62;
    file[24..32].copy_from_slice(&virtual_address.wrapping_add(16).to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 1;
    file[64] = 1;
    for (at, value) in [(80, virtual_address), (88, to), (96, len), (104, len + bss)] {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    file.extend(header);
    file.extend(content);
    file
}

fn elf32(header: &[u8], to: u32, content: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 88];
    let len = (88 + header.len() + content.len()) as u32;
    file[..7].copy_from_slice(&[0x7F, b'E', b'L', b'F', 1, 1, 1]);
    file[18] = 3;
    file[24..28].copy_from_slice(&(to + 16).to_le_bytes());
    (file[28], file[42], file[44], file[52]) = (52, 32, 1, 1);
    for (at, value) in [(60, to), (64, to), (68, len), (72, len)] {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    file.extend(header);
    file.extend(content);
    file
}

fn told(guest: &GuestMemory<VecMem>, start: Start) -> BootInfo {
    BootInfo::read(start.eax, guest.translate(start.ebx).unwrap(), guest.phys()).unwrap()
}

#[test]
fn an_elf_with_multiboot1_header_is_loaded_where_it_was_linked() {
    let file = elf64(&multiboot1_header(0b11, &[]), 2 * MIB, b"the code", 0x100);
    let (guest, modules) = machine(&[(3 * MIB, &file, "one two"), (4 * MIB, b"a module", "m")]);
    guest.phys().write_bytes(Hpa::new(2 * MIB), &[0xCC; 0x1000]);
    let start = load(&guest, &memory_map(), &modules, None).unwrap();
    assert_eq!(start.protocol, Protocol::Multiboot1);
    assert_eq!((start.entry, start.eax), (Gpa::new(2 * MIB + 16), 0x2BAD_B002));
    let mut loaded = file.clone();
    loaded.resize(file.len() + 0x100, 0);
    loaded.push(0xCC);
    assert_eq!(guest.phys().bytes(2 * MIB, loaded.len()), loaded);
    let told = told(&guest, start);
    assert_eq!(told.command_line.as_str(), "one two");
    assert_eq!(told.loader.as_str(), "nvmx");
    assert_eq!(told.modules[..], modules[1..]);
    assert_eq!(told.memory, memory_map());
}

#[test]
fn an_elf_with_multiboot2_header_gets_tags_and_the_rsdp() {
    let file = elf32(&multiboot2_header(&[1 | 1 << 16, 12, 99, 0, 0, 8]), 2 * MIB as u32, b"the code");
    let (guest, modules) = machine(&[(3 * MIB, &file, "x"), (4 * MIB, b"a module", "m"), (5 * MIB, b"n", "")]);
    let rsdp = Rsdp::from([7; 36]);
    let start = load(&guest, &memory_map(), &modules, Some(&rsdp)).unwrap();
    assert_eq!((start.entry, start.eax), (Gpa::new(2 * MIB + 16), 0x36D7_6289));
    assert_eq!(guest.phys().bytes(2 * MIB, file.len()), file);
    let told = told(&guest, start);
    assert_eq!(told.command_line.as_str(), "x");
    assert_eq!(told.modules[..], modules[1..]);
    assert_eq!(told.memory, memory_map());
    assert_eq!(told.rsdp, Some(rsdp));
}

#[test]
fn address_fields_win_over_program_headers() {
    let to = 2 * MIB as u32;
    let header = multiboot1_header(1 << 16, &[to + 0x200, to + 0x200, 0, to + 0x1000, to + 0x234]);
    let file = elf64(&header, 4 * MIB, b"the code", 0);
    let (guest, modules) = machine(&[(3 * MIB, &file, "")]);
    guest.phys().write_bytes(Hpa::new(2 * MIB), &[0xCC; 0x2000]);
    let start = load(&guest, &memory_map(), &modules, None).unwrap();
    assert_eq!(start.entry, Gpa::new(2 * MIB + 0x234));
    let mut loaded = file[120..].to_vec();
    loaded.resize(0xE00, 0);
    assert_eq!(guest.phys().bytes(2 * MIB + 0x200, 0xE01)[..0xE00], loaded);
    assert_eq!(guest.phys().bytes(2 * MIB + 0x1000, 1), [0xCC]);
}

#[test]
fn an_image_may_overwrite_its_own_file_and_its_modules() {
    let content: Vec<u8> = (0..0x8000u32).map(|i| i as u8).collect();
    let file = elf64(&multiboot1_header(0, &[]), 2 * MIB, &content, 0x1_0000);
    let (guest, modules) =
        machine(&[(2 * MIB - 0x100, &file, ""), (2 * MIB + 0x9000, b"first", "1"), (2 * MIB + 0xA000, b"second", "2")]);
    let start = load(&guest, &memory_map(), &modules, None).unwrap();
    assert_eq!(guest.phys().bytes(2 * MIB, file.len()), file);
    let told = told(&guest, start);
    for (module, expected) in told.modules.iter().zip([b"first".as_slice(), b"second"]) {
        assert_eq!(guest.phys().bytes(module.span.start(), module.span.len() as usize), expected);
    }
}

#[test]
fn bad_images_are_refused_with_a_reason() {
    let good = elf64(&multiboot1_header(0, &[]), 2 * MIB, b"code", 0);
    let error = |file: &[u8]| {
        let (guest, modules) = machine(&[(3 * MIB, file, "")]);
        let before = guest.phys().bytes(0, MEMORY as usize);
        let error = load(&guest, &memory_map(), &modules, None).unwrap_err();
        assert!(guest.phys().bytes(0, MEMORY as usize) == before, "a refused image must not be half loaded");
        error
    };
    let (guest, _) = machine(&[]);
    assert_eq!(load(&guest, &memory_map(), &Modules::new(), None), Err(LoadError::NoModule));
    assert_eq!(error(b"hello"), LoadError::NotElf { size: 5, first: *b"hello\0\0\0" });
    assert!(error(b"hello").to_string().contains("5 bytes, the first are 68 65 6c 6c 6f; expected"));
    let mut arm = good.clone();
    arm[18] = 183;
    assert!(matches!(error(&arm), LoadError::NotElf { .. }));
    assert!(matches!(error(&elf64(&[], 2 * MIB, b"code", 0)), LoadError::NoHeader { .. }));
    assert!(matches!(error(&good[..100]), LoadError::NoHeader { .. }));
    let in_nvmx = elf64(&multiboot1_header(0, &[]), OWN.start() - 16, b"code", 0);
    assert!(matches!(error(&in_nvmx), LoadError::OverlapsNvmx { own: OWN, .. }));
    assert!(matches!(error(&elf64(&multiboot1_header(0, &[]), 0x9_F000, b"code", 0)), LoadError::NoMemory(_)));
    assert!(matches!(error(&elf64(&multiboot1_header(0, &[]), u64::MAX - 8, b"", 0)), LoadError::BrokenElf(_)));
    assert_eq!(error(&elf64(&multiboot1_header(4, &[]), 2 * MIB, b"", 0)), LoadError::Unsupported("a video mode"));
    let request = multiboot2_header(&[1, 12, 8, 0, 0, 8]);
    assert_eq!(error(&elf64(&request, 2 * MIB, b"", 0)), LoadError::UnsupportedInformation(8));
    let addresses = multiboot1_header(1 << 16, &[2 << 20, 3 << 20, 0, 0, 0]);
    assert!(matches!(error(&elf64(&addresses, 2 * MIB, b"", 0)), LoadError::BrokenHeader(_)));
}

fn span(limit: u64) -> impl Strategy<Value = Span> {
    (0..limit, 1..limit / 4).prop_map(|(start, len)| Span::sized(start << 8, len << 8))
}

proptest! {
    #[test]
    fn nothing_overlaps_in_a_plan(
        to in prop::collection::vec(span(0x6000), 1..4),
        file in span(0x6000), modules in prop::collection::vec(span(0x6000), 0..5),
    ) {
        let segments: Segments = to.iter().map(|to| Segment { offset: 0, in_file: 0, to: *to, zeroed: true }).collect();
        let image = Image { protocol: Protocol::Multiboot1, entry: 0, segments, modules_end: 1 << 32 };
        let modules: Modules =
            modules.iter().map(|span| Module { span: *span, command_line: CommandLine::new() }).collect();
        let map = memory_map();
        let plan = match plan(&image, file, &modules, &map, OWN) {
            Ok(plan) => plan,
            Err(error) => {
                let right = match error {
                    LoadError::OverlapsNvmx { wanted, own } => wanted.overlaps(own),
                    LoadError::NoMemory(wanted) => !map.is_usable(wanted),
                    LoadError::SegmentsOverlap(a, b) => a.overlaps(b),
                    LoadError::NoRoom { .. } => true,
                    _ => false,
                };
                prop_assert!(right, "{}", error);
                return Ok(());
            }
        };
        prop_assert_eq!(plan.info.len(), INFO_SIZE);
        // What is written before or while the image is loaded keeps off every source and every other destination.
        let sources: Vec<Span> = modules.iter().map(|m| m.span).chain([file]).collect();
        let moved = plan.modules.iter().zip(&modules).filter(|(new, old)| new.span != old.span).map(|(new, _)| new.span);
        let mut written: Vec<Span> = moved.chain([plan.info]).collect();
        if plan.file != file { written.push(plan.file); }
        for (n, a) in written.iter().enumerate() {
            prop_assert!(map.is_usable(*a) && !a.overlaps(OWN));
            prop_assert!(sources.iter().all(|s| !s.overlaps(*a)));
            prop_assert!(written[n + 1..].iter().all(|b| !a.overlaps(*b)));
        }
        // And nothing that L2 needs lies under a segment.
        let kept = plan.modules.iter().map(|m| m.span).chain([plan.info, plan.file]);
        for span in kept {
            prop_assert!(to.iter().all(|s| !s.overlaps(span)));
        }
    }

    #[test]
    fn any_bytes_are_loaded_or_refused(mut file in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..3) {
        let start = elf64(&multiboot1_header(u32::from(kind) << 16, &[]), 2 * MIB, b"", 0);
        for (byte, good) in file.iter_mut().zip(&start[..20]) { *byte = *good; }
        if let Some(slot) = file.get_mut(200..212) { slot.copy_from_slice(&start[120..132]); }
        let (guest, modules) = machine(&[(3 * MIB, &file, "")]);
        let _ = load(&guest, &memory_map(), &modules, None);
        prop_assert!(guest.phys().bytes(OWN.start(), OWN.len() as usize) == vec![0; OWN.len() as usize]);
    }
}
