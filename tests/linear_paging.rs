//! The walk of L2's own page tables against a reference that collects the path first and judges it afterwards.
//!
//! Source of the reference: Intel SDM vol. 3A, chapter "Paging", tables of entry formats and "Page-Fault Exceptions".

use nvmx::addr::{Gpa, PAGE_SIZE};
use nvmx::mm::linear::{AccessError, DataAccess, Keys, PageKind, Paging, Privilege, fetch_pdptes, pdptes_are_valid};
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, NotOwned, Span};
use nvmx::x86::Fault;
use proptest::prelude::*;

const PAGES: u64 = 16;
const OWN: Span = Span::new(0xE000, 0xF000);

const WP: u64 = 1 << 16;
const PG: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const PKS: u64 = 1 << 24;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;
const AC: u64 = 1 << 18;

/// What the reference says of one access.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    At(u64),
    PageFault(u32),
    NotOwned(u64),
}

/// An entry on the path.
struct Step {
    at: u64,
    bytes: usize,
    entry: u64,
    shift: u32,
}

/// A plain copy of memory that the reference reads and marks.
#[derive(Clone, PartialEq, Eq)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn read(&self, at: u64, bytes: usize) -> u64 {
        (0..bytes).fold(0, |v, i| v | u64::from(*self.0.get(at as usize + i).unwrap_or(&0xFF)) << (8 * i))
    }

    fn or(&mut self, at: u64, bits: u8) {
        if let Some(byte) = self.0.get_mut(at as usize) {
            *byte |= bits;
        }
    }
}

fn owned(at: u64, width: u32) -> bool {
    !(OWN.start()..OWN.end()).contains(&at) && at >> width == 0
}

/// The bits that must be 0 in an entry.
fn reserved(p: &Paging, step: &Step, large: bool) -> u64 {
    let bits = |from: u32, to: u32| (from..=to).fold(0u64, |all, bit| all | 1 << bit);
    let long = p.efer & LMA != 0;
    if step.bytes == 4 {
        let m = p.physical_width.min(40);
        return if large { bits(m - 19, 21) } else { 0 };
    }
    let mut reserved = bits(p.physical_width, if long { 51 } else { 62 });
    if p.efer & NXE == 0 {
        reserved |= 1 << 63;
    }
    if step.shift >= 39 {
        reserved |= 1 << 7;
    }
    if large {
        reserved |= bits(13, step.shift - 1);
    }
    reserved
}

