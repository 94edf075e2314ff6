//! What the loader hands over: L2's image (multiboot ELF or Linux kernel), boot information in each format, ACPI tables,
//! the command line. Anything may be wrong with them; nothing may panic or touch nvmx's own range.
#![no_main]

#[path = "../input.rs"]
mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use nvmx::addr::Hpa;
use nvmx::boot::extras::Extras;
use nvmx::boot::info::{BootInfo, Module};
use nvmx::boot::options::Options;
use nvmx::boot::{acpi, guest_image, multiboot1, multiboot2, pvh};
use nvmx::mm::map::RangeKind;
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, MemoryMap, Span};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 6 * MIB;
const OWN: Span = Span::new(5 * MIB, 5 * MIB + 0x1_0000);
const PLACES: [u64; 4] = [MIB, 2 * MIB + 0x10, 3 * MIB, 5 * MIB - 0x1000];

fn load(input: &mut Input<'_>) {
    let memory = VecMem::new(MEMORY as usize);
    let mut map = MemoryMap::new();
    let known = [(Span::new(0, 0x9_F000), RangeKind::Usable), (Span::new(MIB, MEMORY), RangeKind::Usable)];
    assert!(known.into_iter().all(|(span, kind)| map.add(span, kind).is_ok()));
    assert!(map.set(OWN, RangeKind::Reserved).is_ok());
    let mut modules = Vec::new();
    let more = input.u8() % 3;
    let line = ["", "a=1 b", "caps=0"][usize::from(more)];
    let at = input.pick(&PLACES);
    for n in 1..=u64::from(more) {
        let span = Span::sized(PLACES[n as usize] + 0x4_0000, input.u16().into());
        modules.push(Module { span, place: span, command_line: b"" });
    }
    let file = input.0;
    // The loader puts modules where there is memory that is nobody else's.
    let span = Span::sized(at, file.len() as u64);
    if span.overlaps(OWN) || modules.iter().any(|module| module.span.overlaps(span)) {
        return;
    }
    memory.write_bytes(Hpa::new(at), file);
    modules.insert(0, Module { span, place: span, command_line: line.as_bytes() });
    let guest = GuestMemory::new(&memory, OWN, 36);
    if let Ok(start) = guest_image::load(&guest, &map, &mut modules, None, &Extras::default()) {
        assert!(guest.translate(start.entry).is_ok() || start.entry.get() >= MEMORY, "it starts in nvmx");
    }
    assert!(memory.bytes(OWN.start(), OWN.len() as usize).iter().all(|byte| *byte == 0), "nvmx's memory was written");
}

fn information(format: u8, bytes: &[u8]) {
    const AT: u64 = 0x1000;
    let memory = VecMem::new(0x2_0000);
    memory.write_bytes(Hpa::new(AT), &bytes[..bytes.len().min(0x1_0000)]);
    let magic = match format {
        0 => multiboot1::BOOT_MAGIC,
        1 => multiboot2::BOOT_MAGIC,
        _ => pvh::START_MAGIC,
    };
    if let Ok(info) = BootInfo::read(magic, Hpa::new(AT), &memory) {
        assert!(info.memory.usable_bytes() > 0);
        let (count, bytes) = info.to_keep();
        let (mut kept, mut text) = (vec![Module::default(); count], vec![0; bytes]);
        assert!(info.keep(&memory, &mut kept, &mut text).is_ok());
        let _ = Options::parse(info.command_line.words(&memory));
        if let Some(rsdp) = &info.rsdp {
            let _ = acpi::cpus(rsdp, &memory);
        }
    }
}

fn tables(bytes: &[u8]) {
    let memory = VecMem::new(0x10_0000);
    // Where firmware puts the pointer; the tables follow it.
    memory.write_bytes(Hpa::new(0xE_0000), &bytes[..bytes.len().min(0x1_0000)]);
    if let Some(rsdp) = acpi::find_rsdp(&memory) {
        let _ = acpi::cpus(&rsdp, &memory);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.u8() % 6 {
        0 | 1 => load(&mut input),
        2 => information(input.u8() % 3, input.0),
        3 => information(1, input.0),
        4 => tables(input.0),
        _ => {
            if let Ok(text) = core::str::from_utf8(input.0) {
                let _ = Options::parse(text.split_ascii_whitespace());
            }
        }
    }
});
