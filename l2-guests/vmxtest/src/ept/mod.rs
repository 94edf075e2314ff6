//! EPT case by case: every right at every page size under every kind of access, with and without accessed and dirty flags;
//! every memory type; entries that are misconfigured; the page-modification log (SDM "The Extended Page Table Mechanism",
//! "Accessed and Dirty Flags for EPT", "Page-Modification Logging", "Exit Qualification for EPT Violations").

mod access;
mod entries;
mod five;
mod log;
mod many;
pub mod outside;
pub mod sub_pages;

use crate::guest::{Exit, Guest};
use core::{arch::asm, ptr};
use l2_kit::{
    caps,
    ept::{self, ACCESSED, DIRTY, Ept, LARGE_BIT, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{self, Controls, Kind, Missing, VMX_EPT_VPID_CAP, secondary},
    vmx::{self, reason as r},
};

/// Where the guest's page tables map the pages under test.
const LINEAR: u64 = 6 << 30;
const GIB: u64 = 1 << 30;
/// A linear address whose page table is a page under test.
const WALKED: u64 = LINEAR + 16 * LARGE;
/// Bits 9 to 11 of the qualification are undefined without advanced information.
const ADVANCED: u64 = 7 << 9;
/// Of the qualification: the linear address is valid; the access was to it and not to page tables.
const LINEAR_VALID: u64 = 1 << 7;
const FINAL: u64 = 1 << 8;
/// Byte in the page under test that is read and written, and where its code is.
const DATA: u64 = 8;
const CODE: u64 = 512;
/// What a page under test holds, and what is written there.
const VALUE: u64 = 0xA;
const WRITTEN: u64 = 0x77;

/// Entry of the guest's page tables: present, writable, accessed, dirty.
const PRESENT: u64 = 0x63;

/// What there is of EPT.
#[derive(Clone, Copy)]
struct Offered(u64);

impl Offered {
    fn execute_only(self) -> bool {
        self.0 & 1 != 0
    }
    /// The page sizes.
    fn sizes(self) -> impl Iterator<Item = &'static Size> {
        SIZES.iter().filter(move |size| size.level < 2 || self.0 >> 17 & 1 != 0)
    }
    fn five_levels(self) -> bool {
        self.0 >> 7 & 1 != 0
    }
    fn flags(self) -> bool {
        self.0 >> 21 & 1 != 0
    }
    fn advanced(self) -> bool {
        self.0 >> 22 & 1 != 0
    }
}

/// A kind of access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    /// Reads and writes in one instruction.
    Modify,
    Fetch,
    /// The page is a page table, whose entry needs no flag set.
    Walk,
}

use Access::{Fetch, Modify, Read, Walk, Write};

impl Access {
    const ALL: [Self; 5] = [Read, Write, Modify, Fetch, Walk];

    fn name(self) -> &'static str {
        match self {
            Read => "read",
            Write => "write",
            Modify => "modify",
            Fetch => "execute",
            Walk => "walk",
        }
    }

    /// The rights that it needs: with flags, accesses to page tables count as writes.
    fn needs(self, flags: bool) -> u64 {
        match self {
            Read => rights::R,
            Walk if !flags => rights::R,
            Write => rights::W,
            Modify | Walk => rights::R | rights::W,
            Fetch => rights::X,
        }
    }

    fn writes(self, flags: bool) -> bool {
        self.needs(flags) & rights::W != 0
    }

    /// What the program returns.
    fn value(self) -> u64 {
        match self {
            Read | Walk => VALUE,
            Write | Fetch => WRITTEN,
            Modify => VALUE + 1,
        }
    }

    /// Offset in the page that is accessed.
    fn offset(self) -> u64 {
        match self {
            Read | Write | Modify => DATA,
            Fetch => CODE,
            Walk => (WALKED >> 12 & 511) * 8,
        }
    }
}

extern "C" fn read(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::read_volatile(address as *const u64) }
}

extern "C" fn write(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { ptr::write_volatile(address as *mut u64, WRITTEN) };
    WRITTEN
}

extern "C" fn modify(address: u64) -> u64 {
    // SAFETY: the guest's page under test.
    unsafe { asm!("lock inc qword ptr [{}]", in(reg) address, options(nostack)) };
    read(address)
}

extern "C" fn call(address: u64) -> u64 {
    // SAFETY: the code that `Lab::refresh` puts there.
    let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(address) };
    code()
}

/// `mov eax, 0x77; ret`
const CODE_BYTES: u64 = u64::from_le_bytes([0xB8, WRITTEN as u8, 0, 0, 0, 0xC3, 0x90, 0x90]);

/// A page size: the level of the leaf, its name, where pages of it lie.
struct Size {
    level: u32,
    name: &'static str,
    base: u64,
}

const SIZES: [Size; 3] = [
    Size { level: 0, name: "4K", base: 20 << 30 },
    Size { level: 1, name: "2M", base: 21 << 30 },
    Size { level: 2, name: "1G", base: 22 << 30 },
];

/// The guest, its memory, and a page that is mapped once more at each size.
struct Lab {
    guest: Guest,
    ept: Ept,
    offered: Offered,
    /// 2 MiB in the machine: the first page for data and code, the second for a page table.
    target: u64,
    eptp: u64,
}

