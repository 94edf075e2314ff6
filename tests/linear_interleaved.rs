//! Accessed and dirty flags in L2's paging entries while another CPU changes the entries between each two accesses of the
//! walk: what that CPU wrote is never lost and never brought back, and no walk goes on for ever.

use nvmx::addr::{Gpa, Hpa};
use nvmx::mm::linear::{AccessError, DataAccess, Keys, Paging, WALKS};
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, PhysMem, Place, Span};
use nvmx::x86::Fault;
use std::cell::RefCell;

/// Memory in which another CPU acts before the access with a certain number, or before each.
struct Raced<F> {
    memory: VecMem,
    accesses: RefCell<u32>,
    other: F,
}

impl<F: Fn(u32, &VecMem)> Raced<F> {
    fn step(&self) -> &VecMem {
        let mut count = self.accesses.borrow_mut();
        (self.other)(*count, &self.memory);
        *count += 1;
        &self.memory
    }
}

impl<F: Fn(u32, &VecMem)> PhysMem for Raced<F> {
    fn read_u64(&self, at: Hpa) -> u64 {
        self.step().read_u64(at)
    }
    fn write_u64(&self, at: Place<'_>, value: u64) {
        self.step().write_u64(at.hpa(), value);
    }
    fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
        self.step().read_bytes(at, into);
    }
    fn write_bytes(&self, at: Place<'_>, bytes: &[u8]) {
        self.step().write_bytes(at.hpa(), bytes);
    }
    fn take_bits(&self, at: Place<'_>, bits: u64) -> u64 {
        self.step().take_bits(at, bits)
    }
    fn compare_exchange(&self, at: Place<'_>, old: u64, new: u64) -> bool {
        self.step().compare_exchange(at, old, new)
    }
    fn compare_exchange_u32(&self, at: Place<'_>, old: u32, new: u32) -> bool {
        self.step().compare_exchange_u32(at, old, new)
    }
}

const ROOT: u64 = 0x1000;
const LEAF_TABLE: u64 = 0x4000;
const PAGE: u64 = 0x8000;
const OTHER_PAGE: u64 = 0x9000;
const LINEAR: u64 = 0x123;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// A mode: width of an entry, where its last entry lies, paging, memory with tables in that format.
struct Mode {
    wide: bool,
    leaf: u64,
    paging: Paging,
    memory: VecMem,
}

fn modes() -> [Mode; 3] {
    let paging = |cr4: u64, efer: u64| Paging {
        cr0: 1 << 31 | 1 << 16 | 1,
        cr3: ROOT,
        cr4,
        efer,
        rflags: 2,
        pdptes: [0x3001, 0, 0, 0],
        keys: Keys::OPEN,
        physical_width: 36,
    };
    let four = VecMem::new(0x10000);
    for (at, entry) in [(ROOT, 0x2003), (0x2000, 0x3003), (0x3000, LEAF_TABLE | 3), (LEAF_TABLE, PAGE | 3)] {
        four.write_u64(Hpa::new(at), entry);
    }
    let narrow = VecMem::new(0x10000);
    for (at, entry) in [(ROOT, LEAF_TABLE as u32 | 3), (LEAF_TABLE, PAGE as u32 | 3)] {
        narrow.write_bytes(Hpa::new(at), &entry.to_le_bytes());
        // A neighbour that is not to be touched.
        narrow.write_bytes(Hpa::new(at + 4), &[0xEE; 4]);
    }
    [
        Mode { wide: true, leaf: LEAF_TABLE, paging: paging(1 << 5, 1 << 10 | 1 << 11), memory: four.clone() },
        Mode { wide: true, leaf: LEAF_TABLE, paging: paging(1 << 5, 0), memory: four },
        Mode { wide: false, leaf: LEAF_TABLE, paging: paging(0, 0), memory: narrow },
    ]
}

fn entry(mode: &Mode, memory: &VecMem) -> u64 {
    if mode.wide { memory.read_u64(Hpa::new(mode.leaf)) } else { memory.read_u32(Hpa::new(mode.leaf)).into() }
}

fn set_entry(wide: bool, at: u64, memory: &VecMem, entry: u64) {
    match wide {
        true => memory.write_u64(Hpa::new(at), entry),
        false => memory.write_bytes(Hpa::new(at), &(entry as u32).to_le_bytes()),
    }
}

