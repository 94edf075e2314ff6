//! Another page after a violation, without INVEPT: a violation drops what is cached for its address, under each EPTP with
//! that table at its root (SDM "Operations that Invalidate Cached Mappings").

use super::{ALIAS, Pages, call, invalidate, read, write};
use crate::guest::{Exit, Guest, Program};
use l2_kit::{
    Check, caps,
    ept::{Ept, LARGE_BIT, WRITE_BACK, rights},
    fields as f,
    pages::{LARGE, PAGE},
    serial::Serial,
    setup,
    vmx::{self, reason as r},
};

/// All of it.
pub fn all(guest: &mut Guest, ept: Ept, pages: &Pages) {
    let flags = caps::get(setup::VMX_EPT_VPID_CAP) >> 21 & 1 != 0;
    let pointers = [("without flags", ept.pointer()), ("with flags", ept.pointer_with_flags())];
    for (page, value) in [(pages.first, 0xA), (pages.second, 0xB)] {
        for offset in [0, PAGE] {
            // SAFETY: our pages.
            unsafe { ((page + offset) as *mut u64).write_volatile(value) };
        }
    }
    for (name, pointer) in pointers.into_iter().filter(|(_, pointer)| flags || *pointer == ept.pointer()) {
        // Of the large page, another piece than the first.
        for (size, size_name, linear) in [(PAGE, "4K", ALIAS), (LARGE, "2M", ALIAS + PAGE)] {
            for (violation, program, address, right) in
                [("write", write as Program, linear, rights::R), ("fetch", call, linear + 512, rights::R | rights::W)]
            {
                ept.map(pages.first, size, right);
                invalidate();
                let cached = pointers.map(|(_, other)| {
                    vmx::write(f::EPTP, if flags { other } else { pointer });
                    guest.execute(read, linear)
                });
                vmx::write(f::EPTP, pointer);
                let exit = guest.execute(program, address);
                let large = if size == LARGE { LARGE_BIT } else { 0 };
                ept.set(pages.first, size, pages.second | WRITE_BACK | large | rights::RWX);
                let seen = [pointer, ept.pointer()].map(|pointer| {
                    vmx::write(f::EPTP, pointer);
                    guest.execute(read, linear)
                });
                Check::new(&mut Serial, format_args!("another page behind a {violation}, {size_name}, {name}"))
                    .expect("cached", cached == [Exit::Done(0xA); 2], true)
                    .expect("violation", matches!(exit, Exit::Reason(r::EPT_VIOLATION, _)), true)
                    .expect("other_page", seen[0], Exit::Done(0xB))
                    .expect("without_flags", seen[1], Exit::Done(0xB))
                    .end();
            }
        }
    }
    vmx::write(f::EPTP, ept.pointer());
    ept.map(pages.first, LARGE, rights::RWX);
    invalidate();
}
