//! Rights against accesses.

use super::{Access, FINAL, Fetch, LINEAR, LINEAR_VALID, Lab, Modify, Read, Size, WALKED, Walk, Write};
use crate::guest::Exit;
use l2_kit::{
    Check,
    ept::{ACCESSED, DIRTY, rights},
    fields as f,
    protocol::Hex,
    serial::Serial,
    vmx::{self, reason as r},
};

const RIGHTS: [(u64, &str); 6] =
    [(0, "none"), (rights::R, "r"), (3, "rw"), (5, "rx"), (rights::RWX, "rwx"), (rights::X, "x")];

/// All of it.
pub fn all(lab: &mut Lab) {
    for pointer in [lab.ept.pointer(), lab.ept.pointer_with_flags()] {
        if pointer & 1 << 6 != 0 && !lab.offered.flags() {
            continue;
        }
        lab.run_on(pointer);
        for size in lab.offered.sizes() {
            let offered = lab.offered;
            for (right, name) in RIGHTS.into_iter().filter(|right| right.0 != rights::X || offered.execute_only()) {
                for kind in Access::ALL {
                    lab.map(size, kind, lab.leaf(size, kind, right));
                    case(lab, size, kind, right, format_args!("{name}"));
                }
            }
            upper_rights(lab, size);
        }
    }
    if lab.flags() {
        flags_that_are_set(lab);
    }
}

/// An upper entry takes rights away from all below it.
fn upper_rights(lab: &mut Lab, size: &Size) {
    for upper in size.level + 1..3 {
        for (right, name) in [(rights::R, "r"), (5, "rx"), (3, "rw")] {
            for kind in [Read, Write, Fetch, Walk] {
                lab.map(size, kind, lab.leaf(size, kind, rights::RWX));
                let page = lab.page(size, kind);
                lab.ept.set_entry(page, upper, lab.ept.entry(page, upper) & !rights::RWX | right);
                case(lab, size, kind, right, format_args!("level {upper} {name}"));
            }
        }
        for kind in Access::ALL {
            // The page table that a 4 KiB page has, and those above it, leave their place to the next size.
            lab.map(size, kind, lab.leaf(size, kind, rights::RWX));
        }
    }
}

/// Flags of a leaf that are set already stay, and the others come.
fn flags_that_are_set(lab: &mut Lab) {
    for size in lab.offered.sizes() {
        for (set, name) in [(ACCESSED, "accessed"), (DIRTY, "dirty"), (ACCESSED | DIRTY, "accessed dirty")] {
            for kind in [Read, Write, Modify, Fetch, Walk] {
                lab.map(size, kind, lab.leaf(size, kind, rights::RWX) | set);
                let exit = lab.access(kind);
                let page = lab.page(size, kind);
                Check::new(&mut Serial, format_args!("ept {} {name}: {}", size.name, kind.name()))
                    .expect("result", exit, Exit::Done(kind.value()))
                    .expect("flags", Hex(lab.flags_of(page, size.level)), Hex(lab.flags_after(size, kind) | set >> 8))
                    .end();
            }
        }
    }
}

/// One access to a page that grants `right` in all.
fn case(lab: &mut Lab, size: &Size, kind: Access, right: u64, name: core::fmt::Arguments<'_>) {
    let exit = lab.access(kind);
    let flags = lab.flags();
    let page = lab.page(size, kind);
    let needs = kind.needs(flags);
    let with = if flags { " with flags" } else { "" };
    let mut out = Serial;
    let check = Check::new(&mut out, format_args!("ept{with} {} {name}: {}", size.name, kind.name()));
    let seen = Hex(lab.flags_of(page, size.level));
    if right & needs == needs {
        check
            .expect("result", exit, Exit::Done(kind.value()))
            .expect("flags", seen, Hex(lab.flags_after(size, kind)))
            .end();
        return;
    }
    let linear = if kind == Walk { LINEAR_VALID } else { LINEAR_VALID | FINAL };
    let (address, physical) = match kind {
        Walk => (WALKED + super::DATA, page + kind.offset()),
        _ => (LINEAR + kind.offset(), page + kind.offset()),
    };
    // Bochs calls both a locked access and, with flags, one to a page table a write; the SDM a read as well.
    let open = if kind == Modify || (kind == Walk && flags) { rights::R } else { 0 };
    let told = |exit| match exit {
        Exit::Reason(r::EPT_VIOLATION, q) => Exit::Reason(r::EPT_VIOLATION, (q | open) & !super::ADVANCED),
        other => other,
    };
    check
        .fact("exit", exit)
        .expect("result", told(exit), Exit::Reason(r::EPT_VIOLATION, needs | open | right << 3 | linear))
        .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(physical))
        .expect("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS)), Hex(address))
        .fact("flags", seen)
        .end();
}