impl Lab {
    fn new() -> Result<Self, Missing> {
        let vpid = if setup::allowed_one(Kind::Secondary, secondary::VPID) { secondary::VPID } else { 0 };
        let guest = Guest::new(Controls { secondary: secondary::EPT | vpid, ..Controls::default() })?;
        if vpid != 0 {
            vmx::write(f::VPID, 1);
        }
        let ept = Ept::identity();
        let target = pages::take(LARGE, LARGE);
        let offered = Offered(caps::get(VMX_EPT_VPID_CAP));
        let mut lab = Self { guest, ept, offered, target, eptp: 0 };
        lab.run_on(ept.pointer());
        Ok(lab)
    }

    /// The EPTP that the guest runs with.
    fn run_on(&mut self, eptp: u64) {
        self.eptp = eptp;
        vmx::write(f::EPTP, eptp);
    }

    fn flags(&self) -> bool {
        self.eptp & 1 << 6 != 0
    }

    /// Where the page for a kind of access starts in the guest's physical memory.
    fn page(&self, size: &Size, kind: Access) -> u64 {
        let within = if size.level == 2 { self.target % GIB } else { 0 };
        size.base + within + if kind == Walk { PAGE } else { 0 }
    }

    /// The leaf that maps it, with these rights, write-back, no flags.
    fn leaf(&self, size: &Size, kind: Access, right: u64) -> u64 {
        let start = match size.level {
            0 if kind == Walk => self.target + PAGE,
            0 | 1 => self.target,
            _ => self.target - self.target % GIB,
        };
        start | ept::WRITE_BACK | if size.level == 0 { 0 } else { LARGE_BIT } | right
    }

    /// Sets the leaf of a page under test; the entries above it get all rights and no flags.
    fn map(&mut self, size: &Size, kind: Access, leaf: u64) {
        let page = self.page(size, kind);
        match size.level {
            0 => self.ept.set(page, PAGE, leaf),
            1 => self.ept.set(page, LARGE, leaf),
            _ => self.ept.set_entry(page, 2, leaf),
        }
        for upper in size.level + 1..4 {
            self.ept.set_entry(page, upper, self.ept.entry(page, upper) & !(ACCESSED | DIRTY) | rights::RWX);
        }
        // Entries with the guest's own flags set: the processor has nothing to write there.
        if kind == Walk {
            // SAFETY: ours; the guest is stopped, and nobody holds a reference.
            let table = unsafe { pages::at(self.target + PAGE) };
            table[(WALKED >> 12 & 511) as usize] = self.target | PRESENT;
            set_directory_entry(self.guest.cr3, WALKED, page | PRESENT);
        } else {
            pages::set_entry(self.guest.cr3, LINEAR, page | PRESENT);
        }
    }

    /// One access after everything cached is forgotten and the page has its first content.
    fn access(&mut self, kind: Access) -> Exit {
        // SAFETY: as above.
        let words = unsafe { pages::at(self.target) };
        words[DATA as usize / 8] = VALUE;
        words[CODE as usize / 8] = CODE_BYTES;
        self.forget();
        let exit = match kind {
            Read => self.guest.execute(read, LINEAR + DATA),
            Write => self.guest.execute(write, LINEAR + DATA),
            Modify => self.guest.execute(modify, LINEAR + DATA),
            Fetch => self.guest.execute(call, LINEAR + CODE),
            Walk => self.guest.execute(read, WALKED + DATA),
        };
        self.masked(exit)
    }

    /// Throws away what was cached from the tree.
    fn forget(&self) {
        let _ = vmx::invept(1, [self.eptp, 0]);
        if vmx::read(f::SECONDARY_CONTROLS) as u32 & secondary::VPID != 0 {
            let _ = vmx::invvpid(2, [0, 0]);
        }
    }

    /// What happened, without undefined bits.
    fn masked(&self, exit: Exit) -> Exit {
        match exit {
            Exit::Reason(r::EPT_VIOLATION, q) if q & FINAL == 0 || !self.offered.advanced() => {
                Exit::Reason(r::EPT_VIOLATION, q & !ADVANCED)
            }
            // A misconfiguration has no qualification.
            Exit::Reason(r::EPT_MISCONFIGURATION, _) => Exit::Reason(r::EPT_MISCONFIGURATION, 0),
            other => other,
        }
    }

    /// The flags on the way to a page: a digit a level, the root's first; 1: accessed, 2: dirty.
    fn flags_of(&self, page: u64, level: u32) -> u64 {
        (level..4).rev().fold(0, |word, l| word << 4 | self.ept.entry(page, l) >> 8 & 3)
    }

    /// What these flags must be after an access that was allowed.
    fn flags_after(&self, size: &Size, kind: Access) -> u64 {
        if !self.flags() {
            return 0;
        }
        let accessed = (size.level..4).fold(0, |word, _| word << 4 | 1);
        accessed | if kind.writes(true) { 2 } else { 0 }
    }
}

/// Sets the entry of a page directory, which [`pages::set_entry`] made.
fn set_directory_entry(root: u64, linear: u64, entry: u64) {
    let mut table = root;
    for shift in [39, 30, 21] {
        // SAFETY: page tables of this image, to which nobody holds a reference.
        let slot = &mut unsafe { pages::at(table) }[(linear >> shift) as usize & 511];
        if shift == 21 {
            *slot = entry;
        }
        table = *slot & 0x000F_FFFF_FFFF_F000;
    }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut lab = Lab::new()?;
    access::all(&mut lab);
    entries::all(&mut lab);
    log::all(&mut lab);
    many::all(&mut lab);
    five::all(&mut lab);
    outside::all(&mut lab);
    Ok(())
}
