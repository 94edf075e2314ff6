//! The memory map for an L2 that asks the firmware: INT 15h.
//!
//! What the loader's protocol tells, L2 may ignore: Xen goes back to real mode and asks the BIOS, which knows nothing of nvmx.
//! So a page below 1 MiB, reserved in L2's memory map, answers first, and leaves all else to the firmware.
//!
//! Source: ACPI specification, "System Address Map Interfaces" ("INT 15H, E820H"); E801h and 88h as firmware of PCs has them.

use crate::{
    addr::{Gpa, MIB, PAGE_SIZE},
    mm::{GuestMemory, MemoryMap, PhysMem, Span, map::MOST_TOLD, map::RangeKind},
};

/// The interrupt vector: offset and segment.
const VECTOR: Gpa = Gpa::new(0x15 * 4);
/// The BIOS data area's word: KiB of memory below 640 KiB.
const BASE_MEMORY: Gpa = Gpa::new(0x413);
/// Where the page may lie: not the first one, which firmware uses.
const LOW: Span = Span::new(PAGE_SIZE, 0xA_0000);
/// Where the code ends at the latest, and what it answers begins.
const DATA: u64 = 0x200;
const RANGES: u64 = DATA + 16;
const RANGE_SIZE: u64 = 20;

const _: () = assert!(RANGES + MOST_TOLD as u64 * RANGE_SIZE <= PAGE_SIZE);

/// Puts `code` before the firmware's handler, to answer with `memory`, L2's map, in which its page becomes reserved; the page.
/// `None` where there is no BIOS, no room off `occupied`, or no place in the map: then nothing is changed.
pub fn answer<P: PhysMem>(
    guest: &GuestMemory<P>,
    memory: &mut MemoryMap,
    occupied: impl IntoIterator<Item = Span>,
    code: &[u8],
) -> Option<Span> {
    let old = guest.read_u32(VECTOR).ok().filter(|old| *old != 0)?;
    let mut free = memory.clone();
    occupied.into_iter().for_each(|span| free.occupy(span.outer_pages()));
    let page = free.highest_free(PAGE_SIZE, PAGE_SIZE, LOW).filter(|_| code.len() as u64 <= DATA)?;
    let mut told = memory.clone();
    told.set(page, RangeKind::Reserved).ok()?;
    if told.iter().count() > MOST_TOLD {
        return None;
    }

    // Nothing fails from here on: the page is usable memory, the rest is the first page.
    let put = |at: u64, bytes: &[u8]| guest.write_bytes(Gpa::new(page.start() + at), bytes).ok();
    put(0, code)?;
    put(DATA, &old.to_le_bytes())?;
    for (at, word) in (DATA + 4..).step_by(2).zip(sizes(&told)) {
        put(at, &word.to_le_bytes())?;
    }
    for (at, range) in (RANGES..).step_by(RANGE_SIZE as usize).zip(told.iter()) {
        put(at, &range.span.start().to_le_bytes())?;
        put(at + 8, &range.span.len().to_le_bytes())?;
        put(at + 16, &range.kind.e820().to_le_bytes())?;
    }
    let mut base = [0; 2];
    guest.read_bytes(BASE_MEMORY, &mut base).ok()?;
    let base = u16::from_le_bytes(base).min((page.start() / 1024) as u16);
    guest.write_bytes(BASE_MEMORY, &base.to_le_bytes()).ok()?;
    let segment = (page.start() >> 4) as u32;
    guest.write_bytes(VECTOR, &(segment << 16).to_le_bytes()).ok()?;
    *memory = told;
    Some(page)
}

/// How many ranges; what E801h says: KiB from 1 MiB to 16 MiB and units of 64 KiB from there; what 88h says: KiB from 1 MiB.
fn sizes(memory: &MemoryMap) -> [u16; 4] {
    let from = |start: u64| {
        let run = memory.usable().find(|span| span.contains(Span::sized(start, 1)));
        run.map_or(0, |span| span.end() - start)
    };
    let word = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    let low = from(MIB).min(15 * MIB);
    let high = if low == 15 * MIB { from(16 * MIB) } else { 0 };
    [memory.iter().count() as u64, low >> 10, high >> 16, from(MIB) >> 10].map(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::phys::VecMem;

    const OWN: Span = Span::new(24 * MIB, 28 * MIB);

    fn map() -> MemoryMap {
        let mut map = MemoryMap::new();
        map.add(Span::new(0, 0x9_F000), RangeKind::Usable).unwrap();
        map.add(Span::new(MIB, 32 * MIB), RangeKind::Usable).unwrap();
        map.set(OWN, RangeKind::Reserved).unwrap();
        map
    }

    fn machine() -> VecMem {
        let memory = VecMem::new(MIB as usize);
        memory.write_bytes(crate::addr::Hpa::new(0x54), &[0x59, 0xF8, 0x00, 0xF0]);
        memory.write_bytes(crate::addr::Hpa::new(0x413), &639u16.to_le_bytes());
        memory
    }

    #[test]
    fn the_firmware_is_asked_behind_a_page_that_the_guest_does_not_have() {
        let (memory, mut map) = (machine(), map());
        let guest = GuestMemory::new(&memory, OWN, 36);
        let page = answer(&guest, &mut map, [], &[0x90; 9]).unwrap();
        assert_eq!(page, Span::new(0x9_E000, 0x9_F000));
        assert!(!map.is_usable(page) && map.is_usable(Span::new(0, 0x9_E000)));
        // The new vector leads to its start, the old one is in it.
        assert_eq!(memory.bytes(0x54, 4), [0, 0, 0x00, 0x9E]);
        assert_eq!(memory.bytes(0x9_E000, 10), [[0x90; 9].as_slice(), &[0]].concat());
        assert_eq!(memory.bytes(0x9_E200, 4), [0x59, 0xF8, 0x00, 0xF0]);
        assert_eq!(memory.bytes(0x413, 2), 632u16.to_le_bytes());
    }

    #[test]
    fn its_answer_is_the_guests_map_with_nvmx_reserved() {
        let (memory, mut map) = (machine(), map());
        let guest = GuestMemory::new(&memory, OWN, 36);
        answer(&guest, &mut map, [], &[]).unwrap();
        let word = |at: u64| u16::from_le_bytes(memory.bytes(0x9_E000 + at, 2).try_into().unwrap());
        // Low memory, the page, memory to nvmx, nvmx, memory beyond it.
        assert_eq!(word(0x204), 5);
        assert_eq!([word(0x206), word(0x208), word(0x20A)], [15 << 10, (8 << 20 >> 16) as u16, 23 << 10]);
        let quad = |at: u64| u64::from_le_bytes(memory.bytes(0x9_E000 + at, 8).try_into().unwrap());
        let nvmx = RANGES + 3 * RANGE_SIZE;
        assert_eq!((quad(nvmx), quad(nvmx + 8), word(nvmx + 16)), (OWN.start(), OWN.len(), 2));
    }

    #[test]
    fn without_a_bios_or_a_place_nothing_changes() {
        let (none, before) = (VecMem::new(MIB as usize), map());
        let mut map = before.clone();
        assert_eq!(answer(&GuestMemory::new(&none, OWN, 36), &mut map, [], &[]), None);
        let memory = machine();
        let guest = GuestMemory::new(&memory, OWN, 36);
        assert_eq!(answer(&guest, &mut map, [Span::new(0, 0xA_0000)], &[]), None);
        assert_eq!(answer(&guest, &mut map, [], &[0; 0x201]), None);
        assert_eq!((map, memory.bytes(0x54, 4)), (before, vec![0x59, 0xF8, 0x00, 0xF0]));
    }
}
