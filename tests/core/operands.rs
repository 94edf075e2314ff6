//! VMREAD and VMWRITE with operands in memory: L2's own, and L3's through its page tables and ept12.

use crate::kit::*;
use nvmx_machine::Setup;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::Level;
use nvmx_machine::world::{agree, agree_on, shadows};

const TSC_OFFSET_ENCODING: u64 = 0x2010;
/// Where an operand can lie: in a page, across two, in one that is not mapped, across into it, not canonical.
const PLACES: [u64; 7] = [PAGE, PAGE + 0xFF8, PAGE + 0x1FFD, 1 << 33, (4 << 30) - 3, 1 << 60, (1 << 47) - 4];

/// Both operands for a field, what came of each, and what stands there then.
async fn both(g: &Guest, encoding: u64, at: u64) {
    for op in [Op::VmwriteFrom(encoding, at), Op::VmreadTo(encoding, at)] {
        let outcome = g.run(op).await;
        g.see((op, outcome));
        g.note(format!("{:#x} {:#x}", g.peek(at & 0xFF_FFF8), g.peek((at + 8) & 0xFF_FFF8)));
        if g.level() == Level::L2 && outcome == Outcome::Left {
            look(g, "out").await;
            g.run(Op::Vmresume).await;
        }
    }
}

#[test]
fn operands_of_l2_are_where_its_page_tables_lead() {
    agree(|g| async move {
        vmxon(&g).await;
        both(&g, TSC_OFFSET_ENCODING, PAGE).await;
        make_current(&g, VMCS).await;
        (0..0x400).for_each(|n| g.poke(PAGE + 8 * n, 0x0101_0101_0101_0101 * (n & 0xFF)));
        // A 64-bit field and its upper half, a field of natural width, a read-only one, none.
        for encoding in [TSC_OFFSET_ENCODING, TSC_OFFSET_ENCODING + 1, 0x6C14, 0x4402, 0x7FFE, 1 << 32] {
            for at in PLACES {
                both(&g, encoding, at).await;
            }
        }
        // Another value arrives at another place.
        g.poke(PAGE, 0x1234_5678_9ABC_DEF0);
        g.run(Op::VmwriteFrom(0x6C14, PAGE)).await;
        g.run(Op::VmreadTo(0x6C14, PAGE + 0x1FFD)).await;
        assert_eq!(g.peek(PAGE + 0x1FF8) >> 40, 0xBC_DEF0);
        assert_eq!(g.peek(PAGE + 0x2000) & 0xFF_FFFF_FFFF, 0x12_3456_789A);
    });
}

#[test]
fn an_operand_of_l2_in_a_page_that_it_may_not_write_faults() {
    agree(|g| async move {
        vmxon(&g).await;
        make_current(&g, VMCS).await;
        // The second GiB is the first one again, read-only.
        g.poke(0x2008, 0xE1);
        let at = 1 << 30 | PAGE;
        both(&g, 0x6C14, PAGE).await;
        both(&g, 0x6C14, at).await;
        both(&g, 0x6C14, (1 << 30) - 4).await;
        // CR0.WP clear: the supervisor may.
        g.run(Op::MovToCr0(0x8000_0031)).await;
        both(&g, 0x6C14, at).await;
    });
}

/// L3 in the guest of a vmcs12 whose shadow VMCS is open for these fields.
async fn shadowed(g: &Guest, changes: &[(Field, u64)]) {
    let open = [TSC_OFFSET_ENCODING, TSC_OFFSET_ENCODING + 1, 0x6C14, 0x681E, 0x4402, 0x7FFE];
    with_shadow_vmcs(g, &open, changes).await;
    launch(g).await;
}

#[test]
fn operands_of_l3_go_through_its_page_tables_and_ept12() {
    for setup in Setup::all().into_iter().filter(shadows) {
        // Without and with accessed and dirty flags.
        for flags in [0, 1 << 6] {
            agree_on(setup, move |g| async move {
                shadowed(&g, &[(EPT_POINTER, EPT | 3 << 3 | 6 | flags)]).await;
                for encoding in [TSC_OFFSET_ENCODING, TSC_OFFSET_ENCODING + 1, 0x6C14, 0x6802, 0x4402, 0x7FFE] {
                    for at in PLACES {
                        both(&g, encoding, at).await;
                    }
                }
                // Each right of the operand's page, of the one behind it, and of a page with L3's page tables.
                for page in [PAGE, PAGE + 0x1000, 0x1000, 0x2000] {
                    for rights in [0, 1, 3, 5, 7] {
                        leave(&g).await;
                        g.poke(entry(page), page | rights | if rights == 0 { 0 } else { 0x30 });
                        g.run(Op::Invept(2, 0)).await;
                        g.run(Op::Vmresume).await;
                        for encoding in [0x6C14, TSC_OFFSET_ENCODING] {
                            both(&g, encoding, PAGE + 0x10).await;
                            both(&g, encoding, PAGE + 0xFFC).await;
                        }
                    }
                }
                leave(&g).await;
                let marked: Vec<u64> =
                    [PAGE, PAGE + 0x1000, 0x1000, 0x2000].map(|page| g.peek(entry(page)) & 0x300).into();
                g.note(format!("{marked:x?}"));
            });
        }
    }
}

