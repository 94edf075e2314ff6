//! Entries, exits and what state takes part in them: launch, failure early and late, inheritance of what is neither loaded nor
//! saved, MSR areas, the preemption timer.

use crate::kit::*;
use nvmx_machine::Setup;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::{Exit, Level};
use nvmx_machine::world::{agree, agree_on};

const AREA: u64 = 0x2_5000;

fn area(g: &Guest, entries: &[(u64, u64)]) {
    for (i, (index, value)) in (0..).zip(entries) {
        g.poke(AREA + 16 * i, *index);
        g.poke(AREA + 16 * i + 8, *value);
    }
}

/// An entry that fails as an instruction: the state is as before, the error says why.
async fn refused(g: &Guest, changes: &[(Field, u64)], error: u64) {
    write(g, changes).await;
    let before = g.get(GUEST_RSP);
    g.run(Op::Vmlaunch).await;
    assert_eq!((g.level(), g.flags(), g.error().await), (Level::L2, 1 << 6, error), "{changes:x?}");
    assert_eq!(g.get(GUEST_RSP), before);
    g.see(changes);
    let good: Vec<_> = valid().into_iter().filter(|(f, _)| changes.iter().any(|(c, _)| c == f)).collect();
    write(g, &good).await;
}

#[test]
fn controls_and_host_state_that_break_a_rule_fail_the_instruction() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        for (field, value) in [
            // In nvmx's copy, and in vmcs02.
            (PIN_BASED_VM_EXEC_CONTROL, 0),
            (CPU_BASED_VM_EXEC_CONTROL, u64::from(u32::MAX)),
            (SECONDARY_VM_EXEC_CONTROL, 1 << 31),
            (VM_EXIT_CONTROLS, 0),
            (VM_ENTRY_CONTROLS, 0xFFFF_FFFF),
            (CR3_TARGET_COUNT, 5),
            (VM_ENTRY_INTR_INFO_FIELD, 0x8000_0100),
            (VM_ENTRY_INTR_INFO_FIELD, 0x8000_0B06),
            (EPT_POINTER, 7),
            (VIRTUAL_PROCESSOR_ID, 0),
        ] {
            refused(&g, &[(field, value)], 7).await;
        }
        for (field, value) in [
            (HOST_CR0, 0),
            (HOST_CR4, 0),
            (HOST_CR3, 1 << 40),
            (HOST_CS_SELECTOR, 0),
            (HOST_TR_SELECTOR, 7),
            (HOST_RIP, 1 << 47),
            (HOST_IA32_EFER, 0),
            (HOST_IA32_PAT, 2),
            (HOST_FS_BASE, 1 << 60),
        ] {
            refused(&g, &[(field, value)], 8).await;
        }
        // A control in vmcs02 comes before host state.
        refused(&g, &[(HOST_RIP, 1 << 47), (CR3_TARGET_COUNT, 5)], 7).await;
        // An entry that was refused leaves nothing behind.
        launch(&g).await;
        g.see("entered");
    });
}

#[test]
fn guest_state_that_breaks_a_rule_is_an_exit_that_saves_nothing() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        for (changes, qualification) in [
            (vec![(GUEST_RFLAGS, 0)], 0),
            (vec![(GUEST_CR0, 0)], 0),
            (vec![(GUEST_RIP, 1 << 48)], 0),
            (vec![(GUEST_IA32_EFER, 0)], 0),
            (vec![(GUEST_IA32_PAT, 2)], 0),
            (vec![(GUEST_DR7, 1 << 40)], 0),
            (vec![(GUEST_ACTIVITY_STATE, 5)], 0),
            (vec![(GUEST_TR_AR_BYTES, 0)], 0),
            (vec![(GUEST_INTERRUPTIBILITY_INFO, 1 << 5)], 0),
            (vec![(VMCS_LINK_POINTER, 0x1_1001)], 4),
            (vec![(VMCS_LINK_POINTER, VMCS)], 4),
            (vec![(VMCS_LINK_POINTER, OTHER)], 4),
            (vec![(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 4)], 0),
        ] {
            write(&g, &changes).await;
            g.run(Op::Vmlaunch).await;
            assert_eq!(g.level(), Level::L2, "{changes:x?}");
            assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(1 << 31 | 33), "{changes:x?}");
            assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(qualification), "{changes:x?}");
            look(&g, &format!("{changes:x?}")).await;
            let good: Vec<_> = valid().into_iter().filter(|(f, _)| changes.iter().any(|(c, _)| c == f)).collect();
            write(&g, &good).await;
        }
        launch(&g).await;
        g.see("entered");
    });
}

