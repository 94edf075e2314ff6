//! Entries that no EPT may have, and the guest's own page tables under EPT.

use super::{ALIAS, invalidate, masked, read};
use crate::{
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use l2_kit::{
    Check, caps,
    ept::{self, Ept, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    protocol::Hex,
    serial::Serial,
    setup,
    vmx::{self, reason as r},
};

/// Entries with one thing wrong, in the table that maps a page at `at`.
pub fn entries(guest: &mut Guest, ept: Ept, at: u64) {
    let wide = too_wide();
    let small = at | ept::WRITE_BACK;
    let large = at | ept::WRITE_BACK | 1 << 7;
    let no_execute_only = caps::get(setup::VMX_EPT_VPID_CAP) & 1 == 0;
    let cases = [
        ("4K w", 0, small | 2, true),
        ("4K wx", 0, small | 6, true),
        ("4K x", 0, small | 4, no_execute_only),
        ("4K memory type 2", 0, at | 2 << 3 | 7, true),
        ("4K memory type 3", 0, at | 3 << 3 | 7, true),
        ("4K memory type 7", 0, at | 7 << 3 | 7, true),
        ("4K beyond the address width", 0, small | wide | 7, true),
        ("2M w", 1, large | 2, true),
        ("2M wx", 1, large | 6, true),
        ("2M memory type 2", 1, at | 2 << 3 | 1 << 7 | 7, true),
        ("2M with bit 20", 1, large | 1 << 20 | 7, true),
        ("directory entry with bit 3", 1, ept.entry(at, 1) | 1 << 3, true),
        ("directory entry wx", 1, ept.entry(at, 1) & !1, true),
        ("directory entry beyond the address width", 1, ept.entry(at, 1) | wide, true),
        ("PDPT entry with bit 5", 2, 1 << 5, true),
        ("PML4 entry with bit 7", 3, 1 << 7, true),
    ];
    for (name, level, entry, applies) in cases {
        if !applies {
            Check::new(&mut Serial, format_args!("misconfigured {name}")).fact("applies", false).end();
            continue;
        }
        let (tree, address, alias) = match level {
            0 | 1 => (ept, at, ALIAS),
            // What governs the guest itself stays as it is: the bad entry is in another tree, far away.
            _ => far(guest, at, level),
        };
        let before = tree.entry(address, level);
        tree.set_entry(address, level, if level < 2 { entry } else { before | entry & 0xF8 });
        vmx::write(f::EPTP, tree.pointer());
        invalidate();
        let exit = masked(guest.execute(read, alias + 8));
        Check::new(&mut Serial, format_args!("misconfigured {name}"))
            .expect("result", exit, Exit::Reason(r::EPT_MISCONFIGURATION, 0))
            .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(address + 8))
            .end();
        tree.set_entry(address, level, before);
        vmx::write(f::EPTP, ept.pointer());
    }
    invalidate();
}

/// A tree, a physical address in it under a PDPT or PML4 entry that nothing else is under, and a linear address for it.
fn far(guest: &Guest, target: u64, level: u32) -> (Ept, u64, u64) {
    let tree = Ept::identity();
    let address = if level == 2 { 16 << 30 } else { 1 << 39 };
    tree.set(address, LARGE, target | ept::WRITE_BACK | 1 << 7 | rights::RWX);
    let alias = ALIAS + u64::from(level) * LARGE;
    pages::set_entry(guest.cr3, alias, address | 3);
    (tree, address, alias)
}

/// The guest's own page tables are accessed through EPT as well.
pub fn page_tables(guest: &mut Guest, ept: Ept) {
    let linear = ALIAS + 16 * LARGE;
    let target = pages::address(pages::page());
    pages::set_entry(guest.cr3, linear, target | 3);
    let table = pages::table_of(guest.cr3, linear);
    for (name, right) in [("missing", rights::NONE), ("read-only", rights::R)] {
        pages::set_entry(guest.cr3, linear, target | 3);
        ept.map(table, PAGE, right);
        invalidate();
        let exit = masked(guest.execute(read, linear));
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("ept: the guest's page table is {name}")).fact("result", exit);
        match exit {
            Exit::Reason(..) => check
                .expect("page", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1)), Hex(table))
                .expect("linear", Hex(vmx::read(f::GUEST_LINEAR_ADDRESS)), Hex(linear))
                .end(),
            // Some CPUs find the accessed bit set already, or set it without asking EPT.
            _ => check.end(),
        }
        ept.map(table, PAGE, rights::RWX);
    }
    invalidate();
}
