//! Sub-page write permissions (SDM "Sub-Page Write Permissions", "SPP-Induced VM Exits", table "Exit Qualification for SPP-Induced
//! VM Exits"): a 4 KiB page that EPT lets be read alone, and a table with a bit for each 128 bytes of it.

mod tables;

use super::{
    Access, DATA, FINAL, LINEAR, LINEAR_VALID, Lab, Modify, Read, SIZES, Size, VALUE, WRITTEN, Walk, Write, write,
};
use crate::guest::Exit;
use l2_kit::{
    Check,
    ept::{self, ACCESSED, DIRTY, rights},
    fields as f,
    pages::{self, PAGE},
    protocol::Hex,
    serial::Serial,
    setup::{self, Kind, Missing, secondary},
    vmx::{self, reason as r},
};

/// In the leaf: the table has a say.
const SUB_PAGES: u64 = 1 << 61;
const SPP_EVENT: u32 = 66;
/// Of the qualification.
const MISS: u64 = 1 << 11;
const VALID: u64 = 1;
/// Bytes with a bit of their own.
const PIECE: u64 = 128;
const ALL: u64 = 0x5555_5555_5555_5555;
const CONTROL: u64 = secondary::SUB_PAGES as u64;

/// Where a page's bits stand: the tables of four levels, the first one first.
struct Table {
    levels: [u64; 4],
}

impl Table {
    fn new(page: u64, bits: u64) -> Self {
        let table = Self { levels: core::array::from_fn(|_| pages::address(pages::page())) };
        for level in 0..3 {
            table.set(page, level, table.levels[level + 1] | VALID);
        }
        table.set(page, 3, bits);
        table
    }

    fn set(&self, page: u64, level: usize, entry: u64) {
        // SAFETY: tables of this part's, to which nobody holds a reference; the guest is stopped.
        let table = unsafe { pages::at(self.levels[level]) };
        table[(page >> (39 - 9 * level)) as usize & 511] = entry;
    }

    fn get(&self, page: u64, level: usize) -> u64 {
        // SAFETY: as above.
        let table = unsafe { pages::at(self.levels[level]) };
        table[(page >> (39 - 9 * level)) as usize & 511]
    }
}

/// The bit of the piece with this number.
const fn bit(piece: u64) -> u64 {
    1 << (2 * piece)
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let lab = &mut Lab::new()?;
    if !setup::allowed_one(Kind::Secondary, secondary::SUB_PAGES) {
        Check::new(&mut Serial, "sub-pages").fact("offered", false).end();
        return Ok(());
    }
    lab.run_on(lab.ept.pointer());
    let [size, ..] = &SIZES;
    let page = lab.page(size, Write);
    let table = Table::new(page, 0);
    let old = vmx::read(f::SECONDARY_CONTROLS);
    tables::refused(lab, &table);
    vmx::write(f::SECONDARY_CONTROLS, old | CONTROL);
    vmx::write(f::SPPTP, table.levels[0]);
    for pointer in [lab.ept.pointer(), lab.ept.pointer_with_flags()] {
        if pointer & 1 << 6 == 0 || lab.offered.flags() {
            lab.run_on(pointer);
            pieces(lab, size, &table);
            kinds(lab, size, &table);
            tables::events(lab, size, &table);
            tables::changes(lab, size, &table);
            tables::delivery(lab, size, &table);
        }
    }
    log(lab, size, &table);
    lab.run_on(lab.ept.pointer());
    leaves(lab, size, &table);
    tables::two_tables(lab, size, &table);
    vmx::write(f::SECONDARY_CONTROLS, old);
    table.set(page, 3, ALL);
    lab.map(size, Write, readable(lab, size));
    let unused = plain(lab, Write);
    Check::new(&mut Serial, "sub-pages without the control").expect("write", unused, denied(rights::W, 5)).end();
    Ok(())
}

/// A leaf that can be read and executed, and whose pieces the table may let be written.
fn readable(lab: &Lab, size: &Size) -> u64 {
    lab.leaf(size, Write, rights::R | rights::X) | SUB_PAGES
}

/// The violation of an access to a page that grants some rights.
fn denied(access: u64, granted: u64) -> Exit {
    Exit::Reason(r::EPT_VIOLATION, access | granted << 3 | LINEAR_VALID | FINAL)
}