#[test]
fn a_failed_entry_leaves_blocking_by_nmi_as_it_was() {
    agree(|g| async move {
        hypervisor(&g, &[(GUEST_RFLAGS, 0)]).await;
        for blocking in [0, 8] {
            g.set(GUEST_INTERRUPTIBILITY_INFO, blocking);
            g.run(Op::Vmlaunch).await;
            assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO), blocking);
            g.see(blocking);
        }
    });
}

/// Every combination of loading and saving of IA32_EFER, IA32_PAT and the debug registers, with values of L2, vmcs12 and L3
/// that all differ.
#[test]
fn what_is_neither_loaded_nor_saved_stays_in_the_processor() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        for choice in 0..256u64 {
            let bit = |n: u64, to: u32| (choice >> n & 1) << to;
            let exit = bit(0, 2) | bit(1, 18) | bit(2, 19) | bit(3, 20) | bit(4, 21);
            let entry = bit(5, 2) | bit(6, 14) | bit(7, 15);
            write(
                &g,
                &[
                    control(VM_EXIT_CONTROLS, exit, 1 << 2 | 15 << 18),
                    control(VM_ENTRY_CONTROLS, entry, 1 << 2 | 1 << 14 | 1 << 15),
                    (GUEST_IA32_EFER, 0xD01),
                    (GUEST_IA32_PAT, 0x0606),
                    (GUEST_DR7, 0x401),
                    (GUEST_IA32_DEBUGCTL, 1),
                    (HOST_IA32_EFER, 0x500),
                    (HOST_IA32_PAT, 0x0505),
                ],
            )
            .await;
            g.run(Op::Wrmsr(0x277, 0x0404)).await;
            g.run(Op::Wrmsr(0xC000_0080, 0xD00)).await;
            g.set(GUEST_DR7, 0x402);
            let op = if choice == 0 { Op::Vmlaunch } else { Op::Vmresume };
            assert_eq!(g.run(op).await, Outcome::Left, "{choice:#x}");
            g.see(("in the guest", choice));
            if choice % 3 == 0 {
                g.run(Op::Wrmsr(0x277, 0x0101)).await;
                g.set(GUEST_DR7, 0x403);
            }
            if g.level() == Level::L3 {
                leave(&g).await;
            }
            look(&g, &format!("behind {choice:#x}")).await;
        }
    });
}

#[test]
fn an_unrestricted_guest_changes_its_mode_by_itself() {
    agree(|g| async move {
        let fields = [control(SECONDARY_VM_EXEC_CONTROL, 1 << 7, 0), control(VM_EXIT_CONTROLS, 1 << 20, 0)];
        hypervisor(&g, &fields).await;
        launch(&g).await;
        // It leaves IA-32e mode.
        g.set(GUEST_CR0, 0x31);
        g.set(GUEST_IA32_EFER, 0x901);
        g.set(GUEST_CS_AR_BYTES, 0xC09B);
        leave(&g).await;
        look(&g, "without paging").await;
        assert_eq!(g.vmread(VM_ENTRY_CONTROLS).await.map(|v| v >> 9 & 1), Some(0));
        let outcome = g.run(Op::Vmresume).await;
        assert_eq!(outcome, Outcome::Left, "{:x?} {:x?}", g.error().await, exit_information(&g).await);
        g.see("again");
        g.set(GUEST_CR0, 0x8001_0031);
        g.set(GUEST_IA32_EFER, 0xD01);
        g.set(GUEST_CS_AR_BYTES, 0xA09B);
        leave(&g).await;
        look(&g, "with paging").await;
        assert_eq!(g.vmread(VM_ENTRY_CONTROLS).await.map(|v| v >> 9 & 1), Some(1));
    });
}