fn reference(p: &Paging, memory: &mut Bytes, linear: u64, write: bool) -> Verdict {
    if p.cr0 & PG == 0 {
        return Verdict::At(linear & 0xFFFF_FFFF);
    }
    let frame = ((1u64 << p.physical_width) - 1) & !0xFFF;
    let (long, pae) = (p.efer & LMA != 0, p.cr4 & PAE != 0);
    let shifts: &[u32] = match (long, pae) {
        (true, _) if p.cr4 & LA57 != 0 => &[48, 39, 30, 21, 12],
        (true, _) => &[39, 30, 21, 12],
        (false, true) => &[21, 12],
        (false, false) => &[22, 12],
    };
    let narrow = !long && !pae;
    let (bytes, index_bits) = if narrow { (4, 10) } else { (8, 9) };
    let write_bit = if write { 2 } else { 0 };
    let mut table = if narrow { p.cr3 & 0xFFFF_F000 } else { p.cr3 & frame };
    if !long && pae {
        let pdpte = p.pdptes[(linear as u32 >> 30) as usize];
        if pdpte & 1 == 0 {
            return Verdict::PageFault(write_bit);
        }
        table = pdpte & frame;
    }

    let mut path: Vec<Step> = Vec::new();
    let large = loop {
        let shift = shifts[path.len()];
        let index = linear >> shift & ((1 << index_bits) - 1);
        let at = table + index * bytes as u64;
        if !owned(at, p.physical_width) {
            return Verdict::NotOwned(at);
        }
        let step = Step { at, bytes, entry: memory.read(at, bytes), shift };
        if step.entry & 1 == 0 {
            return Verdict::PageFault(write_bit);
        }
        let may_be_large = if narrow { shift == 22 && p.cr4 & PSE != 0 } else { shift == 21 || shift == 30 };
        let large = may_be_large && step.entry & 0x80 != 0;
        if step.entry & reserved(p, &step, large) != 0 {
            return Verdict::PageFault(write_bit | 0b1001);
        }
        table = if narrow { step.entry & 0xFFFF_F000 } else { step.entry & frame };
        path.push(step);
        if large || shift == 12 {
            break large;
        }
        memory.or(at, 0x20);
    };
    let all = |bit: u64| path.iter().all(|step| step.entry & bit != 0);
    let write_denied = write && p.cr0 & WP != 0 && !all(2);
    let smap_denied = p.cr4 & SMAP != 0 && p.rflags & AC == 0 && all(4);
    let leaf = path.last().expect("the path has a step");
    let (on, register) = if all(4) { (PKE, p.keys.user) } else { (PKS, p.keys.supervisor) };
    let key_bit = |bit: u64| register >> (2 * (leaf.entry >> 59 & 15) + bit) & 1 != 0;
    let key_denied = long && p.cr4 & on != 0 && (key_bit(0) || key_bit(1) && write && p.cr0 & WP != 0);
    if write_denied || smap_denied || key_denied {
        return Verdict::PageFault(write_bit | 1 | if key_denied { 0x20 } else { 0 });
    }
    memory.or(leaf.at, if write { 0x60 } else { 0x20 });
    let offset = linear & ((1 << leaf.shift) - 1);
    let base = match (narrow, large) {
        (true, true) => leaf.entry & 0xFFC0_0000 | (leaf.entry >> 13 & 0xFF) << 32,
        (true, false) => leaf.entry & 0xFFFF_F000,
        (false, _) => leaf.entry & frame & !((1 << leaf.shift) - 1),
    };
    Verdict::At(base + offset)
}

/// Memory full of entries of either size that mostly lead on to a page in it.
fn tables(seed: u64, narrow: bool) -> Bytes {
    let mut state = seed;
    let mut bytes = Vec::with_capacity((PAGES * PAGE_SIZE) as usize);
    while bytes.len() < (PAGES * PAGE_SIZE) as usize {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut random = (state ^ state >> 31).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        random ^= random >> 32;
        let mut one_in = |n: u64| {
            let hit = random % n == 0;
            random /= n;
            hit
        };
        let mut entry = u64::from(!one_in(16)) | u64::from(!one_in(8)) << 1 | u64::from(!one_in(4)) << 2;
        entry |= u64::from(one_in(2)) << 5 | u64::from(one_in(2)) << 6;
        let (large, odd, no_execute) = (one_in(8), one_in(16), one_in(32));
        entry |= if large { 0x80 | (random & 1) << 12 } else { (random & 15) << 12 };
        entry |= if odd { 1 << (random >> 4 & 63) } else { 0 } | u64::from(no_execute) << 63;
        match narrow {
            true => bytes.extend_from_slice(&((entry | entry >> 32) as u32).to_le_bytes()),
            false => bytes.extend_from_slice(&entry.to_le_bytes()),
        }
    }
    Bytes(bytes)
}

fn paging() -> impl Strategy<Value = Paging> {
    let mode = prop::sample::select(vec![(0, 0), (PAE, 0), (PSE, 0), (PAE | PSE, 0), (PAE, LMA), (PAE | LA57, LMA)]);
    let width = prop::sample::select(vec![36u32, 39, 40, 46, 52]);
    let entries = prop::array::uniform4((0..PAGES, any::<bool>()).prop_map(|(page, on)| page << 12 | u64::from(on)));
    let bits = (0..64u8, any::<bool>());
    let keys = any::<(u32, u32)>().prop_map(|(user, supervisor)| Keys { user, supervisor });
    (mode, width, entries, (0..PAGES, 0..0x1000u64), bits, keys).prop_map(
        |(mode, width, pdptes, cr3, (bits, nxe), keys)| {
            let bit = |i: u8, value: u64| if bits >> i & 1 != 0 { value } else { 0 };
            Paging {
                cr0: PG | 1 | bit(0, WP),
                cr3: cr3.0 << 12 | cr3.1,
                cr4: mode.0 | bit(1, SMAP) | bit(3, PKE) | bit(4, PKS),
                efer: mode.1 | if nxe { NXE } else { 0 },
                rflags: 2 | bit(2, AC),
                pdptes,
                keys,
                physical_width: width,
            }
        },
    )
}