#[test]
fn operands_of_l3_are_written_where_sub_pages_allow() {
    const SPP: u64 = 0x24_0000;
    for setup in Setup::all().into_iter().filter(shadows) {
        for flags in [0, 1 << 6] {
            agree_on(setup, move |g| async move {
                let controls = control(SECONDARY_VM_EXEC_CONTROL, 1 << 14 | 1 << 23, 0);
                let pointers = [(EPT_POINTER, EPT | 3 << 3 | 6 | flags), (SUB_PAGE_PERMISSION_TABLE_POINTER, SPP)];
                (0..3).for_each(|level| g.poke(SPP + 0x1000 * level, (SPP + 0x1000 * (level + 1)) | 1));
                shadowed(&g, &[controls, pointers[0], pointers[1]]).await;
                // The operand's page, and one with L3's page tables, to which the processor writes nothing by sub-pages.
                for (page, bits) in [(PAGE, 1), (PAGE, 1 << 2), (PAGE, 2), (0x1000, 0x5555_5555_5555_5555)] {
                    leave(&g).await;
                    g.poke(SPP + 0x3000 + (page >> 12) * 8, bits);
                    g.poke(entry(page), page | 1 << 61 | 0x30 | 1);
                    g.run(Op::Invept(2, 0)).await;
                    g.run(Op::Vmresume).await;
                    for encoding in [0x6C14, TSC_OFFSET_ENCODING] {
                        for at in [0x10, 0x78, 0x90, 0xF80] {
                            both(&g, encoding, PAGE + at).await;
                        }
                    }
                    leave(&g).await;
                    g.note(format!("{page:#x} {:x}", g.peek(entry(page)) & 0x300));
                    g.poke(entry(page), page | 0x37);
                    g.run(Op::Vmresume).await;
                }
            });
        }
    }
}

#[test]
fn operands_of_l3_without_ept_are_in_l2s_memory() {
    for setup in Setup::all().into_iter().filter(shadows) {
        agree_on(setup, |g| async move {
            shadowed(&g, &[control(SECONDARY_VM_EXEC_CONTROL, 1 << 14, 1 << 1)]).await;
            for at in PLACES {
                both(&g, 0x6C14, at).await;
                both(&g, TSC_OFFSET_ENCODING, at).await;
            }
        });
    }
}

#[test]
fn a_fault_of_an_operand_of_l3_is_an_exit_where_l2_asks() {
    for setup in Setup::all().into_iter().filter(shadows) {
        agree_on(setup, |g| async move {
            shadowed(&g, &[(EXCEPTION_BITMAP, 1 << 13 | 1 << 14), (PAGE_FAULT_ERROR_CODE_MATCH, 2)]).await;
            for mask in [2, 0] {
                for at in PLACES {
                    both(&g, 0x6C14, at).await;
                    both(&g, TSC_OFFSET_ENCODING, at).await;
                }
                leave(&g).await;
                write(&g, &[(PAGE_FAULT_ERROR_CODE_MASK, mask)]).await;
                g.run(Op::Vmresume).await;
            }
        });
    }
}

#[test]
fn operands_of_l3_in_32_bit_code_are_in_its_data_segment() {
    for setup in Setup::all().into_iter().filter(shadows) {
        agree_on(setup, |g| async move {
            shadowed(&g, &[control(SECONDARY_VM_EXEC_CONTROL, 1 << 14 | 1 << 7, 0), (EXCEPTION_BITMAP, 1 << 6)]).await;
            // Unrestricted, it leaves IA-32e mode and paging.
            g.set(GUEST_CR0, 0x31);
            g.set(GUEST_IA32_EFER, 0x901);
            g.set(GUEST_CS_AR_BYTES, 0xC09B);
            let (read_write, by_bytes, read_only, unusable) = (0xC093, 0x4093, 0xC091, 1 << 16);
            (0..0x400).for_each(|n| g.poke(PAGE + 8 * n, 0x0101_0101_0101_0101 * (n & 0xFF)));
            for (base, limit, rights) in [
                (0, 0xFFFF_FFFF, read_write),
                (0x1000, PAGE + 0xFFF, read_write),
                (0, PAGE + 0xFFE, by_bytes),
                (0, 0xFFFF_FFFF, read_only),
                (0, 0, unusable),
            ] {
                g.set(GUEST_DS_BASE, base);
                g.set(GUEST_DS_LIMIT, limit);
                g.set(GUEST_DS_AR_BYTES, rights);
                for encoding in [0x6C14, TSC_OFFSET_ENCODING, TSC_OFFSET_ENCODING + 1, 0x7FFE] {
                    for at in [PAGE, PAGE + 0xFFC, PAGE + 0xFFD] {
                        both(&g, encoding, at).await;
                    }
                }
            }
        });
    }
}