#[test]
fn msr_areas_are_loaded_and_stored() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        area(&g, &[(0xC000_0081, 0x11), (0x277, 0x0606), (0xC000_0102, 0x22), (0xC000_0082, 0x33)]);
        write(&g, &[(VM_ENTRY_MSR_LOAD_ADDR, AREA), (VM_ENTRY_MSR_LOAD_COUNT, 3)]).await;
        launch(&g).await;
        g.see("loaded");
        g.run(Op::Wrmsr(0xC000_0081, 0x77)).await;
        if g.level() == Level::L3 {
            leave(&g).await;
        }
        // The exit loads another value, and stores what the guest had.
        write(
            &g,
            &[
                (VM_EXIT_MSR_LOAD_ADDR, AREA + 0x30),
                (VM_EXIT_MSR_LOAD_COUNT, 1),
                (VM_EXIT_MSR_STORE_ADDR, AREA + 0x100),
                (VM_EXIT_MSR_STORE_COUNT, 8),
            ],
        )
        .await;
        // Passed, switched, and answered ones.
        for (i, index) in (0..).zip([0xC000_0081u64, 0x277, 0xC000_0080, 0x174, 0xC000_0100, 0x1D9, 0xC000_0102, 0x480])
        {
            g.poke(AREA + 0x100 + 16 * i, index);
        }
        g.run(Op::Vmresume).await;
        leave(&g).await;
        look(&g, "stored").await;
        for i in 0..8 {
            g.note(format!("{i}: {:#x}", g.peek(AREA + 0x100 + 16 * i + 8)));
        }
        // Further exits of nvmx's own do not load the entry's area again: L3's pages fault in one by one.
        g.run(Op::Vmresume).await;
        g.run(Op::Wrmsr(0xC000_0102, 0x44)).await;
        if g.level() == Level::L3 {
            for page in 0..8 {
                g.run(Op::Write(0x4_0000 + (page << 12), page)).await;
            }
            g.see("not loaded again");
        }
    });
}

#[test]
fn an_entry_whose_msr_area_fails_tells_the_number_of_the_entry() {
    agree(|g| async move {
        hypervisor(&g, &[(VM_ENTRY_MSR_LOAD_ADDR, AREA), (VM_ENTRY_MSR_LOAD_COUNT, 3)]).await;
        for (number, entries) in [
            (1, [(0xC000_0100, 1), (0, 0), (0, 0)]),
            (1, [(1 << 32, 1), (0, 0), (0, 0)]),
            (2, [(0xC000_0081, 0x55), (0x277, 2), (0, 0)]),
            (2, [(0x277, 0x0606), (0x801, 0), (0, 0)]),
            (3, [(0x277, 0x0404), (0xC000_0080, 0xD00), (0xC000_0082, 1 << 47)]),
            // What nvmx does not let a guest write.
            (3, [(0xC000_0081, 1), (0xC000_0081, 2), (0x480, 0)]),
        ] {
            area(&g, &entries);
            for load in [0, 1] {
                write(&g, &[control(VM_EXIT_CONTROLS, load << 19 | load << 21, 1 << 19 | 1 << 21)]).await;
                g.run(Op::Vmlaunch).await;
                assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(1 << 31 | 34), "{entries:x?}");
                assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(number), "{entries:x?}");
                look(&g, &format!("{entries:x?} {load}")).await;
            }
        }
    });
}

