//! Faults inside: for every handler that runs on the host, the k-th access to memory is answered by nothing, or its page
//! turns out not to be L2's, or the k-th frame is not there, for every k until the handler ends without reaching it. It ends
//! with one of its outcomes, nvmx's memory stays untouched, no frame is lost, and what follows works as if nothing had been.

mod core_support;
mod ept_model;

use core_support::failing::{Failing, FailingFrames, sweep};
use ept_model::{Frames, KIB4, LARGE, WB, rules};
use nvmx::addr::{Gpa, Hpa, Ngpa};
use nvmx::boot::extras::Extras;
use nvmx::boot::info::Module;
use nvmx::boot::{BootInfo, guest_image};
use nvmx::emul::task_switch::{SegmentState, Source, State, SwitchFailure, switch};
use nvmx::ept::{Ept01, Ept02, Eptp, MemoryType, Outcome, Qualification};
use nvmx::guest::nested_memory::{Failed, NestedView};
use nvmx::mm::linear::{AccessError, DataAccess, Keys, Paging};
use nvmx::mm::map::RangeKind;
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, MemoryMap, PhysMem, Span};
use nvmx::vmcs::vmcs12::Vmcs12;
use nvmx::x86::Fault;

const SIZE: usize = 0x2_0000;
const NOTHING: Span = Span::new(0, 0);

/// Runs `handler` with each access failing in both ways. It gets L2's memory and judges its own outcome; `whole` tells that
/// nothing failed.
fn each_access(memory: &VecMem, handler: impl Fn(&GuestMemory<&Failing>, bool)) {
    let silent = sweep(|k| {
        let failing = Failing::new(memory.clone(), Some(k));
        let guest = GuestMemory::new(&failing, NOTHING, 36);
        // Whether the access is reached is known only afterwards: a handler that ends earlier has met no failure.
        handler(&guest, false);
        failing.accesses()
    });
    let whole = Failing::new(memory.clone(), None);
    handler(&GuestMemory::new(&whole, NOTHING, 36), true);
    assert!(silent > 0 && silent <= whole.accesses().max(silent));
    // The page of each access is nvmx's: refused, not read, not written.
    for at in whole.touched.borrow().iter() {
        let own = Span::sized(at & !0xFFF, 0x1000);
        let failing = Failing::new(memory.clone(), None);
        handler(&GuestMemory::new(&failing, own, 36), false);
        let touched = failing.touched.borrow();
        assert!(touched.iter().all(|at| !own.contains(Span::sized(*at, 1))), "nvmx's page at {at:#x} was touched");
    }
}

fn linear_tables() -> (VecMem, Paging) {
    let memory = VecMem::new(SIZE);
    for (at, entry) in
        [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x8003), (0x4008, 0x9003), (0x8FF8, 77)]
    {
        memory.write_u64(Hpa::new(at), entry);
    }
    let paging = Paging {
        cr0: 1 << 31 | 1 << 16 | 1,
        cr3: 0x1000,
        cr4: 1 << 5,
        efer: 1 << 10,
        rflags: 2,
        pdptes: [0; 4],
        keys: Keys::OPEN,
        physical_width: 36,
    };
    (memory, paging)
}