/// Before each access of the walk in turn the other CPU gives the last entry another value. The walk ends as if it had
/// happened wholly before or wholly after that, and the entry is the new one, with flags only if the walk used it.
#[test]
fn a_change_at_any_moment_is_neither_lost_nor_brought_back() {
    for mode in modes() {
        for new in [0, OTHER_PAGE | 3, OTHER_PAGE | 1, PAGE | 3 | 1 << 2] {
            for at in 0..12 {
                let (wide, leaf) = (mode.wide, mode.leaf);
                let other = |n: u32, memory: &VecMem| {
                    if n == at {
                        set_entry(wide, leaf, memory, new);
                    }
                };
                let raced = Raced { memory: mode.memory.clone(), accesses: RefCell::new(0), other };
                let guest = GuestMemory::new(raced, Span::new(0, 0), 36);
                let result = mode.paging.translate(&guest, LINEAR, DataAccess::Write);
                let happened = *guest.phys().accesses.borrow() > at;
                let there = entry(&mode, &guest.phys().memory);
                let flagged = there & (ACCESSED | DIRTY) != 0;
                let old = Ok(Gpa::new(PAGE | LINEAR));
                if !happened {
                    assert_eq!((result, there), (old, PAGE | 3 | ACCESSED | DIRTY));
                    continue;
                }
                assert_eq!(there & !(ACCESSED | DIRTY), new, "what the other CPU wrote stays, access {at}");
                let wanted = match new {
                    0 => Err(AccessError::Fault(Fault::Page { error_code: 2, linear: LINEAR })),
                    _ if new & 2 == 0 => Err(AccessError::Fault(Fault::Page { error_code: 3, linear: LINEAR })),
                    _ => Ok(Gpa::new(new & !0xFFF | LINEAR)),
                };
                assert!(result == wanted || result == old, "{result:?} after {new:#x}, access {at}");
                // Flags in the new entry only by a walk that used it; the old one was used and its flags went with it.
                assert_eq!(flagged, result == wanted && wanted.is_ok() && there != new, "access {at}");
                if result == wanted && result != old {
                    assert_eq!(flagged, wanted.is_ok(), "access {at}");
                }
            }
        }
    }
}

/// The other CPU changes the entry before every access: the walk gives up after its bound and has set no flag.
#[test]
fn a_walk_that_never_comes_to_rest_ends() {
    for mode in modes() {
        let (wide, leaf) = (mode.wide, mode.leaf);
        let other = |n: u32, memory: &VecMem| {
            set_entry(wide, leaf, memory, (if n % 2 == 0 { PAGE } else { OTHER_PAGE }) | 3 | u64::from(n % 8) << 9);
        };
        let raced = Raced { memory: mode.memory.clone(), accesses: RefCell::new(0), other };
        let guest = GuestMemory::new(raced, Span::new(0, 0), 36);
        assert_eq!(mode.paging.translate(&guest, LINEAR, DataAccess::Write), Err(AccessError::Again));
        let accesses = *guest.phys().accesses.borrow();
        assert!(accesses <= WALKS * 8, "{accesses} accesses");
        let there = entry(&mode, &guest.phys().memory);
        assert_eq!(there & (ACCESSED | DIRTY), 0);
    }
}

/// 32-bit paging has entries of four bytes: the one beside it is another CPU's to change at any moment.
#[test]
fn the_entry_beside_it_is_not_written() {
    let [_, _, mode] = modes();
    for at in 0..8 {
        let other = |n: u32, memory: &VecMem| {
            if n == at {
                memory.write_bytes(Hpa::new(LEAF_TABLE + 4), &[0x77; 4]);
            }
        };
        let raced = Raced { memory: mode.memory.clone(), accesses: RefCell::new(0), other };
        let guest = GuestMemory::new(raced, Span::new(0, 0), 36);
        assert_eq!(mode.paging.translate(&guest, LINEAR, DataAccess::Write), Ok(Gpa::new(PAGE | LINEAR)));
        if *guest.phys().accesses.borrow() > at {
            assert_eq!(guest.phys().memory.bytes(LEAF_TABLE + 4, 4), [0x77; 4]);
        }
    }
}