/// One access, without bits that depend on the processor.
fn plain(lab: &mut Lab, kind: Access) -> Exit {
    let exit = lab.access(kind);
    without_advanced(exit)
}

fn without_advanced(exit: Exit) -> Exit {
    match exit {
        Exit::Reason(r::EPT_VIOLATION, q) => Exit::Reason(r::EPT_VIOLATION, q & !super::ADVANCED),
        other => other,
    }
}

/// A write somewhere in the page, without INVEPT before it.
fn write_at(lab: &mut Lab, offset: u64) -> Exit {
    let exit = lab.guest.execute(write, LINEAR + offset);
    without_advanced(exit)
}

/// Each piece by its own bit alone: it can be written, and no other.
fn pieces(lab: &mut Lab, size: &Size, table: &Table) {
    let with = if lab.flags() { " with flags" } else { "" };
    let page = lab.page(size, Write);
    for piece in 0..32 {
        lab.map(size, Write, readable(lab, size));
        table.set(page, 3, bit(piece));
        lab.forget();
        let (mut written, mut refused) = (0u64, 0u64);
        for other in 0..32 {
            match write_at(lab, other * PIECE + 8 * (other % 16)) {
                Exit::Done(WRITTEN) => written |= 1 << other,
                exit if exit == denied(rights::W, 5) => refused |= 1 << other,
                _ => {}
            }
        }
        Check::new(&mut Serial, format_args!("sub-page {piece}{with}"))
            .expect("written", Hex(written), Hex(1 << piece))
            .expect("refused", Hex(refused), Hex(0xFFFF_FFFF & !(1 << piece)))
            .end();
    }
}

/// Other kinds of access than writes, the first one and after a read.
fn kinds(lab: &mut Lab, size: &Size, table: &Table) {
    let with = if lab.flags() { " with flags" } else { "" };
    for kind in [Read, Write, Modify] {
        for (name, bits) in [("allowed", bit(0)), ("denied", ALL & !bit(0))] {
            for warm in [false, true] {
                let page = lab.page(size, kind);
                table.set(page, 3, bits);
                lab.map(size, kind, readable(lab, size));
                let exit = if warm {
                    let first = lab.access(Read);
                    assert_done(first);
                    let program = match kind {
                        Write => write,
                        Modify => super::modify,
                        _ => super::read,
                    };
                    without_advanced(lab.guest.execute(program, LINEAR + DATA))
                } else {
                    plain(lab, kind)
                };
                let allowed = kind == Read || bits & 1 != 0;
                let wanted = if allowed { Exit::Done(kind.value()) } else { denied(rights::W, 5) };
                // Whether an access that reads and writes is told as a read too is the processor's.
                let told = match exit {
                    Exit::Reason(r::EPT_VIOLATION, q) if kind == Modify => {
                        Exit::Reason(r::EPT_VIOLATION, q & !rights::R)
                    }
                    other => other,
                };
                let writes = allowed && kind != Read;
                let dirty = if lab.flags() && writes { 2 } else { 0 };
                let accessed = if lab.flags() && (allowed || warm) { 1 } else { 0 };
                let after = if warm { ", after a read" } else { "" };
                let flags = lab.ept.entry(page, 0) >> 8 & 3;
                let mut out = Serial;
                let check = Check::new(&mut out, format_args!("sub-page{with}: {} {name}{after}", kind.name()))
                    .expect("result", told, wanted);
                // Whether a violation leaves the accessed flag is the processor's.
                if allowed {
                    check.expect("flags", flags, accessed | dirty).end()
                } else {
                    check.expect("dirty", flags & 2, dirty).end()
                }
            }
        }
    }
    // Page tables of the guest are no data: with flags in EPT, reading them is a write that no sub-page allows.
    let page = lab.page(size, Walk);
    table.set(page, 3, ALL);
    lab.map(size, Walk, lab.leaf(size, Walk, rights::R | rights::X) | SUB_PAGES);
    let exit = lab.access(Walk);
    let mut out = Serial;
    let check = Check::new(&mut out, format_args!("sub-page{with}: a page table"));
    if lab.flags() {
        check.expect("violation", matches!(exit, Exit::Reason(r::EPT_VIOLATION, _)), true).fact("result", exit).end();
    } else {
        check.expect("result", exit, Exit::Done(VALUE)).end();
    }
    lab.map(size, Walk, lab.leaf(size, Walk, rights::RWX));
}

