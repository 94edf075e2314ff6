//! L3's memory and what L2 has processors do with it: violations, misconfigurations, the page log, #VE, VMFUNC, shadow VMCSs.

use crate::kit::*;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::Level;
use nvmx_machine::world::{END, End, OWN, agree};
use nvmx_machine::{Setup, World};

/// Exit information of an access, without what only some processors tell.
async fn told(g: &Guest) -> Vec<Option<u64>> {
    let mut read = vec![];
    for field in [VM_EXIT_REASON, EXIT_QUALIFICATION, GUEST_PHYSICAL_ADDRESS, GUEST_RIP] {
        read.push(g.vmread(field).await);
    }
    read[1] = read[1].map(|qualification| qualification & 0x1BF);
    read
}

#[test]
fn rights_of_ept12_are_told_and_counted() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        for rights in [0, 1, 3, 4, 5, 7] {
            for op in [Op::Read(PAGE), Op::Write(PAGE, rights), Op::Read(PAGE)] {
                let outcome = g.run(op).await;
                g.see((rights, op, outcome));
                if g.level() == Level::L2 {
                    g.note(format!("{:x?}", told(&g).await));
                    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                }
            }
            leave(&g).await;
            g.poke(entry(PAGE), PAGE | if rights == 0 { 0 } else { 0x30 | rights });
            g.run(Op::Invept(1, EPT | 3 << 3 | 6)).await;
            g.run(Op::Vmresume).await;
        }
        // Reserved: a memory type, and writable without readable.
        for bad in [PAGE | 2 << 3 | 7, PAGE | 0x30 | 2] {
            leave(&g).await;
            g.poke(entry(PAGE), bad);
            g.run(Op::Invept(2, 0)).await;
            g.run(Op::Vmresume).await;
            g.run(Op::Read(PAGE)).await;
            assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(49), "{bad:#x}");
            g.run(Op::Vmresume).await;
        }
    });
}

#[test]
fn ept12_that_leads_to_nvmxs_memory_is_a_misconfiguration() {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(|g| async move {
            hypervisor(&g, &[]).await;
            for at in [OWN.start(), END - 0x1000] {
                g.poke(entry(PAGE), at | 0x37);
                g.run(Op::Invept(2, 0)).await;
                g.run(Op::Vmlaunch).await;
                g.run(Op::Read(PAGE)).await;
                assert_eq!(g.level(), Level::L2);
                assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(49), "{at:#x}");
                g.run(Op::Vmclear(VMCS)).await;
                g.run(Op::Vmptrld(VMCS)).await;
            }
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn many_guests_with_an_ept_each_take_turns() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        for round in 0..3 {
            for n in 0..6 {
                let at = VMCS + 0x1000 * n;
                if round == 0 {
                    make_current(&g, at).await;
                    write(&g, &valid()).await;
                    write(&g, &[(VIRTUAL_PROCESSOR_ID, 1 + 64 * n % 130), (GUEST_RSP, n)]).await;
                } else {
                    g.run(Op::Vmptrld(at)).await;
                }
                g.run(if round == 0 { Op::Vmlaunch } else { Op::Vmresume }).await;
                assert_eq!(g.level(), Level::L3, "{round} {n}");
                g.run(Op::Write(PAGE + (n << 12), round)).await;
                g.see((round, n));
                leave(&g).await;
            }
        }
        g.run(Op::Vmxoff).await;
        g.see("off");
    });
}

