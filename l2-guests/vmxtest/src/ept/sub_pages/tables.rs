//! Tables that are missing or wrong, tables that change, and the pointer to the first one.

use super::super::{Lab, Read, Size, Write};
use super::{
    ALL, CONTROL, DATA, DIRTY, LINEAR, MISS, PIECE, SPP_EVENT, Table, VALID, WRITTEN, assert_done, bit, denied, plain,
    readable, without_advanced, write_at,
};
use crate::{
    entries::{Change::Set, try_with},
    guest::{Exit, nothing},
    injection::noting,
    vmxon::too_wide,
};
use l2_kit::{
    Check,
    ept::rights,
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::secondary,
    vmx::{self, Outcome},
};

/// Tables that are missing or wrong.
pub fn events(lab: &mut Lab, size: &Size, table: &Table) {
    let with = if lab.flags() { " with flags" } else { "" };
    let page = lab.page(size, Write);
    table.set(page, 3, ALL);
    for level in 0..4 {
        let good = table.get(page, level);
        let cases: [(&str, u64, u64); 6] = [
            ("absent", 0, MISS),
            ("absent, all else set", !VALID, MISS),
            ("with bit 1", good | 2, 0),
            ("with bit 11", good | 1 << 11, 0),
            ("beyond the address width", good | too_wide(), 0),
            ("with bit 63", good | 1 << 63, 0),
        ];
        for (name, bad, qualification) in cases {
            // The last table has rights alone; each second bit is reserved.
            if level == 3 && (bad == 0 || bad == !VALID || bad & !ALL == 0) {
                continue;
            }
            for warm in [false, true] {
                lab.map(size, Write, readable(lab, size));
                table.set(page, level, bad);
                if warm {
                    assert_done(lab.access(Read));
                }
                let exit = if warm { write_at(lab, DATA) } else { plain(lab, Write) };
                let (physical, linear) = (vmx::read(f::GUEST_PHYSICAL_ADDRESS), vmx::read(f::GUEST_LINEAR_ADDRESS));
                let dirty = lab.ept.entry(page, 0) & DIRTY;
                table.set(page, level, good);
                let after = plain(lab, Write);
                let when = if warm { ", after a read" } else { "" };
                Check::new(
                    &mut Serial,
                    format_args!("sub-page table{with}: entry of level {} {name}{when}", 4 - level),
                )
                .expect("result", exit, Exit::Reason(SPP_EVENT, qualification))
                .expect("physical", Hex(physical), Hex(page + DATA))
                .expect("linear", Hex(linear), Hex(LINEAR + DATA))
                .expect("dirty", dirty, 0)
                .expect("after", after, Exit::Done(WRITTEN))
                .end();
            }
        }
    }
}

/// What changes in the table counts after INVEPT.
pub fn changes(lab: &mut Lab, size: &Size, table: &Table) {
    let with = if lab.flags() { " with flags" } else { "" };
    let page = lab.page(size, Write);
    let mut seen = [Exit::Done(0); 6];
    lab.map(size, Write, readable(lab, size));
    for (n, seen) in seen.iter_mut().enumerate() {
        table.set(page, 3, if n % 2 == 0 { ALL } else { 0 });
        lab.forget();
        *seen = write_at(lab, DATA);
    }
    let other = pages::address(pages::page());
    table.set(page, 3, 0);
    let old = table.get(page, 2);
    table.set(page, 2, other | VALID);
    let moved = Table { levels: [table.levels[0], table.levels[1], table.levels[2], other] };
    moved.set(page, 3, ALL);
    lab.forget();
    let moved = write_at(lab, DATA);
    table.set(page, 2, old);
    lab.forget();
    let back = write_at(lab, DATA);
    Check::new(&mut Serial, format_args!("sub-page table{with}: what changes"))
        .expect("allowed", seen[0], Exit::Done(WRITTEN))
        .expect("denied", seen[1], denied(rights::W, 5))
        .expect("allowed_again", seen[4], Exit::Done(WRITTEN))
        .expect("denied_again", seen[5], denied(rights::W, 5))
        .expect("another_table", moved, Exit::Done(WRITTEN))
        .expect("the_first_one", back, denied(rights::W, 5))
        .end();
}