/// Outside of long mode linear addresses have 32 bits.
fn in_reach(p: &Paging, linear: u64) -> u64 {
    if p.efer & LMA != 0 { linear } else { linear & 0xFFFF_FFFF }
}

fn is_narrow(p: &Paging) -> bool {
    p.efer & LMA == 0 && p.cr4 & PAE == 0
}

fn guest(memory: &Bytes, width: u32) -> GuestMemory<VecMem> {
    GuestMemory::new(VecMem::from_bytes(memory.0.clone()), OWN, width as u8)
}

fn content(memory: &GuestMemory<VecMem>) -> Vec<u8> {
    memory.phys().bytes(0, (PAGES * PAGE_SIZE) as usize)
}

fn verdict(result: Result<Gpa, AccessError>, linear: u64) -> Verdict {
    match result {
        Ok(gpa) => Verdict::At(gpa.get()),
        Err(AccessError::Fault(Fault::Page { error_code, linear: at })) => {
            assert_eq!(at, linear, "CR2");
            Verdict::PageFault(error_code)
        }
        Err(AccessError::NotOwned(NotOwned(gpa))) => Verdict::NotOwned(gpa.get()),
        Err(AccessError::Fault(other)) => panic!("{other:?}"),
        Err(AccessError::Again) => panic!("nobody changes the tables"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_walk_and_its_flags_are_those_of_the_reference(
        p in paging(), seed: u64, linears in prop::collection::vec(any::<u64>(), 8), write: bool,
    ) {
        let mut expected = tables(seed, is_narrow(&p));
        let memory = guest(&expected, p.physical_width);
        for linear in linears.into_iter().map(|linear| in_reach(&p, linear)) {
            let access = if write { DataAccess::Write } else { DataAccess::Read };
            let want = reference(&p, &mut expected, linear, write);
            prop_assert_eq!(verdict(p.translate(&memory, linear, access), linear), want);
            prop_assert!(content(&memory) == expected.0, "accessed and dirty flags");
        }
    }

    #[test]
    fn an_operand_is_written_whole_or_not_at_all(
        p in paging(), seed: u64, page: u64, near_end in 0u64..24, bytes in prop::collection::vec(any::<u8>(), 1..17),
    ) {
        let mut expected = tables(seed, is_narrow(&p));
        let before = expected.clone();
        let memory = guest(&expected, p.physical_width);
        let linear = in_reach(&p, page << 12 | (0x1000 - near_end) & 0xFFF);
        let last = in_reach(&p, linear.wrapping_add(bytes.len() as u64 - 1));
        let mut fates = vec![reference(&p, &mut expected, linear, true)];
        if linear >> 12 != last >> 12 {
            fates.push(reference(&p, &mut expected, last & !0xFFF, true));
        }
        let reachable = fates.iter().all(|fate| matches!(fate, Verdict::At(at) if owned(*at, p.physical_width)));
        prop_assert_eq!(p.write(&memory, linear, &bytes).is_ok(), reachable);
        if reachable {
            for (i, byte) in bytes.iter().enumerate() {
                let at = in_reach(&p, linear.wrapping_add(i as u64));
                let fate = if at >> 12 == linear >> 12 { &fates[0] } else { &fates[1] };
                let Verdict::At(start) = fate else { unreachable!() };
                if let Some(place) = expected.0.get_mut((start & !0xFFF | at & 0xFFF) as usize) {
                    *place = *byte;
                }
            }
            prop_assert!(content(&memory) == expected.0);
        } else {
            let changed = content(&memory).iter().zip(&before.0).fold(0, |all, (a, b)| all | (a ^ b));
            prop_assert_eq!(changed & !0x60, 0, "more than flags changed");
        }
    }

    #[test]
    fn an_operand_is_read_from_where_the_reference_finds_its_bytes(
        p in paging(), seed: u64, page: u64, near_end in 0u64..24, len in 1usize..17,
    ) {
        let mut expected = tables(seed, is_narrow(&p));
        let memory = guest(&expected, p.physical_width);
        let linear = in_reach(&p, page << 12 | (0x1000 - near_end) & 0xFFF);
        let mut fates: Vec<_> = Vec::new();
        for i in 0..len as u64 {
            fates.push(reference(&p, &mut expected, in_reach(&p, linear.wrapping_add(i)), false));
        }
        let mut buffer = vec![0; len];
        let result = p.read(&memory, linear, &mut buffer);
        let reachable = fates.iter().all(|fate| matches!(fate, Verdict::At(at) if owned(*at, p.physical_width)));
        prop_assert_eq!(result.is_ok(), reachable);
        if reachable {
            let want: Vec<_> = fates
                .iter()
                .map(|fate| match fate {
                    Verdict::At(at) => expected.read(*at, 1) as u8,
                    _ => unreachable!(),
                })
                .collect();
            prop_assert_eq!(buffer, want);
        }
    }
}

#[test]
fn each_single_bit_of_each_entry_means_what_it_means_to_the_reference() {
    let modes = [(0, 0), (PSE, 0), (PAE, 0), (PAE, LMA), (PAE | LA57, LMA)];
    let levels = |cr4, efer| if efer & LMA == 0 { 2 } else { 4 + u64::from(cr4 & LA57 != 0) };
    for ((cr4, efer), nxe, width) in modes.iter().flat_map(|m| [(m, 0, 36), (m, NXE, 39), (m, NXE, 46)]) {
        let p = Paging { cr4: *cr4, efer: efer | nxe, pdptes: [1; 4], physical_width: width, ..LONG };
        // Page i holds a table whose first entry leads to page i + 1; one of them is changed, some as a large page.
        for (level, bit, large) in
            (0..levels(*cr4, *efer)).flat_map(|l| (0..64).flat_map(move |b| [(l, b, false), (l, b, true)]))
        {
            let mut bytes = Bytes(vec![0; (PAGES * PAGE_SIZE) as usize]);
            for page in 0..levels(*cr4, *efer) {
                let mut entry: u64 = if page == level && large { 0x83 } else { (page + 1) << 12 | 3 };
                if page == level {
                    entry ^= 1 << bit;
                }
                let at = (page << 12) as usize;
                bytes.0[at..at + 8].copy_from_slice(&entry.to_le_bytes());
            }
            let memory = guest(&bytes, width);
            let want = reference(&p, &mut bytes, 0x234, true);
            let what = format!("{p:x?} level {level} bit {bit} large {large}");
            assert_eq!(verdict(p.translate(&memory, 0x234, DataAccess::Write), 0x234), want, "{what}");
            assert!(content(&memory) == bytes.0, "{what}");
        }
    }
}

const LONG: Paging = Paging {
    cr0: PG | WP | 1,
    cr3: 0,
    cr4: PAE,
    efer: LMA | NXE,
    rflags: 2,
    pdptes: [0; 4],
    keys: Keys::OPEN,
    physical_width: 36,
};

/// 4-level tables in pages 0 to 3 that map linear pages 0 and 1 with these entries.
fn two_pages(entries: [u64; 2]) -> GuestMemory<VecMem> {
    let mut bytes = Bytes(vec![0; (PAGES * PAGE_SIZE) as usize]);
    let words = [(0, 0x1007), (0x1000, 0x2007), (0x2000, 0x3007), (0x3000, entries[0]), (0x3008, entries[1])];
    for (at, word) in words {
        bytes.0[at..at + 8].copy_from_slice(&u64::to_le_bytes(word));
    }
    guest(&bytes, LONG.physical_width)
}

fn page_fault(code: u32, linear: u64) -> Result<(), AccessError> {
    Err(AccessError::Fault(Fault::Page { error_code: code, linear }))
}

#[test]
fn without_paging_a_linear_address_is_physical_and_wraps_at_4_gib() {
    let memory = two_pages([0, 0]);
    let p = Paging { cr0: 1, ..LONG };
    assert_eq!(p.translate(&memory, 0x1_0000_1234, DataAccess::Write), Ok(Gpa::new(0x1234)));
}

#[test]
fn outside_of_long_mode_an_operand_wraps_at_4_gib() {
    let mut bytes = Bytes(vec![0; (PAGES * PAGE_SIZE) as usize]);
    for (at, word) in [(0xFFC, 0x1003), (0x1FFC, 0x4003)] {
        bytes.0[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
    }
    let p = Paging { cr0: PG | 1, cr4: 0, efer: 0, ..LONG };
    let memory = guest(&bytes, p.physical_width);
    assert_eq!(p.write(&memory, 0xFFFF_FFFC, &[1; 4]), Ok(()));
    assert_eq!(p.write(&memory, 0xFFFF_FFFC, &[1; 8]), page_fault(0b10, 0));
}

#[test]
fn a_fault_on_the_second_page_reports_that_page_and_writes_nothing() {
    let memory = two_pages([0x4003, 0x5001]);
    assert_eq!(LONG.write(&memory, 0xFFC, &[1; 8]), page_fault(0b11, 0x1000));
    assert_eq!(memory.phys().bytes(0x4FFC, 4), [0; 4]);
}

#[test]
fn a_write_into_nvmx_s_memory_on_the_second_page_writes_nothing() {
    let memory = two_pages([0x4003, OWN.start() | 3]);
    assert_eq!(LONG.write(&memory, 0xFFC, &[1; 8]), Err(AccessError::NotOwned(NotOwned(Gpa::new(OWN.start())))));
    assert_eq!(memory.phys().bytes(0x4FFC, 4), [0; 4]);
}

#[test]
fn read_only_pages_are_written_by_a_supervisor_without_wp() {
    let memory = two_pages([0x4001, 0]);
    assert_eq!(LONG.write(&memory, 0, &[7]), page_fault(0b11, 0));
    let p = Paging { cr0: PG | 1, ..LONG };
    assert_eq!(p.write(&memory, 0, &[7]), Ok(()));
    assert_eq!(memory.phys().bytes(0x4000, 1), [7]);
    assert_eq!(memory.phys().bytes(0x3000, 1), [0x61], "accessed and dirty");
}

#[test]
fn protection_keys_keep_a_supervisor_off_pages_of_either_kind() {
    const KEY_1: u64 = 1 << 59;
    let [no_access, no_writes] = [0b01 << 2, 0b10 << 2];
    for (on, pages, open) in [(PKE, [0x4007 | KEY_1, 0x5007], PKS), (PKS, [0x4003 | KEY_1, 0x5003], PKE)] {
        let memory = two_pages(pages);
        let with = |rights| {
            let keys = if on == PKE { (rights, 0) } else { (0, rights) };
            Paging { cr4: PAE | on, keys: Keys { user: keys.0, supervisor: keys.1 }, ..LONG }
        };
        let p = with(no_access);
        assert_eq!(p.read(&memory, 0, &mut [0]), page_fault(0x21, 0));
        assert_eq!(p.write(&memory, 0, &[1]), page_fault(0x23, 0));
        assert_eq!(p.read(&memory, 0xFFF, &mut [0; 2]), page_fault(0x21, 0xFFF));
        assert_eq!(p.write(&memory, 0x1000, &[1]), Ok(()), "key 0");
        let p = with(no_writes);
        assert_eq!(p.read(&memory, 0, &mut [0]), Ok(()));
        assert_eq!(p.write(&memory, 0, &[1]), page_fault(0x23, 0));
        assert_eq!(Paging { cr0: PG | 1, ..p }.write(&memory, 0, &[1]), Ok(()), "without WP");
        assert_eq!(Paging { cr4: PAE | open, ..with(no_access) }.read(&memory, 0, &mut [0]), Ok(()), "they are off");
    }
}

#[test]
fn smap_keeps_a_supervisor_off_user_pages_until_ac_is_set() {
    let memory = two_pages([0x4007, 0x5003]);
    let p = Paging { cr4: PAE | SMAP, ..LONG };
    assert_eq!(p.read(&memory, 0, &mut [0]), page_fault(0b01, 0));
    assert_eq!(p.read(&memory, 0x1000, &mut [0]), Ok(()), "a supervisor page");
    let p = Paging { rflags: 2 | AC, ..p };
    assert_eq!(p.read(&memory, 0, &mut [0]), Ok(()));
}

#[test]
fn the_execute_disable_bit_is_reserved_without_nxe_and_no_matter_to_data_with_it() {
    let memory = two_pages([1 << 63 | 0x4003, 0]);
    assert_eq!(LONG.read(&memory, 0, &mut [0]), Ok(()));
    let p = Paging { efer: LMA, ..LONG };
    assert_eq!(p.read(&memory, 0, &mut [0]), page_fault(0b1001, 0));
}

#[test]
fn a_4_mib_page_reaches_as_far_as_the_physical_width() {
    // PSE-36: bits 20:13 of the entry are address bits 39:32; those beyond the width are reserved.
    let memory = |entry: u32| {
        let mut bytes = vec![0; 0x1000];
        bytes[..4].copy_from_slice(&entry.to_le_bytes());
        GuestMemory::new(VecMem::from_bytes(bytes), Span::new(0, 0), 40)
    };
    let p = Paging { cr0: PG | 1, cr4: PSE, efer: 0, ..LONG };
    let far = |width, bit: u32| {
        Paging { physical_width: width, ..p }.translate(&memory(0x83 | 1 << bit), 0x12345, DataAccess::Read)
    };
    assert_eq!(far(36, 16), Ok(Gpa::new(1 << 35 | 0x12345)));
    assert_eq!(far(36, 17).map(|_| ()), page_fault(0b1001, 0x12345));
    assert_eq!(far(40, 20), Ok(Gpa::new(1 << 39 | 0x12345)));
    assert_eq!(far(46, 20), Ok(Gpa::new(1 << 39 | 0x12345)));
    assert_eq!(far(46, 21).map(|_| ()), page_fault(0b1001, 0x12345));
}

#[test]
fn pdptes_have_reserved_bits_and_end_at_the_physical_width() {
    for bit in 0..64 {
        let reserved = matches!(bit, 1 | 2 | 5..=8 | 36..);
        for i in 0..4 {
            let mut entries = [0x1001; 4];
            entries[i] |= 1 << bit;
            assert_eq!(pdptes_are_valid(&entries, 1 << 36), !reserved, "bit {bit} of entry {i}");
            entries[i] = !1 & 1 << bit;
            assert!(pdptes_are_valid(&entries, 1 << 36), "an entry that is not present may hold anything");
        }
    }
}

#[test]
fn pdptes_are_fetched_from_a_table_of_32_bytes() {
    let memory = two_pages([0x11, 0x22]);
    assert_eq!(fetch_pdptes(&memory, 0xFFFF_0000_0000_3018), [0x11, 0x22, 0, 0], "32-byte aligned, below 4 GiB");
    let nowhere = fetch_pdptes(&memory, OWN.start());
    assert!(nowhere == [u64::MAX; 4] && !pdptes_are_valid(&nowhere, 1 << 36));
}

#[test]
fn a_page_is_of_user_mode_and_writable_if_each_entry_says_so_and_not_for_fetches_if_one_does() {
    for bits in 0..8u64 {
        let (user, writable, execute_disable) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        let entry = 1 | u64::from(writable) << 1 | u64::from(user) << 2 | u64::from(execute_disable) << 63;
        // In the entry of the page, and in the table's above.
        for (above, page) in [(0x3007, 0x4000 | entry), (0x3000 | entry, 0x4007)] {
            let memory = two_pages([page, 0]);
            memory.write_u64(Gpa::new(0x2000), above).unwrap();
            let kind = LONG.page(&memory, 5, DataAccess::Read, Privilege::Supervisor).map(|(_, kind)| kind);
            assert_eq!(kind, Ok(PageKind { user, writable, execute_disable }), "{above:#x} {page:#x}");
        }
    }
    let p = Paging { cr0: 1, ..LONG };
    let kind = p.page(&two_pages([0, 0]), 5, DataAccess::Read, Privilege::Supervisor).map(|(_, kind)| kind);
    assert_eq!(kind, Ok(PageKind { user: true, writable: true, execute_disable: false }), "without paging");
}