#[test]
fn vmfunc_switches_to_the_listed_ept() {
    agree(|g| async move {
        const LIST: u64 = 0x2_6000;
        const SECOND: u64 = 0x21_0000;
        (0..3).for_each(|level| g.poke(SECOND + 0x1000 * level, (SECOND + 0x1000 * (level + 1)) | 7));
        (0..512).for_each(|n| g.poke(SECOND + 0x3000 + 8 * n, n << 12 | 0x37));
        g.poke(SECOND + 0x3000 + (PAGE >> 12) * 8, (PAGE + 0x1000) | 0x37);
        g.poke(LIST, EPT | 3 << 3 | 6);
        g.poke(LIST + 8, SECOND | 3 << 3 | 6);
        g.poke(LIST + 16, SECOND | 3 << 3 | 1);
        g.poke(PAGE, 0xA);
        g.poke(PAGE + 0x1000, 0xB);
        hypervisor(
            &g,
            &[control(SECONDARY_VM_EXEC_CONTROL, 1 << 13, 0), (VM_FUNCTION_CONTROLS, 1), (EPTP_LIST_ADDRESS, LIST)],
        )
        .await;
        launch(&g).await;
        for (index, expected) in [(1, 0xB), (0, 0xA), (1, 0xB)] {
            g.run(Op::Vmfunc(0, index)).await;
            g.run(Op::Read(PAGE)).await;
            assert_eq!(g.gpr(0), expected);
            g.see(index);
        }
        for (function, index) in [(0, 2), (0, 3), (0, 512), (1, 0), (63, 0)] {
            g.run(Op::Vmfunc(function, index)).await;
            look(&g, &format!("{function} {index}")).await;
            assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(59));
            g.run(Op::Vmresume).await;
        }
        g.run(Op::Vmfunc(64, 0)).await;
        g.see("above 63");
    });
}

#[test]
fn an_ept_of_five_levels_is_walked_to_its_pages() {
    agree(|g| async move {
        const TOP: u64 = 0x22_0000;
        // The same tables at 256 TiB.
        for entry in [0, 1] {
            g.poke(TOP + 8 * entry, EPT | 7);
        }
        g.poke(PAGE, 0xA);
        hypervisor(&g, &[(EPT_POINTER, TOP | 4 << 3 | 6)]).await;
        launch(&g).await;
        for at in [PAGE, 1 << 48 | PAGE, PAGE] {
            g.run(Op::Read(at)).await;
            assert_eq!(g.gpr(0), 0xA, "{at:#x}");
        }
        g.run(Op::Write(1 << 48 | PAGE, 0xB)).await;
        g.run(Op::Read(PAGE)).await;
        assert_eq!(g.gpr(0), 0xB);
        for at in [2 << 48 | PAGE, 1 << 57 | PAGE] {
            g.run(Op::Read(at)).await;
            look(&g, &format!("{at:#x}")).await;
            assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(48));
            g.run(Op::Vmresume).await;
        }
    });
}

/// L2's table of sub-page write permissions for the first 2 MiB, and its word for a page.
const SPP: u64 = 0x24_0000;

fn build_sub_pages(g: &Guest, root: u64, bits: u64) {
    (0..3).for_each(|level| g.poke(root + 0x1000 * level, (root + 0x1000 * (level + 1)) | 1));
    g.poke(root + 0x3000 + (PAGE >> 12) * 8, bits);
}

#[test]
fn sub_pages_are_written_as_l2s_table_says() {
    for flags in [0, 1 << 6] {
        agree(move |g| async move {
            let eptp = EPT | flags | 3 << 3 | 6;
            let controls = control(SECONDARY_VM_EXEC_CONTROL, 1 << 23, 0);
            hypervisor(&g, &[controls, (EPT_POINTER, eptp), (SUB_PAGE_PERMISSION_TABLE_POINTER, SPP)]).await;
            build_sub_pages(&g, SPP, 1 | 1 << 6);
            g.poke(entry(PAGE), PAGE | 1 << 61 | 0x30 | 5);
            launch(&g).await;
            let attempts =
                [(0, None), (8, None), (128, Some(48)), (3 * 128 + 8, None), (31 * 128, Some(48)), (0, None)];
            for round in 0..3 {
                for (offset, exit) in attempts {
                    g.run(Op::Write(PAGE + offset, round + offset)).await;
                    g.see((round, offset));
                    assert_eq!(exit.is_some(), g.level() == Level::L2, "{round} {offset:#x}");
                    if exit.is_some() {
                        g.note(format!("{:x?}", told(&g).await));
                        assert_eq!(g.vmread(VM_EXIT_REASON).await, exit);
                        g.run(Op::Vmresume).await;
                    } else {
                        assert_eq!(g.peek(PAGE + offset), round + offset);
                    }
                }
                // After an INVEPT, and after a read.
                leave(&g).await;
                g.run(Op::Invept(1, eptp)).await;
                g.run(Op::Vmresume).await;
                g.run(Op::Read(PAGE)).await;
            }
            // Each table is taken away and made wrong, and comes back without INVEPT.
            for level in 0..4 {
                let place = SPP + 0x1000 * level + if level == 3 { (PAGE >> 12) * 8 } else { 0 };
                let good = g.peek(place);
                for (bad, qualification) in [(0, 1 << 11), (good | 2, 0), (1 << 63 | good, 0)] {
                    if level == 3 && bad == 0 {
                        continue;
                    }
                    leave(&g).await;
                    g.poke(place, bad);
                    g.run(Op::Invept(2, 0)).await;
                    g.run(Op::Vmresume).await;
                    g.run(Op::Write(PAGE, level)).await;
                    look(&g, &format!("table {level}: {bad:#x}")).await;
                    assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(66));
                    assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(qualification));
                    assert_eq!(g.vmread(GUEST_PHYSICAL_ADDRESS).await, Some(PAGE));
                    g.poke(place, good);
                    g.run(Op::Vmresume).await;
                    g.run(Op::Write(PAGE, bad)).await;
                    assert_eq!((g.level(), g.peek(PAGE)), (Level::L3, bad));
                }
            }
            g.run(Op::Read(PAGE)).await;
        });
    }
}

