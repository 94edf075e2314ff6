//! Memory types, and entries that no EPT may have.

use super::{Lab, Read, Size, VALUE, Write};
use crate::{guest::Exit, vmxon::too_wide};
use l2_kit::{
    Check,
    ept::{LARGE_BIT, rights},
    fields as f,
    protocol::Hex,
    serial::Serial,
    vmx::{self, reason as r},
};

const IGNORE_PAT: u64 = 1 << 6;
const TYPE: u64 = 7 << 3;

/// All of it, with flags if there are any.
pub fn all(lab: &mut Lab) {
    for size in lab.offered.sizes() {
        types(lab, size);
        for pointer in [lab.ept.pointer(), lab.ept.pointer_with_flags()] {
            if pointer & 1 << 6 == 0 || lab.offered.flags() {
                lab.run_on(pointer);
                leaves(lab, size);
            }
        }
        upper(lab, size);
        lab.map(size, Read, lab.leaf(size, Read, rights::RWX));
    }
}

/// Memory of each type that exists can be read and written.
fn types(lab: &mut Lab, size: &Size) {
    for memory_type in [0, 1, 4, 5, 6] {
        for pat in [0, IGNORE_PAT] {
            let leaf = lab.leaf(size, Read, rights::RWX) & !TYPE | memory_type << 3 | pat;
            lab.map(size, Read, leaf);
            let (first, second) = (lab.access(Read), lab.access(Write));
            let ignoring = if pat != 0 { ", PAT ignored" } else { "" };
            Check::new(&mut Serial, format_args!("ept {} memory type {memory_type}{ignoring}", size.name))
                .expect("read", first, Exit::Done(VALUE))
                .expect("write", second, Exit::Done(Write.value()))
                .end();
        }
    }
}

/// Leaves with one thing wrong.
fn leaves(lab: &mut Lab, size: &Size) {
    let good = lab.leaf(size, Read, rights::RWX);
    let no_rights = good & !rights::RWX;
    let execute_only = lab.offered.execute_only();
    let cases = [
        ("w", no_rights | rights::W, true),
        ("wx", no_rights | rights::W | rights::X, true),
        ("x", no_rights | rights::X, !execute_only),
        ("memory type 2", good & !TYPE | 2 << 3, true),
        ("memory type 3", good & !TYPE | 3 << 3, true),
        ("memory type 7", good & !TYPE | 7 << 3, true),
        ("beyond the address width", good | too_wide(), true),
        ("bit 51", good | 1 << 51, true),
        ("bit 12", good | 1 << 12, size.level > 0),
        ("bit 13", good | 1 << 13, size.level > 0),
        ("bit 20", good | 1 << 20, size.level > 0),
        ("bit 29", good | 1 << 29, size.level > 1),
    ];
    let with = if lab.flags() { " with flags" } else { "" };
    for (name, leaf, applies) in cases {
        if applies {
            lab.map(size, Read, leaf);
            misconfigured(lab, size, format_args!("misconfigured{with} {} {name}", size.name));
        }
    }
    // What has no rights may hold anything.
    let mut seen = [Exit::Done(0); 3];
    for (seen, leaf) in seen.iter_mut().zip([TYPE, LARGE_BIT | IGNORE_PAT | 2 << 3, too_wide() | 1 << 13]) {
        lab.map(size, Read, leaf);
        *seen = lab.access(Read);
    }
    let wanted = Exit::Reason(r::EPT_VIOLATION, rights::R | super::LINEAR_VALID | super::FINAL);
    let plain = |exit| match exit {
        Exit::Reason(r::EPT_VIOLATION, q) => Exit::Reason(r::EPT_VIOLATION, q & !super::ADVANCED),
        other => other,
    };
    Check::new(&mut Serial, format_args!("not present{with} {}", size.name))
        .expect("with_type", plain(seen[0]), wanted)
        .expect("with_size", plain(seen[1]), wanted)
        .expect("with_address", plain(seen[2]), wanted)
        .end();
}

/// Entries above the page with one thing wrong. The root's govern the guest itself and stay as they are.
fn upper(lab: &mut Lab, size: &Size) {
    let page = lab.page(size, Read);
    for level in size.level + 1..3 {
        for (name, bits) in [
            ("bit 3", 1 << 3),
            ("bit 4", 1 << 4),
            ("bit 5", 1 << 5),
            ("bit 6", 1 << 6),
            ("beyond the address width", too_wide()),
            ("w", 0),
        ] {
            lab.map(size, Read, lab.leaf(size, Read, rights::RWX));
            let good = lab.ept.entry(page, level);
            let bad = if bits == 0 { good & !rights::RWX | rights::W } else { good | bits };
            lab.ept.set_entry(page, level, bad);
            misconfigured(lab, size, format_args!("misconfigured {} level {level} {name}", size.name));
            lab.ept.set_entry(page, level, good);
        }
    }
}

fn misconfigured(lab: &mut Lab, size: &Size, name: core::fmt::Arguments<'_>) {
    let exit = lab.access(Read);
    Check::new(&mut Serial, name)
        .expect("result", exit, Exit::Reason(r::EPT_MISCONFIGURATION, 0))
        .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(lab.page(size, Read) + Read.offset()))
        .end();
}
