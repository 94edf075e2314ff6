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
/// Where the pool is instead, if it is not 0.
static ELSEWHERE: AtomicU64 = AtomicU64::new(0);

/// Where the boot code's map ends.
const BOOT_END: u64 = 4 << 30;
const GIB: u64 = 1 << 30;

unsafe extern "C" {
    static mut kit_page_tables: [Page; 6];
    static mut kit_high_table: Page;
}

/// Takes all pages from above 4 GiB from now on, if `is_usable(start, end)` says that there is memory; maps it as well.
///
/// # Safety
/// No page was taken yet, no other processor runs, and nobody uses that memory.
pub unsafe fn move_up(is_usable: impl Fn(u64, u64) -> bool) {
    if !is_usable(BOOT_END, BOOT_END + POOL as u64) {
        panic!("option `high`: there is no memory at 4 GiB");
    }
    let (tables, high) = (&raw mut kit_page_tables, &raw mut kit_high_table);
    // SAFETY: 1. the boot code's tables are this image's, and only this processor runs. 2. What is mapped was not before.
    let (pointers, directory) = unsafe { (&mut (*tables)[1], &mut *high) };
    fill(directory, BOOT_END, 0x03);
    pointers[4] = address(directory) | 0x03;
    // SAFETY: it is memory (asked above), mapped now, and nobody's (the caller's promise).
    unsafe { core::ptr::write_bytes(BOOT_END as *mut u8, 0, POOL) };
    ELSEWHERE.store(BOOT_END, Ordering::Release);
}

/// The end of what is mapped one to one, a multiple of 1 GiB.
pub fn mapped_end() -> u64 {
    if ELSEWHERE.load(Ordering::Acquire) == 0 { BOOT_END } else { BOOT_END + GIB }
}

/// A directory that maps 1 GiB from `start` on one to one.
fn fill(directory: &mut Page, start: u64, flags: u64) {
    for (i, large) in (0u64..).zip(directory.iter_mut()) {
        *large = (start + i * LARGE) | 0x80 | flags;
    }
}

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
    let memory = match ELSEWHERE.load(Ordering::Acquire) {
        0 => MEMORY.0.get() as u64,
        elsewhere => elsewhere,
    };
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
    // SAFETY: the caller's promise; what `take` gives is mapped.
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

/// New page tables (four levels) that map memory up to [`mapped_end`] one to one in 2 MiB pages, as the boot code's do; returns CR3.
pub fn identity_tables(access: Access) -> u64 {
    let flags = if access == Access::User { 0x07 } else { 0x03 };
    let (root, pointers) = (page(), page());
    root[0] = address(pointers) | flags;
    for (start, entry) in (0..mapped_end()).step_by(GIB as usize).zip(pointers.iter_mut()) {
        let directory = page();
        fill(directory, start, flags);
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