#[test]
fn tables_of_sub_pages_in_nvmxs_memory_are_wrong() {
    for setup in Setup::all() {
        for level in 0..4 {
            let mut world = World::new(setup);
            let end = world.boot(move |g| async move {
                let controls = control(SECONDARY_VM_EXEC_CONTROL, 1 << 23, 0);
                hypervisor(&g, &[controls, (SUB_PAGE_PERMISSION_TABLE_POINTER, SPP)]).await;
                build_sub_pages(&g, SPP, 1);
                if level == 0 {
                    write(&g, &[(SUB_PAGE_PERMISSION_TABLE_POINTER, OWN.start())]).await;
                } else {
                    g.poke(SPP + 0x1000 * (level - 1), OWN.start() | 1);
                }
                g.poke(entry(PAGE), PAGE | 1 << 61 | 0x30 | 1);
                launch(&g).await;
                g.run(Op::Write(PAGE, 1)).await;
                assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(66)), "level {level}");
                assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(0), "all ones is not valid");
            });
            assert!(matches!(end, End::Over), "{end:?}");
        }
    }
}

#[test]
fn each_guest_and_each_listed_ept_has_its_own_sub_pages() {
    agree(|g| async move {
        const LIST: u64 = 0x2_6000;
        const SECOND: u64 = 0x21_0000;
        const OTHER_SPP: u64 = 0x25_0000;
        let controls = control(SECONDARY_VM_EXEC_CONTROL, 1 << 23 | 1 << 13, 0);
        let all =
            [controls, (VM_FUNCTION_CONTROLS, 1), (EPTP_LIST_ADDRESS, LIST), (SUB_PAGE_PERMISSION_TABLE_POINTER, SPP)];
        hypervisor(&g, &all).await;
        (0..3).for_each(|level| g.poke(SECOND + 0x1000 * level, (SECOND + 0x1000 * (level + 1)) | 7));
        (0..512).for_each(|n| g.poke(SECOND + 0x3000 + 8 * n, n << 12 | 0x37));
        g.poke(LIST, EPT | 3 << 3 | 6);
        g.poke(LIST + 8, SECOND | 3 << 3 | 6);
        build_sub_pages(&g, SPP, 1);
        build_sub_pages(&g, OTHER_SPP, 1 << 2);
        for table in [EPT, SECOND] {
            g.poke(table + 0x3000 + (PAGE >> 12) * 8, PAGE | 1 << 61 | 0x30 | 1);
        }
        launch(&g).await;
        for spptp in [SPP, OTHER_SPP, SPP, OTHER_SPP] {
            for index in [1, 0, 1] {
                g.run(Op::Vmfunc(0, index)).await;
                for offset in [0, 128] {
                    g.run(Op::Write(PAGE + offset, spptp + u64::from(index))).await;
                    g.see((spptp, index, offset));
                    let allowed = (spptp == SPP) == (offset == 0);
                    assert_eq!(g.level() == Level::L3, allowed, "{spptp:#x} {index} {offset}");
                    if !allowed {
                        look(&g, "refused").await;
                        g.run(Op::Vmresume).await;
                    }
                }
            }
            leave(&g).await;
            let next = if spptp == SPP { OTHER_SPP } else { SPP };
            write(&g, &[(SUB_PAGE_PERMISSION_TABLE_POINTER, next)]).await;
            g.run(Op::Invept(2, 0)).await;
            g.run(Op::Vmresume).await;
        }
    });
}

