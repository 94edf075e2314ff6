//! Loading small images in small machines.

use proptest::prelude::*;

use crate::boot::guest_image::header::{FileSegment, Segments};
use crate::boot::guest_image::plan::{INFO_SIZE, plan};
use crate::boot::guest_image::*;
use crate::{
    boot::{
        BootInfo,
        info::{Module, Rsdp},
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
pub fn machine<'a>(modules: &[(u64, &[u8], &'a str)]) -> (GuestMemory<VecMem>, Vec<Module<'a>>) {
    let memory = VecMem::new(MEMORY as usize);
    let put = |(at, bytes, line): &(u64, &[u8], &'a str)| {
        memory.write_bytes(Hpa::new(*at), bytes);
        let span = Span::sized(*at, bytes.len() as u64);
        Module { span, place: span, command_line: line.as_bytes() }
    };
    let modules = modules.iter().map(put).collect();
    (GuestMemory::new(memory, OWN, 36), modules)
}

fn places(modules: &[Module<'_>]) -> Places {
    modules.iter().map(|module| (module.place, module.command_line.to_vec())).collect()
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

/// Where modules lie for L2, and their command lines.
type Places = Vec<(Span, Vec<u8>)>;

/// What L2 reads: the information, the words of its command line, its modules.
fn told(guest: &GuestMemory<VecMem>, start: Start) -> (BootInfo, Vec<String>, Places) {
    let memory = guest.phys();
    let info = BootInfo::read(start.eax, guest.translate(start.ebx).unwrap(), memory).unwrap();
    let words = info.command_line.words(memory).map(|word| word.to_string()).collect();
    let bytes = |span: Span| memory.bytes(span.start(), span.len() as usize);
    let modules = info.modules(memory).map(|module| (module.span, bytes(module.line.span()))).collect();
    (info, words, modules)
}

#[test]
fn an_elf_with_multiboot1_header_is_loaded_where_it_was_linked() {
    let file = elf64(&multiboot1_header(0b11, &[]), 2 * MIB, b"the code", 0x100);
    let (guest, mut modules) = machine(&[(3 * MIB, &file, "one two"), (4 * MIB, b"a module", "m")]);
    guest.phys().write_bytes(Hpa::new(2 * MIB), &[0xCC; 0x1000]);
    let start = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
    assert_eq!(start.protocol, Protocol::Multiboot1);
    assert_eq!((start.entry, start.eax), (Gpa::new(2 * MIB + 16), 0x2BAD_B002));
    let mut loaded = file.clone();
    loaded.resize(file.len() + 0x100, 0);
    loaded.push(0xCC);
    assert_eq!(guest.phys().bytes(2 * MIB, loaded.len()), loaded);
    let (told, words, listed) = told(&guest, start);
    assert_eq!(words, ["one", "two"]);
    assert_eq!(told.loader.as_str(), "nvmx");
    assert_eq!(listed, places(&modules[1..]));
    assert_eq!(told.memory, memory_map());
}

#[test]
fn an_elf_with_multiboot2_header_gets_tags_and_the_rsdp() {
    let file = elf32(&multiboot2_header(&[1 | 1 << 16, 12, 99, 0, 0, 8]), 2 * MIB as u32, b"the code");
    let (guest, mut modules) = machine(&[(3 * MIB, &file, "x"), (4 * MIB, b"a module", "m"), (5 * MIB, b"n", "")]);
    let rsdp = Rsdp::from([7; 36]);
    let start = load(&guest, &memory_map(), &mut modules, Some(&rsdp), &Extras::default()).unwrap();
    assert_eq!((start.entry, start.eax), (Gpa::new(2 * MIB + 16), 0x36D7_6289));
    assert_eq!(guest.phys().bytes(2 * MIB, file.len()), file);
    let (told, words, listed) = told(&guest, start);
    assert_eq!(words, ["x"]);
    assert_eq!(listed, places(&modules[1..]));
    assert_eq!(told.memory, memory_map());
    assert_eq!(told.rsdp, Some(rsdp));
}

#[test]
fn address_fields_win_over_program_headers() {
    let to = 2 * MIB as u32;
    let header = multiboot1_header(1 << 16, &[to + 0x200, to + 0x200, 0, to + 0x1000, to + 0x234]);
    let file = elf64(&header, 4 * MIB, b"the code", 0);
    let (guest, mut modules) = machine(&[(3 * MIB, &file, "")]);
    guest.phys().write_bytes(Hpa::new(2 * MIB), &[0xCC; 0x2000]);
    let start = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
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
    let (guest, mut modules) =
        machine(&[(2 * MIB - 0x100, &file, ""), (2 * MIB + 0x9000, b"first", "1"), (2 * MIB + 0xA000, b"second", "2")]);
    let start = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
    assert_eq!(guest.phys().bytes(2 * MIB, file.len()), file);
    let (_, _, listed) = told(&guest, start);
    for ((span, _), expected) in listed.iter().zip([b"first".as_slice(), b"second"]) {
        assert_eq!(guest.phys().bytes(span.start(), span.len() as usize), expected);
    }
}

#[test]
fn modules_of_any_number_and_lines_of_any_length_are_handed_on() {
    let content = vec![0x5A; 0x1000];
    let headers = [multiboot1_header(0, &[]), multiboot2_header(&[0, 8])];
    let line = "x".repeat(0x1_0000);
    for header in headers {
        let file = elf64(&header, 2 * MIB, &content, 0x10_0000);
        // Every second one lies where the image goes; some lines are no ASCII.
        let lines: Vec<_> = (0..300).map(|n| format!("{n} \u{e4} {}", "y".repeat(n))).collect();
        let mut list: Vec<(u64, &[u8], &str)> = vec![(5 * MIB, &file, &line)];
        for (n, line) in (0..).zip(&lines) {
            list.push((if n % 2 == 0 { 2 * MIB } else { 4 * MIB } + 0x1000 * n, &content[..n as usize + 1], line));
        }
        let (guest, mut modules) = machine(&list);
        let start = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
        assert_eq!(guest.phys().bytes(2 * MIB, file.len()), file);
        let (info, _, listed) = told(&guest, start);
        assert_eq!(info.command_line.span().len(), line.len() as u64);
        assert_eq!(listed, places(&modules[1..]));
        assert_eq!(
            listed.iter().map(|(_, line)| line.as_slice()).collect::<Vec<_>>(),
            lines.iter().map(|l| l.as_bytes()).collect::<Vec<_>>()
        );
        for (n, (span, _)) in listed.iter().enumerate() {
            assert_eq!(guest.phys().bytes(span.start(), n + 1), content[..n + 1]);
        }
    }
}

#[test]
fn bad_images_are_refused_with_a_reason() {
    let good = elf64(&multiboot1_header(0, &[]), 2 * MIB, b"code", 0);
    let error = |file: &[u8]| {
        let (guest, mut modules) = machine(&[(3 * MIB, file, "")]);
        let before = guest.phys().bytes(0, MEMORY as usize);
        let error = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap_err();
        assert!(guest.phys().bytes(0, MEMORY as usize) == before, "a refused image must not be half loaded");
        error
    };
    let (guest, _) = machine(&[]);
    assert_eq!(load(&guest, &memory_map(), &mut [], None, &Extras::default()), Err(LoadError::NoModule));
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

/// A file that is no ELF file: its multiboot 1 header at `at`, with these address fields.
fn flat(at: usize, addresses: [u32; 5], len: usize) -> Vec<u8> {
    let mut file: Vec<u8> = (0..len).map(|n| n as u8 | 1).collect();
    let header = multiboot1_header(1 << 16, &addresses);
    file[at..at + header.len()].copy_from_slice(&header);
    file
}

const TO: u32 = 2 << 20;

#[test]
fn a_flat_file_is_loaded_where_its_address_fields_say() {
    let flat2 = {
        let mut tags = vec![2, 24, TO + 0x40, TO, TO + 0x900, TO + 0xA00, 3, 12, TO + 0x123, 0];
        tags.extend([0, 8]);
        let mut file = vec![0x5A; 0x1000];
        let header = multiboot2_header(&tags);
        file[0x40..0x40 + header.len()].copy_from_slice(&header);
        file
    };
    // Whole file; a part of it, with zeros behind; the file's first bytes are not loaded.
    for (file, offset, in_file, zeros, entry) in [
        (flat(0x20, [TO + 0x20, TO, 0, 0, TO + 0x800], 0x1000), 0, 0x1000, 0, 0x800),
        (flat(0x20, [TO + 0x20, TO, TO + 0x400, TO + 0x900, TO], 0x1000), 0, 0x400, 0x500, 0),
        (flat(0x200, [TO + 0x100, TO, 0, 0, TO + 4], 0x1000), 0x100, 0xF00, 0, 4),
        (flat(0x20, [TO + 0x20, u32::MAX, 0, 0, TO], 0x1000), 0, 0x1000, 0, 0),
        (flat2, 0, 0x900, 0x100, 0x123),
    ] {
        let (guest, mut modules) = machine(&[(3 * MIB, &file, "a line"), (4 * MIB, b"a module", "m")]);
        guest.phys().write_bytes(Hpa::new(TO.into()), &[0xCC; 0x2000]);
        let start = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap();
        assert_eq!(start.entry, Gpa::new(u64::from(TO) + entry));
        let mut expected = file[offset..offset + in_file].to_vec();
        expected.resize(in_file + zeros, 0);
        expected.push(0xCC);
        assert_eq!(guest.phys().bytes(TO.into(), expected.len()), expected);
        let (_, words, listed) = told(&guest, start);
        assert_eq!(words, ["a", "line"]);
        assert_eq!(listed, places(&modules[1..]));
    }
}

#[test]
fn bad_address_fields_are_refused_and_named() {
    let error = |at, addresses| {
        let file = flat(at, addresses, 0x1000);
        let (guest, mut modules) = machine(&[(3 * MIB, &file, "")]);
        load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap_err().to_string()
    };
    for (at, addresses, says) in [
        (0x20, [TO, TO + 0x20, 0, 0, TO], "header_addr is below its load_addr"),
        (0x20, [TO + 0x40, TO, 0, 0, TO], "begin before the file"),
        (0x20, [TO + 0x20, TO, TO - 1, 0, TO], "load_end_addr is not above"),
        (0x20, [TO + 0x20, TO, TO, 0, TO], "load_end_addr is not above"),
        (0x20, [TO + 0x20, TO, TO + 0x1001, 0, TO], "beyond the end of the file"),
        (0x20, [TO + 0x20, TO, TO + 0x30, 0, TO], "cuts off the header"),
        (0x20, [TO + 0x20, TO, 0, TO + 0xFFF, TO], "bss_end_addr is below"),
        (0x20, [TO + 0x20, TO, 0, TO + 0x2000, TO + 0x2000], "entry point lies outside"),
        (0x20, [TO + 0x20, TO, 0, 0, TO - 1], "entry point lies outside"),
        (0, [OWN.start() as u32, OWN.start() as u32, 0, 0, OWN.start() as u32], "overlaps nvmx"),
        (0, [0x9_F000, 0x9_F000, 0, 0, 0x9_F000], "no usable memory"),
        (0, [u32::MAX - 0x10, u32::MAX - 0x10, 0, 0, u32::MAX - 0x10], "no usable memory"),
    ] {
        let said = error(at, addresses);
        assert!(said.contains(says), "{addresses:x?}: {said}");
    }
    let mut no_addresses = vec![0; 0x100];
    no_addresses[..12].copy_from_slice(&multiboot1_header(0, &[]));
    let (guest, mut modules) = machine(&[(3 * MIB, &no_addresses, "")]);
    let error = load(&guest, &memory_map(), &mut modules, None, &Extras::default()).unwrap_err();
    assert!(matches!(error, LoadError::NotElf { .. }), "{error}");
}

#[test]
fn the_first_stack_is_grubs_or_another_free_page() {
    let file = flat(0, [TO, TO, 0, 0, TO], 0x100);
    let stack = |modules: &[(u64, &[u8], &str)], map: &MemoryMap| {
        let (guest, mut modules) = machine(modules);
        load(&guest, map, &mut modules, None, &Extras::default()).unwrap().esp.get()
    };
    assert_eq!(stack(&[(3 * MIB, &file, "")], &memory_map()), 0x7_FF00);
    // A module lies there; firmware keeps it.
    let taken = stack(&[(3 * MIB, &file, ""), (0x7_F800, b"module", "")], &memory_map());
    let mut map = memory_map();
    map.set(Span::new(0x7_0000, 0x9_F000), RangeKind::Reserved).unwrap();
    for esp in [taken, stack(&[(3 * MIB, &file, "")], &map)] {
        let page = Span::new(esp - 0x1000, esp);
        assert!(esp != 0x7_FF00 && map.is_usable(page) && !page.overlaps(Span::sized(3 * MIB, 0x1000)), "{esp:#x}");
    }
}

/// What a loader says by multiboot 1, at 0x1000, with all that the specification knows.
fn everything_by_multiboot1() -> VecMem {
    let memory = VecMem::new(0x1_0000);
    let mut info = [0u32; 29];
    info[0] = 0x1FDB | 1 << 2;
    (info[1], info[2]) = (636, 7168);
    info[3] = 0x8001_FFFF;
    (info[13], info[14], info[15]) = (10, 0x3000, 0xF_E6F5);
    (info[17], info[18], info[19]) = (0x3100, 0x3200, 0x3400);
    (info[20], info[21]) = (0xC000_4117, 0x0020_1234);
    (info[22], info[24], info[25], info[26]) = (0xE000_0000, 4096, 1024, 768);
    info[0] &= !(1 << 3 | 1 << 6);
    memory.write_bytes(Hpa::new(0x1000), &words(&info));
    // 32 bits per pixel, direct colours, then red, green, blue
    memory.write_bytes(Hpa::new(0x1000 + 108), &[32, 1, 16, 8, 8, 8, 0, 8]);
    for (at, byte, len) in [(0x3000, 0xD1, 10), (0x3100, 0xA1, 20), (0x3200, 0xC1, 512), (0x3400, 0xE1, 256)] {
        memory.write_bytes(Hpa::new(at), &vec![byte; len]);
    }
    memory
}

#[test]
fn what_the_loader_said_is_handed_on_by_either_protocol() {
    let given = BootInfo::read(0x2BAD_B002, Hpa::new(0x1000), &everything_by_multiboot1()).unwrap();
    assert!(given.extras.has_screen());
    let one = flat(0, [TO, TO, 0, 0, TO], 0x100);
    let (guest, mut modules) = machine(&[(3 * MIB, &one, "")]);
    let start = load(&guest, &memory_map(), &mut modules, None, &given.extras).unwrap();
    let word = |at: u64| guest.phys().read_u32(Hpa::new(at));
    let info = start.ebx.get();
    let bytes = |at: u64, len| guest.phys().bytes(at, len);
    assert_eq!(word(info), 0x1FCF);
    assert_eq!((word(info + 12), word(info + 52), word(info + 60)), (0x8001_FFFF, 10, 0xF_E6F5));
    for (pointer, byte, len) in [(56, 0xD1, 10), (68, 0xA1, 20), (72, 0xC1, 512), (76, 0xE1, 256)] {
        assert_eq!(bytes(word(info + pointer).into(), len), vec![byte; len], "{pointer}");
    }
    assert_eq!((word(info + 80), word(info + 84)), (0xC000_4117, 0x0020_1234));
    assert_eq!([88, 92, 96, 100, 104].map(|at| word(info + at)), [0xE000_0000, 0, 4096, 1024, 768]);
    assert_eq!(bytes(info + 108, 8), [32, 1, 16, 8, 8, 8, 0, 8]);

    // The same for an image of multiboot 2, which asks for some of it; then from there once more.
    let request = [1, 20, 5, 7, 8, 0, 5, 20, 0, 0, 0, 0, 0, 8];
    let two = elf32(&multiboot2_header(&request), TO, b"the code");
    let mut extras = given.extras;
    let mut with_smbios = vec![0; 24];
    (with_smbios[0], with_smbios[4], with_smbios[8]) = (13, 21, 2);
    extras.take_tag(13, Hpa::new(0), 21, &VecMem::from_bytes(with_smbios.clone()));
    for _ in 0..2 {
        let (guest, mut modules) = machine(&[(3 * MIB, &two, "")]);
        let start = load(&guest, &memory_map(), &mut modules, None, &extras).unwrap();
        let info = start.ebx.get();
        let word = |at: u64| guest.phys().read_u32(Hpa::new(at));
        let mut tags = std::collections::BTreeMap::new();
        let mut at = info + 8;
        while word(at) != 0 {
            tags.insert(word(at), guest.phys().bytes(at + 8, word(at + 4) as usize - 8));
            at += u64::from(word(at + 4)).next_multiple_of(8);
        }
        assert_eq!(tags[&5], words(&[0x80, 1, u32::MAX]));
        assert_eq!(tags[&10], [0xA1; 20]);
        assert_eq!(tags[&7][..8], words(&[0xC000_4117, 0x0020_1234]));
        assert_eq!((&tags[&7][8..520], &tags[&7][520..]), (&[0xC1; 512][..], &[0xE1; 256][..]));
        let fixed = words(&[0xE000_0000, 0, 4096, 1024, 768]);
        assert_eq!((&tags[&8][..20], &tags[&8][20..]), (&fixed[..], &[32, 1, 0, 0, 16, 8, 8, 8, 0, 8][..]));
        assert_eq!(tags[&13], with_smbios[8..21]);
        extras = BootInfo::read(start.eax, Hpa::new(info), guest.phys()).unwrap().extras;
    }
}

#[test]
fn a_palette_is_handed_on_and_one_that_is_cut_short_is_none() {
    let memory = everything_by_multiboot1();
    let [palette_low, palette_high] = 0x3200u16.to_le_bytes();
    memory.write_bytes(Hpa::new(0x1000 + 108), &[8, 0, palette_low, palette_high, 0, 0, 16, 0]);
    let given = BootInfo::read(0x2BAD_B002, Hpa::new(0x1000), &memory).unwrap().extras;
    let file = flat(0, [TO, TO, 0, 0, TO], 0x100);
    let (guest, mut modules) = machine(&[(3 * MIB, &file, "")]);
    let start = load(&guest, &memory_map(), &mut modules, None, &given).unwrap();
    let again = told(&guest, start).0.extras;
    assert_eq!(again.framebuffer.as_ref().unwrap().colours[..], [0xC1; 48]);
    memory.write_bytes(Hpa::new(0x1000 + 114), &300u16.to_le_bytes());
    let given = BootInfo::read(0x2BAD_B002, Hpa::new(0x1000), &memory).unwrap().extras;
    assert!(given.framebuffer.unwrap().colours.is_empty());
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
        let segments: Segments = to.iter().map(|to| FileSegment { offset: 0, in_file: 0, to: *to, zeroed: true }).collect();
        let image = Image { protocol: Protocol::Multiboot1, entry: 0, segments, modules_end: 1 << 32 };
        let mut modules: Vec<_> =
            modules.iter().map(|span| Module { span: *span, place: *span, command_line: b"a line" }).collect();
        let map = memory_map();
        let first = Module { span: file, place: file, command_line: b"another" };
        let plan = match plan(&image, &first, &mut modules, &map, OWN) {
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
        prop_assert!(plan.info.len() >= INFO_SIZE + 7 + 7 * modules.len() as u64);
        // What is written before or while the image is loaded keeps off every source and every other destination.
        let sources: Vec<Span> = modules.iter().map(|m| m.span).chain([file]).collect();
        let moved = modules.iter().filter(|m| m.place != m.span).map(|m| m.place);
        let mut written: Vec<Span> = moved.chain([plan.info]).collect();
        if plan.file != file { written.push(plan.file); }
        for (n, a) in written.iter().enumerate() {
            prop_assert!(map.is_usable(*a) && !a.overlaps(OWN));
            prop_assert!(sources.iter().all(|s| !s.overlaps(*a)));
            prop_assert!(written[n + 1..].iter().all(|b| !a.overlaps(*b)));
        }
        // And nothing that L2 needs lies under a segment.
        let kept = modules.iter().map(|m| m.place).chain([plan.info, plan.file]);
        for span in kept {
            prop_assert!(to.iter().all(|s| !s.overlaps(span)));
        }
    }

    #[test]
    fn any_bytes_are_loaded_or_refused(mut file in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..3) {
        let start = elf64(&multiboot1_header(u32::from(kind) << 16, &[]), 2 * MIB, b"", 0);
        for (byte, good) in file.iter_mut().zip(&start[..20]) { *byte = *good; }
        if let Some(slot) = file.get_mut(200..212) { slot.copy_from_slice(&start[120..132]); }
        let (guest, mut modules) = machine(&[(3 * MIB, &file, "")]);
        let _ = load(&guest, &memory_map(), &mut modules, None, &Extras::default());
        prop_assert!(guest.phys().bytes(OWN.start(), OWN.len() as usize) == vec![0; OWN.len() as usize]);
    }
}
