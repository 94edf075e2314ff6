//! Memory for tables: pages are handed out once, zeroed, and never come back.

use core::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU64, Ordering},
};

/// A 4 KiB page of 64-bit entries.
pub type Page = [u64; 512];
/// Its size.
pub const PAGE: u64 = 4096;
/// Size of a page that a page directory maps.
pub const LARGE: u64 = 2 << 20;

/// 32 MiB, and what it takes to align them: a section aligned to more than 4 KiB would spread the image's file offsets, which
/// multiboot wants linear with addresses.
const POOL: usize = 34 << 20;

/// The pool is part of the image, so that every loader keeps modules out of it and its addresses are the same in each slot.
#[repr(C, align(4096))]
struct Pool(UnsafeCell<[u8; POOL]>);

// SAFETY: each byte is given away once.
unsafe impl Sync for Pool {}

static MEMORY: Pool = Pool(UnsafeCell::new([0; POOL]));
static USED: AtomicU64 = AtomicU64::new(0);

/// `size` bytes at a multiple of `align` (a power of two, at most [`LARGE`]): the address.
pub fn take(size: u64, align: u64) -> u64 {
    let (start, total) = pool();
    let end = |used: u64| used.next_multiple_of(align) + size;
    let before =
        USED.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| Some(end(used)).filter(|end| *end <= total));
    match before {
        Ok(used) => start + end(used) - size,
        Err(_) => panic!("the guest's pool of pages is used up"),
    }
}

/// First address (a multiple of [`LARGE`]) and size of the pool.
pub fn pool() -> (u64, u64) {
    let memory = MEMORY.0.get() as u64;
    let start = memory.next_multiple_of(LARGE);
    (start, memory + POOL as u64 - start)
}

/// A zeroed page.
pub fn page() -> &'static mut Page {
    let at = take(PAGE, PAGE);
    // SAFETY: `take` gives each page once; the pool is zeroed by the loader.
    unsafe { &mut *(at as *mut Page) }
}

/// The physical address of something in the image: the map is one to one.
pub fn address<T: ?Sized>(thing: &T) -> u64 {
    core::ptr::from_ref(thing).cast::<()>() as u64
}

/// The page at an address that [`address`] or [`take`] gave.
///
/// # Safety
/// The page is the caller's, and nobody holds another reference to it.
pub unsafe fn at(address: u64) -> &'static mut Page {
    // SAFETY: the caller's promise; the first 4 GiB are mapped.
    unsafe { &mut *(address as *mut Page) }
}

/// Who may use what page tables map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Ring 0
    Kernel,
    /// Ring 3 as well
    User,
}

/// New page tables (four levels) that map the first 4 GiB one to one in 2 MiB pages, as the boot code's do; returns CR3.
pub fn identity_tables(access: Access) -> u64 {
    let flags = if access == Access::User { 0x07 } else { 0x03 };
    let (root, pointers) = (page(), page());
    root[0] = address(pointers) | flags;
    for (gigabyte, entry) in (0u64..4).zip(pointers.iter_mut()) {
        let directory = page();
        for (i, large) in (0u64..).zip(directory.iter_mut()) {
            *large = ((gigabyte << 30) + i * LARGE) | 0x80 | flags;
        }
        *entry = address(directory) | flags;
    }
    address(root)
}

/// Sets the entry of page tables that maps the 4 KiB page at `linear`; tables that are missing are made, a 2 MiB page in the
/// way is split. Only the entry of the page decides what is allowed.
pub fn set_entry(root: u64, linear: u64, entry: u64) {
    const FLAGS: u64 = 0x07;
    let mut table = root;
    for level in (1..4).rev() {
        // SAFETY: the tables are this image's memory, and nobody holds a reference to them.
        let slot = &mut unsafe { at(table) }[(linear >> (12 + 9 * level)) as usize & 511];
        if *slot & 1 == 0 {
            *slot = address(page()) | FLAGS;
        } else if *slot & 0x80 != 0 {
            let small = page();
            for (offset, page_entry) in (0..).step_by(PAGE as usize).zip(small.iter_mut()) {
                *page_entry = (*slot & !0x80) + offset;
            }
            *slot = address(small) | FLAGS;
        }
        table = *slot & 0x000F_FFFF_FFFF_F000;
    }
    // SAFETY: as above.
    let slot = &mut unsafe { at(table) }[(linear >> 12) as usize & 511];
    *slot = entry;
}

/// The page table (of 4 KiB pages) that [`set_entry`] changes for `linear`; it must be there.
pub fn table_of(root: u64, linear: u64) -> u64 {
    (1..4).rev().fold(root, |table, level| {
        // SAFETY: the tables are this image's memory, and nobody holds a reference to them.
        let table = unsafe { at(table) };
        table[(linear >> (12 + 9 * level)) as usize & 511] & 0x000F_FFFF_FFFF_F000
    })
}