#[test]
fn accesses_are_logged_and_a_full_log_is_told() {
    // The model keeps no log itself: what nvmx writes is judged here.
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(|g| async move {
            hypervisor(
                &g,
                &[
                    control(SECONDARY_VM_EXEC_CONTROL, 1 << 17, 0),
                    (EPT_POINTER, EPT | 3 << 3 | 6 | 1 << 6),
                    (PML_ADDRESS, 0x2_3000),
                    (PML_INDEX, 1),
                ],
            )
            .await;
            launch(&g).await;
            for page in 0..2 {
                g.run(Op::Write(PAGE + (page << 12), 1)).await;
                assert_eq!(g.level(), Level::L3);
                assert_eq!(g.peek(0x2_3000 + 8 * (1 - page)), PAGE + (page << 12));
                assert_eq!(g.peek(entry(PAGE + (page << 12))) & 0x300, 0x300, "accessed and dirty");
            }
            g.run(Op::Write(PAGE + 0x2000, 1)).await;
            assert_eq!(g.level(), Level::L2, "the log is full");
            assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(62));
            assert_eq!(g.vmread(PML_INDEX).await, Some(0xFFFF));
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn a_convertible_violation_becomes_a_virtualization_exception() {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(|g| async move {
            const AREA: u64 = 0x2_4000;
            hypervisor(&g, &[control(SECONDARY_VM_EXEC_CONTROL, 1 << 18, 0), (VIRTUALIZATION_EXCEPTION_INFO, AREA)])
                .await;
            g.poke(entry(PAGE), 0);
            launch(&g).await;
            g.core().delivered.clear();
            g.run(Op::Read(PAGE)).await;
            assert_eq!(g.level(), Level::L3);
            assert_eq!(g.core().delivered.iter().map(|e| e.info).collect::<Vec<_>>(), [0x314]);
            assert_eq!((g.peek(AREA), g.peek(AREA + 24)), (48 | 0xFFFF_FFFF << 32, PAGE));
            // The area is in use: an exit.
            g.run(Op::Read(PAGE)).await;
            assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(48)));
            // Free again, and L2 wants the exception.
            g.poke(AREA, 0);
            write(&g, &[(EXCEPTION_BITMAP, 1 << 20)]).await;
            g.run(Op::Vmresume).await;
            g.run(Op::Read(PAGE)).await;
            assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(0)));
            assert_eq!(g.vmread(VM_EXIT_INTR_INFO).await, Some(0x8000_0314));
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn a_shadow_vmcs_is_reached_as_the_bitmaps_say() {
    for setup in Setup::all().into_iter().filter(nvmx_machine::world::shadows) {
        nvmx_machine::world::agree_on(setup, |g| async move {
            with_shadow_vmcs(&g, &[0x681E, 0x6C16, 0x4402, 0x7FFE], &[]).await;
            launch(&g).await;
            for op in [
                Op::Vmwrite(0x681E, 0x1111),
                Op::Vmread(0x681E),
                Op::Vmwrite(0x6C16, 0x2222),
                Op::Vmread(0x6C16),
                Op::Vmread(0x6802),
                Op::Vmwrite(0x6802, 1),
                Op::Vmread(1 << 20),
            ] {
                let outcome = g.run(op).await;
                g.see((op, outcome));
                if g.level() == Level::L2 {
                    look(&g, "out").await;
                    g.run(Op::Vmresume).await;
                }
            }
            leave(&g).await;
            // L2 reads what L3 wrote.
            g.run(Op::Vmptrld(OTHER)).await;
            assert_eq!(g.vmread(GUEST_RIP).await, Some(0x1111));
            assert_eq!(g.vmread(HOST_RIP).await, Some(0x2222));
            g.run(Op::Vmlaunch).await;
            assert_eq!(g.flags(), 1, "a shadow VMCS enters nothing");
            // Without a link there is nothing to reach.
            g.run(Op::Vmptrld(VMCS)).await;
            write(&g, &[(VMCS_LINK_POINTER, u64::MAX)]).await;
            g.run(Op::Vmresume).await;
            g.run(Op::Vmread(0x681E)).await;
            g.see("no link");
        });
    }
}