/// Two tables in turns, as the guest of two VMCSs would have them.
pub fn two_tables(lab: &mut Lab, size: &Size, table: &Table) {
    let page = lab.page(size, Write);
    let second = Table::new(page, bit(DATA / PIECE));
    table.set(page, 3, 0);
    lab.map(size, Write, readable(lab, size));
    let mut seen = [Exit::Done(0); 4];
    for (n, seen) in seen.iter_mut().enumerate() {
        vmx::write(f::SPPTP, if n % 2 == 0 { &second } else { table }.levels[0]);
        lab.forget();
        *seen = write_at(lab, DATA);
    }
    vmx::write(f::SPPTP, table.levels[0]);
    Check::new(&mut Serial, "sub-page tables in turns")
        .expect("first", seen[0], Exit::Done(WRITTEN))
        .expect("second", seen[1], denied(rights::W, 5))
        .expect("third", seen[2], Exit::Done(WRITTEN))
        .expect("fourth", seen[3], denied(rights::W, 5))
        .end();
}

/// Entries that must fail.
pub fn refused(lab: &mut Lab, table: &Table) {
    let bad = Exit::Refused(Outcome::FailValid(7));
    let good = table.levels[0];
    for (name, control, pointer, ept, wanted) in [
        ("good", CONTROL, good, true, Exit::Done(5)),
        ("misaligned", CONTROL, good | 8, true, bad),
        ("beyond the address width", CONTROL, good | too_wide(), true, bad),
        ("without EPT", CONTROL, good, false, bad),
        ("misaligned, and unused", 0, good | 8, true, Exit::Done(5)),
    ] {
        let controls = vmx::read(f::SECONDARY_CONTROLS) & !u64::from(if ept { 0 } else { secondary::EPT }) | control;
        let got = try_with(&mut lab.guest, &[(f::SECONDARY_CONTROLS, Set(controls)), (f::SPPTP, Set(pointer))]).0;
        Check::new(&mut Serial, format_args!("sub-page table pointer {name}")).expect("result", got, wanted).end();
    }
}

/// An interrupt whose frame is pushed to a page with sub-pages: allowed, twice with an INVEPT between, denied, with a table missing.
pub fn delivery(lab: &mut Lab, size: &Size, table: &Table) {
    const TOP: u64 = 0xFC0;
    const EVENT: u64 = 1 << 31 | 0x60;
    let with = if lab.flags() { " with flags" } else { "" };
    let page = lab.page(size, Write);
    let good = table.get(page, 1);
    lab.map(size, Write, readable(lab, size));
    for (name, bits, second, wanted) in [
        ("allowed", ALL, good, None),
        ("allowed again", ALL, good, None),
        ("denied", 0, good, Some(denied(rights::W, 5))),
        ("of a missing table", ALL, 0, Some(Exit::Reason(SPP_EVENT, MISS))),
    ] {
        table.set(page, 3, bits);
        table.set(page, 1, second);
        lab.forget();
        lab.guest.start(nothing, 5);
        // SAFETY: the return address on the guest's own stack.
        let back = unsafe { (vmx::read(f::GUEST_RSP) as *const u64).read() };
        // SAFETY: the page under test, to which nobody holds a reference; the guest is stopped.
        let words = unsafe { pages::at(lab.target) };
        words[TOP as usize / 8] = back;
        vmx::write(f::GUEST_RSP, LINEAR + TOP);
        vmx::write(f::GUEST_RFLAGS, 0x202);
        vmx::write(f::ENTRY_INTERRUPTION_INFO, EVENT);
        let (exit, seen) = noting(0x60, || lab.guest.run());
        let (exit, vectoring) = (without_advanced(exit), vmx::read(f::IDT_VECTORING_INFO) & !(1 << 12));
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("sub-page{with}: delivery {name}")).expect(
            "result",
            exit,
            wanted.unwrap_or(Exit::Done(5)),
        );
        match wanted {
            None => check.expect("delivered", seen.count, 1).end(),
            Some(_) => {
                check.expect("vectoring", Hex(vectoring), Hex(EVENT)).expect("delivered", seen.count, 0).end();
                table.set(page, 3, ALL);
                table.set(page, 1, good);
                vmx::write(f::ENTRY_INTERRUPTION_INFO, vectoring);
                let (exit, seen) = noting(0x60, || lab.guest.run());
                Check::new(&mut Serial, format_args!("sub-page{with}: delivery {name}, once more"))
                    .expect("result", exit, Exit::Done(5))
                    .expect("delivered", seen.count, 1)
                    .end();
            }
        }
    }
}