#[test]
fn an_entry_that_fails_late_loads_the_msrs_of_the_exit() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        area(&g, &[(0x277, 0x0606), (0xC000_0081, 0x1111), (0x480, 0)]);
        let counts = [(VM_EXIT_MSR_LOAD_ADDR, AREA), (VM_EXIT_MSR_LOAD_COUNT, 2)];
        for late in [(GUEST_RFLAGS, 0), (VM_ENTRY_MSR_LOAD_COUNT, 3)] {
            write(&g, &counts).await;
            write(&g, &[(VM_ENTRY_MSR_LOAD_ADDR, AREA), late]).await;
            g.run(Op::Wrmsr(0x277, 0x0007_0406_0007_0406)).await;
            g.run(Op::Wrmsr(0xC000_0081, 0)).await;
            g.run(Op::Vmlaunch).await;
            g.see(late);
            assert_eq!((g.level(), g.get(GUEST_IA32_PAT)), (Level::L2, 0x0606), "{late:x?}");
            write(&g, &[(GUEST_RFLAGS, 2), (VM_ENTRY_MSR_LOAD_COUNT, 0)]).await;
        }
    });
}

#[test]
fn a_timer_of_zero_fires_before_anything_else_and_a_saved_one_is_read_back() {
    agree(|g| async move {
        hypervisor(&g, &[control(PIN_BASED_VM_EXEC_CONTROL, 1 << 6, 0), (VMX_PREEMPTION_TIMER_VALUE, 0)]).await;
        g.run(Op::Vmlaunch).await;
        look(&g, "fired").await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(52));
        for save in [0, 1 << 22] {
            write(&g, &[control(VM_EXIT_CONTROLS, save, 1 << 22), (VMX_PREEMPTION_TIMER_VALUE, 0x1000)]).await;
            g.run(Op::Vmresume).await;
            g.set(VMX_PREEMPTION_TIMER_VALUE, 0x800);
            leave(&g).await;
            g.note(format!("{:x?}", g.vmread(VMX_PREEMPTION_TIMER_VALUE).await));
        }
    });
}

#[test]
fn a_host_outside_of_64_bit_mode_gets_its_pdptes() {
    // L2 in PAE paging: nvmx enters it with a host of 32 bits.
    agree(|g| async move {
        g.poke(0x6000, 0x7001);
        (1..4).for_each(|n| g.poke(0x6000 + 8 * n, 0));
        (0..8).for_each(|n| g.poke(0x7000 + 8 * n, n << 21 | 0xE3));
        build_ept(&g);
        vmxon(&g).await;
        make_current(&g, VMCS).await;
        write(&g, &valid()).await;
        // The same guest outside of IA-32e mode, with PDPTEs in its fields.
        write(
            &g,
            &[
                control(VM_ENTRY_CONTROLS, 0, 1 << 9),
                (GUEST_IA32_EFER, 0),
                (GUEST_CS_AR_BYTES, 0xC09B),
                (GUEST_CR3, 0x6000),
                (GUEST_PDPTE0, 0x7001),
                (GUEST_RIP, 0x40_0000),
            ],
        )
        .await;
        launch(&g).await;
        g.see("in PAE paging");
        leave(&g).await;
        look(&g, "out").await;
        write(&g, &[(GUEST_PDPTE1, 0x7007)]).await;
        g.run(Op::Vmresume).await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(1 << 31 | 33));
        assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(2));
    });
}

