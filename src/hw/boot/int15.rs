//! The code of [`boot::int15`](crate::boot::int15).

#[cfg(target_os = "none")]
use core::arch::global_asm;

#[cfg(target_os = "none")]
global_asm!(include_str!("int15.s"));

unsafe extern "C" {
    static int15_begin: u8;
    static int15_end: u8;
}

/// Real-mode code for the start of a page.
pub fn code() -> &'static [u8] {
    let begin = &raw const int15_begin;
    let len = (&raw const int15_end) as usize - begin as usize;
    // SAFETY: 1. Both labels are in one piece of the image's read-only data, in this order. 2. Nothing writes there.
    unsafe { core::slice::from_raw_parts(begin, len) }
}