/// An access of L2 ends with its data, a page fault, a refusal, or is to be made anew.
fn is_an_end(result: Result<(), AccessError>, whole: bool) {
    match result {
        Ok(()) => {}
        Err(AccessError::Fault(Fault::Page { .. }) | AccessError::NotOwned(_) | AccessError::Again) => assert!(!whole),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn operands_of_l2() {
    let (memory, paging) = linear_tables();
    // Across two pages.
    const AT: u64 = 0xFFC;
    each_access(&memory, |guest, whole| {
        is_an_end(paging.translate(guest, AT, DataAccess::Write).map(drop), whole);
        let mut bytes = [0; 8];
        is_an_end(paging.read(guest, AT, &mut bytes), whole);
        is_an_end(paging.write(guest, AT, &[1; 8]), whole);
        // Of the tables only flags have changed.
        for at in [0x1000, 0x2000, 0x3000, 0x4000, 0x4008] {
            let change = guest.phys().memory.read_u64(Hpa::new(at)) ^ memory.read_u64(Hpa::new(at));
            assert_eq!(change & !0x60, 0, "{at:#x}");
        }
    });
}

#[test]
fn operands_of_l3() {
    let (memory, paging) = linear_tables();
    // ept12 at 0x10000: one to one for the first 2 MiB, by one large page, with flags set.
    for (at, entry) in [(0x1_0000u64, 0x1_1107u64), (0x1_1000, 0x1_2107), (0x1_2000, WB | LARGE | 0x307)] {
        memory.write_u64(Hpa::new(at), entry);
    }
    for eptp12 in [None, Some(Eptp::new(0x1_0000 | 0x1E)), Some(Eptp::new(0x1_0000 | 0x5E))] {
        each_access(&memory, |guest, whole| {
            let view = NestedView { guest, eptp12, spptp12: None, rules: rules(), paging };
            let mut bytes = [0; 8];
            for result in [view.read(0xFFC, &mut bytes), view.write(0xFFC, &[1; 8])] {
                match result {
                    Err(Failed::Miss(miss)) => assert!(!whole, "{miss:?}"),
                    Err(Failed::Access(error)) => is_an_end(Err(error), whole),
                    Ok(()) => {}
                }
            }
        });
    }
}

#[test]
fn task_switches() {
    const GDT: u64 = 0x1000;
    const OLD: u64 = 0x3000;
    const NEW: u64 = 0x4000;
    let memory = VecMem::new(SIZE);
    let put = |at: u64, value: u64| memory.write_u64(Hpa::new(at), value);
    for (n, value) in [(1, 0x00CF_9A00_0000_FFFFu64), (2, 0x00CF_9200_0000_FFFF)] {
        put(GDT + 8 * n, value);
    }
    put(GDT + 0x20, 0x67 | OLD << 16 | 0x8B << 40);
    put(GDT + 0x28, 0x67 | NEW << 16 | 0x89 << 40);
    let half = |at: u64, value: u16| memory.write_bytes(Hpa::new(at), &value.to_le_bytes());
    half(NEW + 0x20, 0x5000);
    half(NEW + 0x38, 0x7000);
    for (at, selector) in [(0x48, 16), (0x4C, 8), (0x50, 16), (0x54, 16), (0x58, 0), (0x5C, 16)] {
        half(NEW + at, selector);
    }
    // One to one by 32-bit tables, with all flags still to be set.
    half(0x9000, 0xA007);
    (0..32).for_each(|n| put(0xA000 + 4 * n, n << 12 | 7));
    half(NEW + 0x1C, 0x9000);
    let paging = |cr0| Paging {
        cr0,
        cr3: 0x9000,
        cr4: 0,
        efer: 0,
        rflags: 2,
        pdptes: [0; 4],
        keys: Keys::OPEN,
        physical_width: 36,
    };
    let segment = |selector, rights| SegmentState { selector, base: 0, limit: u32::MAX, rights };
    for (cr0, error_code) in [(1, None), (1 << 31 | 1 << 16 | 1, None), (1 << 31 | 1, Some(8))] {
        let old = State {
            paging: paging(cr0),
            gprs: [1, 2, 3, 4, 0x6000, 6, 7, 8],
            eip: 0x1111,
            eflags: 2,
            segments: [16, 8, 16, 16, 16, 16].map(|s| segment(s, if s == 8 { 0xC09B } else { 0xC093 })),
            ldtr: SegmentState::unusable(0, 0),
            tr: SegmentState { selector: 0x20, base: OLD as u32, limit: 0x67, rights: 0x8B },
            gdt_base: GDT as u32,
            gdt_limit: 0x2F,
            dr7: 0x400,
        };
        let source = if error_code.is_some() { Source::Gate { external: true, error_code } } else { Source::Jump };
        each_access(&memory, |guest, whole| match switch(guest, &old, 0x28, source) {
            Ok(switched) => {
                assert_eq!((switched.state.tr.selector, switched.state.tr.rights & 0xF), (0x28, 11));
                assert!(switched.exception.is_none() || !whole, "{:?}", switched.exception);
                // A VM entry takes it: CS is usable code, and not of a lower level than SS says.
                let [_, cs, ss, ..] = switched.state.segments;
                assert!(cs.rights & 1 << 16 == 0 && cs.rights >> 5 & 3 <= ss.rights >> 5 & 3, "{cs:x?} {ss:x?}");
            }
            Err(SwitchFailure::Exception(_) | SwitchFailure::NotOwned(_) | SwitchFailure::Again) => assert!(!whole),
        });
    }
}

#[test]
fn regions_of_vmcs12() {
    const REGION: Gpa = Gpa::new(0x1000);
    let memory = VecMem::new(SIZE);
    each_access(&memory, |guest, whole| {
        let mut vmcs12 = Vmcs12::new();
        assert!(vmcs12.load(guest, REGION).is_ok() || !whole);
        let stored = vmcs12.store(guest, REGION);
        assert!(stored.is_ok() || !whole);
        let _ = Vmcs12::clear_region(guest, REGION);
        let _ = vmcs12.is_stored_at(guest, REGION);
    });
}

/// A flat multiboot image for 2 MiB.
fn image() -> Vec<u8> {
    let words = [0x1BAD_B002u32, 1 << 16, 0u32.wrapping_sub(0x1BAD_B002 + (1 << 16)), TO, TO, 0, TO + 0x400, TO + 32];
    let mut file: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    file.resize(0x200, 0x90);
    file
}
const TO: u32 = 2 << 20;

#[test]
fn loading_l2() {
    const MIB: u64 = 1 << 20;
    const OWN: Span = Span::new(5 * MIB, 6 * MIB);
    let memory = VecMem::new(6 << 20);
    let mut map = MemoryMap::new();
    map.add(Span::new(0, 0x9_F000), RangeKind::Usable).unwrap();
    map.add(Span::new(MIB, 6 * MIB), RangeKind::Usable).unwrap();
    map.set(OWN, RangeKind::Reserved).unwrap();
    memory.write_bytes(Hpa::new(3 * MIB), &image());
    let modules = [(3 * MIB, 0x200), (4 * MIB, 0x100)].map(|(at, len)| {
        let span = Span::sized(at, len);
        Module { span, place: span, command_line: b"x" }
    });
    let failures = sweep(|k| {
        let failing = Failing::new(memory.clone(), Some(k));
        let guest = GuestMemory::new(&failing, OWN, 36);
        if let Ok(start) = guest_image::load(&guest, &map, &mut modules.clone(), None, &Extras::default()) {
            assert_eq!(start.entry, Gpa::new(u64::from(TO) + 32));
        }
        assert!(failing.memory.bytes(OWN.start(), 0x1000).iter().all(|byte| *byte == 0));
        assert!(failing.touched.borrow().iter().all(|at| !OWN.contains(Span::sized(*at, 1))));
        failing.accesses()
    });
    assert!(failures > 20, "{failures}");
}

#[test]
fn what_the_loader_says() {
    let memory = VecMem::new(SIZE);
    let words = |at: u64, words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_bytes(Hpa::new(at), &bytes);
    };
    let mut one = [0u32; 29];
    one[0] = 0x1FFF & !(3 << 4);
    (one[4], one[5], one[6], one[11], one[12]) = (0x2000, 1, 0x2100, 24, 0x2200);
    (one[13], one[14], one[16], one[17], one[18], one[19]) = (8, 0x2300, 0x2400, 0x2500, 0x2600, 0x2900);
    words(0x1000, &one);
    words(0x2100, &[0x8000, 0x9000, 0x2000, 0]);
    words(0x2200, &[20, 0, 0, 0x9_F000, 0, 1]);
    words(0x3000, &[96, 0, 1, 12, 0x61, 0, 6, 40, 24, 0, 0, 0, 0x10_0000, 0, 1, 0, 5, 20, 0x80, 1, 2, 0, 0, 8]);
    for (magic, at) in [(0x2BAD_B002, 0x1000), (0x36D7_6289, 0x3000)] {
        assert!(BootInfo::read(magic, Hpa::new(at), &memory).is_ok());
        sweep(|k| {
            let failing = Failing::new(memory.clone(), Some(k));
            if let Ok(info) = BootInfo::read(magic, Hpa::new(at), &failing) {
                let (count, bytes) = info.to_keep();
                let (mut modules, mut text) = (vec![Module::default(); count], vec![0; bytes]);
                let _ = info.keep(&failing, &mut modules, &mut text);
            }
            failing.accesses()
        });
    }
}

/// L2's memory with an ept12 at 0x10000: four pages of 4 KiB at 0, one of 2 MiB at 2 MiB.
fn ept12() -> VecMem {
    let memory = VecMem::new(SIZE);
    let put = |at: u64, entry: u64| memory.write_u64(Hpa::new(at), entry);
    put(0x1_0000, 0x1_1007);
    put(0x1_1000, 0x1_2007);
    put(0x1_2000, 0x1_3007);
    put(0x1_2008, 0x20_0000 | WB | LARGE | 7);
    (0..4).for_each(|n| put(0x1_3000 + 8 * n, n << 12 | WB | 7));
    memory
}

const TREES: [Eptp; 2] = [Eptp::new(0x1_0000 | 0x1E), Eptp::new(0x1_0000 | 0x5E)];
const PAGES: [u64; 3] = [0x2000, 0x3000, 0x20_1000];
type Tables = Ept02<3, 4>;

/// Violations under both trees, an INVEPT after a change, and the entries that validate.
fn live(ept: &mut Tables, guest: &GuestMemory<&Failing>, frames: &mut FailingFrames<Frames>) -> Vec<Outcome> {
    let write = Qualification::from_bits_retain(2 | 3 << 7);
    let mut outcomes = vec![];
    for _ in 0..2 {
        for tree in TREES {
            for page in PAGES {
                outcomes.push(ept.violation(tree, Ngpa::new(page), write, None, guest, frames));
                let _ = ept.activate(tree, guest, None, frames);
            }
        }
        guest.phys().memory.write_u64(Hpa::new(0x1_3010), 0x6000 | WB | 7);
        ept.invept_single(TREES[0]);
        ept.invept_all();
    }
    outcomes
}

/// Every frame is in use by ept02 or free, and all pages can be had when nothing fails any more.
fn goes_on(ept: &mut Tables, memory: &VecMem, mut frames: Frames, total: usize) {
    assert_eq!(frames.used.len() + frames.free.len(), total, "a frame is lost");
    let healthy = Failing::new(memory.clone(), None);
    let guest = GuestMemory::new(&healthy, NOTHING, 36);
    let write = Qualification::from_bits_retain(2 | 3 << 7);
    ept.invept_all();
    for tree in TREES {
        for page in PAGES {
            let _ = ept.activate(tree, &guest, None, &mut frames);
            let mut outcome = ept.violation(tree, Ngpa::new(page), write, None, &guest, &mut frames);
            if outcome == Outcome::Filled {
                outcome = ept.violation(tree, Ngpa::new(page), write, None, &guest, &mut frames);
            }
            assert_eq!(outcome, Outcome::Filled);
            let root = ept.activate(tree, &guest, None, &mut frames).eptp02.ep4ta();
            let leaf = frames.leaves(root).into_iter().find(|leaf| (leaf.0..leaf.0 + leaf.1).contains(&page));
            let there = guest.read_u64(Gpa::new(0x1_3010)).unwrap() & 0xF_F000;
            let to = if page == 0x2000 { there } else { page };
            assert_eq!(leaf.map(|leaf| (leaf.2 & 0xF_FFFF_F000) + page - leaf.0), Some(to), "{page:#x}");
        }
    }
    ept.forget_all(&mut frames);
    assert_eq!(frames.used.len(), 1 + 4, "what ept02 holds from the start and no more");
}

#[test]
fn ept02_when_memory_fails() {
    let memory = ept12();
    let failures = sweep(|k| {
        let failing = Failing::new(memory.clone(), Some(k));
        let mut frames = FailingFrames::new(Frames::new(100), None);
        let mut ept = Tables::new(rules(), false, 50, &mut frames).unwrap();
        live(&mut ept, &GuestMemory::new(&failing, NOTHING, 36), &mut frames);
        goes_on(&mut ept, &failing.memory, frames.frames, 100);
        failing.accesses()
    });
    assert!(failures > 50, "{failures}");
}

#[test]
fn ept02_when_frames_fail() {
    let memory = ept12();
    let failures = sweep(|k| {
        let failing = Failing::new(memory.clone(), None);
        let mut frames = FailingFrames::new(Frames::new(100), Some(k));
        match Tables::new(rules(), false, 50, &mut frames) {
            Err(_) => assert!(frames.frames.used.is_empty(), "frames of an ept02 that was not made are given back"),
            Ok(mut ept) => {
                let outcomes = live(&mut ept, &GuestMemory::new(&failing, NOTHING, 36), &mut frames);
                assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Filled), "{outcomes:?}");
                let allocations = frames.allocations.get();
                goes_on(&mut ept, &failing.memory, frames.frames, 100);
                return allocations;
            }
        }
        frames.allocations.get()
    });
    assert!(failures > 4, "{failures}");
}

#[test]
fn ept01_when_frames_fail() {
    let write_back = |_: Gpa, _: u64| Some(MemoryType::WriteBack);
    let own = Span::new(0x20_3000, 0x20_5000);
    let failures = sweep(|k| {
        let mut frames = FailingFrames::new(Frames::new(100), Some(k));
        if let Ok(mut ept) = Ept01::new(rules(), true, Gpa::new(1 << 30), own, write_back, &mut frames) {
            let _ = ept.map_missing(Gpa::new(5 << 30), write_back, &mut frames);
            let _ = ept.make_small(Gpa::new(0x40_0000), write_back, &mut frames);
            let inner = &frames.frames;
            assert_eq!(inner.used.len(), ept.tables() as usize, "each frame in use is a table");
            assert!(inner.leaves(ept.eptp().ep4ta()).iter().all(|leaf| !Span::sized(leaf.0, leaf.1).overlaps(own)));
        }
        assert_eq!(frames.frames.used.len() + frames.frames.free.len(), 100);
        assert!(frames.frames.used.len() as u64 * KIB4 < 1 << 20);
        frames.allocations.get()
    });
    assert!(failures > 3, "{failures}");
}