#[test]
fn a_guest_without_ept_of_l2_loads_its_pdptes_from_memory() {
    agree(|g| async move {
        g.poke(0x6000, 0x7001);
        (1..4).for_each(|n| g.poke(0x6000 + 8 * n, 0));
        hypervisor(
            &g,
            &[
                control(SECONDARY_VM_EXEC_CONTROL, 0, 1 << 1),
                control(VM_ENTRY_CONTROLS, 0, 1 << 9),
                (GUEST_IA32_EFER, 0),
                (GUEST_CS_AR_BYTES, 0xC09B),
                (GUEST_CR3, 0x6000),
            ],
        )
        .await;
        launch(&g).await;
        g.see("entered");
        g.run(Op::Write(0x3_0000, 77)).await;
        g.run(Op::Read(0x3_0000)).await;
        leave(&g).await;
        look(&g, "out").await;
        g.poke(0x6008, 0x7007);
        g.run(Op::Vmresume).await;
        look(&g, "a PDPTE with reserved bits").await;
        assert_eq!(g.vmread(EXIT_QUALIFICATION).await, Some(2));
        g.poke(0x6008, 0);
        // Controls are judged before that.
        write(&g, &[(CR3_TARGET_COUNT, 5)]).await;
        g.run(Op::Vmresume).await;
        assert_eq!(g.error().await, 7);
        write(&g, &[(CR3_TARGET_COUNT, 0)]).await;
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
        g.see("good again");
    });
}

#[test]
fn an_exit_by_a_triple_fault_of_l3_is_l2s() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        g.exit(Exit::new(2)).await;
        look(&g, "triple fault").await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(2));
    });
}

/// SDM vol. 3C, "Loading Guest State", "Saving Guest State", "Loading Host State".
#[test]
fn the_counters_that_run_are_switched_as_each_of_three_controls_says() {
    const MSR: u32 = 0x38F;
    const OF_L2: u64 = 1;
    const OF_L3: u64 = 1 << 32 | 2;
    const WRITTEN: u64 = 3 << 32;
    const AFTERWARDS: u64 = 1 << 34 | 8;
    let setup = Setup::all()[0];
    assert!(nvmx_machine::world::as_l2_sees(&setup).counters != 0, "the machine counts");
    agree_on(setup, |g| async move {
        for combination in 0..8u64 {
            let on = |n: u64| combination >> n & 1;
            let (loads, saves, loads_host) = (on(0) == 1, on(1) == 1, on(2) == 1);
            g.run(Op::Vmxoff).await;
            let controls = [
                control(VM_ENTRY_CONTROLS, on(0) << 13, 1 << 13),
                control(VM_EXIT_CONTROLS, on(1) << 30 | on(2) << 12, 1 << 30 | 1 << 12),
                control(CPU_BASED_VM_EXEC_CONTROL, 1 << 28, 0),
                (MSR_BITMAP, 0x2_0000),
                (GUEST_IA32_PERF_GLOBAL_CTRL, OF_L3),
                (HOST_IA32_PERF_GLOBAL_CTRL, AFTERWARDS),
            ];
            hypervisor(&g, &controls).await;
            g.run(Op::Wrmsr(MSR, OF_L2)).await;
            let (mut now, mut field) = (OF_L2, OF_L3);
            for round in 0..3 {
                g.run(if round == 0 { Op::Vmlaunch } else { Op::Vmresume }).await;
                now = if loads { field } else { now };
                g.run(Op::Rdmsr(MSR)).await;
                assert_eq!(g.gpr(0) | g.gpr(2) << 32, now, "{combination}: in L3, round {round}");
                if round == 1 {
                    g.run(Op::Wrmsr(MSR, WRITTEN)).await;
                    now = WRITTEN;
                    // A bit without a counter faults.
                    assert!(matches!(g.run(Op::Wrmsr(MSR, 1 << 20)).await, Outcome::Event(_)));
                }
                // An exit that L2 does not see changes nothing.
                g.run(Op::Write(0x4_0000 + (round << 12), 1)).await;
                leave(&g).await;
                field = if saves { now } else { field };
                now = if loads_host { AFTERWARDS } else { now };
                assert_eq!(
                    g.vmread(GUEST_IA32_PERF_GLOBAL_CTRL).await,
                    Some(field),
                    "{combination}: saved, round {round}"
                );
                g.run(Op::Rdmsr(MSR)).await;
                assert_eq!(g.gpr(0) | g.gpr(2) << 32, now, "{combination}: in L2, round {round}");
                look(&g, "out").await;
            }
        }
    });
}