fn assert_done(exit: Exit) {
    if !matches!(exit, Exit::Done(_)) {
        Check::new(&mut Serial, "sub-page: a read").expect("result", exit, Exit::Done(VALUE)).end();
    }
}

/// Which leaves have sub-pages.
fn leaves(lab: &mut Lab, size: &Size, table: &Table) {
    let page = lab.page(size, Write);
    let base = lab.leaf(size, Write, rights::NONE) | SUB_PAGES;
    for (name, leaf, bits, wanted) in [
        ("r", base | rights::R, ALL, Exit::Done(WRITTEN)),
        ("rx", base | rights::R | rights::X, ALL, Exit::Done(WRITTEN)),
        ("rw", base | rights::R | rights::W, 0, Exit::Done(WRITTEN)),
        ("none", base, ALL, denied(rights::W, 0)),
        ("x", base | rights::X, ALL, denied(rights::W, 4)),
        ("r without the bit", (base | rights::R) & !SUB_PAGES, ALL, denied(rights::W, 1)),
    ] {
        if name == "x" && !lab.offered.execute_only() {
            continue;
        }
        table.set(page, 3, bits);
        lab.map(size, Write, leaf);
        let exit = plain(lab, Write);
        Check::new(&mut Serial, format_args!("sub-page of a leaf {name}")).expect("result", exit, wanted).end();
    }
    // A table above that takes the right to write away does so of pages, and not of their pieces.
    table.set(page, 3, bit(DATA / PIECE));
    lab.map(size, Write, lab.leaf(size, Write, rights::RWX) | SUB_PAGES);
    let upper = lab.ept.entry(page, 1);
    lab.ept.set_entry(page, 1, upper & !rights::W);
    let exit = plain(lab, Write);
    lab.ept.set_entry(page, 1, upper);
    Check::new(&mut Serial, "sub-page below a table without the right to write")
        .expect("result", exit, Exit::Done(WRITTEN))
        .end();
    // Large pages have none.
    for large in lab.offered.sizes().filter(|size| size.level > 0) {
        let page = lab.page(large, Write);
        let all = Table::new(page, ALL);
        vmx::write(f::SPPTP, all.levels[0]);
        lab.map(large, Write, lab.leaf(large, Write, rights::R) | SUB_PAGES);
        let exit = plain(lab, Write);
        lab.map(large, Write, lab.leaf(large, Write, rights::RWX));
        Check::new(&mut Serial, format_args!("sub-page of a page of {}", large.name))
            .expect("result", exit, denied(rights::W, 1))
            .end();
    }
    vmx::write(f::SPPTP, table.levels[0]);
    lab.map(size, Write, lab.leaf(size, Write, rights::RWX));
}

/// A write that a sub-page allows is logged.
fn log(lab: &mut Lab, size: &Size, table: &Table) {
    if !lab.offered.flags() || !setup::allowed_one(Kind::Secondary, secondary::PML) {
        return;
    }
    lab.run_on(lab.ept.pointer_with_flags());
    let page = lab.page(size, Write);
    let log = pages::address(pages::page());
    let old = vmx::read(f::SECONDARY_CONTROLS);
    // What the guest itself writes must not be logged between.
    lab.map(size, Write, readable(lab, size));
    table.set(page, 3, ALL);
    vmx::write(f::PML_ADDR, log);
    assert_done(lab.access(Read));
    vmx::write(f::SECONDARY_CONTROLS, old | u64::from(secondary::PML));
    for (name, bits, logged) in [("denied", 0, false), ("allowed", ALL, true)] {
        table.set(page, 3, bits);
        vmx::write(f::PML_INDEX, 511);
        lab.forget();
        let exit = write_at(lab, DATA);
        // SAFETY: the log, to which nobody holds a reference.
        let entries = unsafe { pages::at(log) };
        let seen = entries.contains(&page);
        Check::new(&mut Serial, format_args!("sub-page log: {name}"))
            .expect("result", exit, if logged { Exit::Done(WRITTEN) } else { denied(rights::W, 5) })
            .expect("logged", seen, logged)
            .end();
    }
    vmx::write(f::SECONDARY_CONTROLS, old);
}

const _: () = assert!(PAGE / PIECE == 32 && ACCESSED == 1 << 8 && ept::WRITE_BACK == 6 << 3);
