//! Events: injection, exits during delivery, windows, NMIs that arrive while nvmx runs, INIT and SIPI.

use crate::kit::*;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::{Delivered, Exit, Level};
use nvmx_machine::world::agree;

const NMI: u32 = 0x202;

fn delivered(g: &Guest) -> Vec<Delivered> {
    std::mem::take(&mut g.core().delivered)
}

#[test]
fn every_kind_of_event_is_injected_once() {
    agree(|g| async move {
        hypervisor(&g, &[(GUEST_RFLAGS, 0x202)]).await;
        for (i, (info, error, length)) in [
            (0x8000_0020, 0, 0),
            (0x8000_0202, 0, 0),
            (0x8000_0306, 0, 0),
            (0x8000_0B0D, 0x18, 0),
            (0x8000_0B0E, 6, 0),
            (0x8000_0480, 0, 2),
            (0x8000_0501, 0, 1),
            (0x8000_0603, 0, 1),
        ]
        .into_iter()
        .enumerate()
        {
            write(
                &g,
                &[
                    (VM_ENTRY_INTR_INFO_FIELD, info),
                    (VM_ENTRY_EXCEPTION_ERROR_CODE, error),
                    (VM_ENTRY_INSTRUCTION_LEN, length),
                    (GUEST_INTERRUPTIBILITY_INFO, 0),
                ],
            )
            .await;
            delivered(&g);
            assert_eq!(g.run(if i == 0 { Op::Vmlaunch } else { Op::Vmresume }).await, Outcome::Left);
            g.see(info);
            assert_eq!(delivered(&g).len(), 1, "{info:#x}");
            // Violations that L2 does not see do not bring it again.
            for page in 0..4 {
                g.run(Op::Write(0x4_0000 + (page << 12) + ((i as u64) << 15), 1)).await;
            }
            assert_eq!(delivered(&g), []);
            leave(&g).await;
            look(&g, "out").await;
        }
    });
}

#[test]
fn an_event_whose_delivery_a_hidden_exit_hits_is_delivered_again() {
    everywhere(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        for (n, (vectoring, error, length)) in
            [(0x8000_0B0E, 2, 0), (0x8000_0202, 0, 0), (0x8000_0480, 0, 2), (0x8000_0055, 0, 0)].into_iter().enumerate()
        {
            g.set(GUEST_RFLAGS, 0x202);
            g.set(GUEST_INTERRUPTIBILITY_INFO, if vectoring & 0x700 == 0x200 { 8 } else { 0 });
            let at = 0x6_0000 + ((n as u64) << 12);
            delivered(&g);
            let exit = Exit {
                qualification: 2 | 3 << 7,
                physical: at,
                linear: at,
                vectoring,
                vectoring_error: error,
                length,
                ..Exit::new(48)
            };
            g.exit(exit).await;
            let events = delivered(&g);
            assert_eq!(g.level(), Level::L3);
            assert_eq!(events.len(), 1, "{vectoring:#x}");
            assert_eq!(events[0].info, vectoring & 0xFFF, "{vectoring:#x}");
            assert_eq!(events[0].error, (vectoring >> 11 & 1 == 1).then_some(error));
            // NMIs are blocked by its own delivery.
            assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO) & 8 != 0, vectoring & 0x700 == 0x200);
        }
        // And L2 finds its own fields as it left them.
        leave(&g).await;
        assert_eq!(g.vmread(VM_ENTRY_INTR_INFO_FIELD).await, Some(0));
        assert_eq!(g.vmread(VM_ENTRY_INSTRUCTION_LEN).await, Some(0));
    });
}

#[test]
fn an_iret_that_faults_in_ept02_blocks_nmis_again() {
    everywhere(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        let at = 0x6_0000;
        g.exit(Exit { qualification: 1 | 3 << 7 | 1 << 12, physical: at, linear: at, ..Exit::new(48) }).await;
        assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO), 8);
        leave(&g).await;
        // Without virtual NMIs an IRET of L3 does not unblock those that exit to L2.
        write(&g, &[control(PIN_BASED_VM_EXEC_CONTROL, 1 << 3, 0), (GUEST_INTERRUPTIBILITY_INFO, 0)]).await;
        g.run(Op::Vmresume).await;
        g.exit(Exit { qualification: 1 | 3 << 7 | 1 << 12, physical: at + 0x1000, ..Exit::new(48) }).await;
        assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO), 0);
    });
}

#[test]
fn an_event_that_ept12_stops_is_told_to_l2() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        // Nothing there.
        g.poke(EPT + 0x3000 + 8 * 0x60, 0);
        launch(&g).await;
        let exit = Exit {
            qualification: 1 | 3 << 7,
            physical: 0x6_0000,
            linear: 0x6_0000,
            vectoring: 0x8000_0B0D,
            vectoring_error: 0x18,
            ..Exit::new(48)
        };
        g.exit(exit).await;
        look(&g, "told").await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(48));
        assert_eq!(g.vmread(IDT_VECTORING_INFO_FIELD).await, Some(0x8000_0B0D));
        assert_eq!(g.vmread(IDT_VECTORING_ERROR_CODE).await, Some(0x18));
    });
}

#[test]
fn windows_open_when_the_guest_can_take_the_event() {
    agree(|g| async move {
        hypervisor(
            &g,
            &[control(CPU_BASED_VM_EXEC_CONTROL, 1 << 2, 0), control(PIN_BASED_VM_EXEC_CONTROL, 1 << 3 | 1 << 5, 0)],
        )
        .await;
        launch(&g).await;
        g.see("IF is 0");
        leave(&g).await;
        write(&g, &[(GUEST_RFLAGS, 0x202)]).await;
        g.run(Op::Vmresume).await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(7));
        write(&g, &[(GUEST_INTERRUPTIBILITY_INFO, 1)]).await;
        g.run(Op::Vmresume).await;
        assert_eq!(g.level(), Level::L3, "blocked by STI");
        leave(&g).await;
        // The NMI window, with virtual NMIs.
        write(&g, &[control(CPU_BASED_VM_EXEC_CONTROL, 1 << 22, 0), (GUEST_INTERRUPTIBILITY_INFO, 8)]).await;
        g.run(Op::Vmresume).await;
        assert_eq!(g.level(), Level::L3, "blocked by NMI");
        leave(&g).await;
        write(&g, &[(GUEST_INTERRUPTIBILITY_INFO, 0)]).await;
        g.run(Op::Vmresume).await;
        look(&g, "NMI window").await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(8));
        // A pending monitor trap comes before the window.
        write(&g, &[(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0700)]).await;
        g.run(Op::Vmresume).await;
        look(&g, "trap").await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(37));
    });
}

#[test]
fn under_the_monitor_trap_flag_each_instruction_exits() {
    agree(|g| async move {
        hypervisor(&g, &[control(CPU_BASED_VM_EXEC_CONTROL, 1 << 27 | 1 << 28, 0), (MSR_BITMAP, 0x2_0000)]).await;
        launch(&g).await;
        // By the processor, and those that nvmx completes.
        for op in [Op::Clts, Op::Wrmsr(0x277, 0x0606), Op::Rdmsr(0x480), Op::Wrmsr(0x277, 2), Op::Read(0x3_0000)] {
            let outcome = g.run(op).await;
            g.see((op, outcome));
            if g.level() == Level::L2 {
                look(&g, "out").await;
                g.run(Op::Vmresume).await;
            }
        }
    });
}

#[test]
fn exceptions_go_to_l2_by_bitmap_mask_and_match() {
    agree(|g| async move {
        hypervisor(&g, &[(PAGE_FAULT_ERROR_CODE_MASK, 3), (PAGE_FAULT_ERROR_CODE_MATCH, 2)]).await;
        launch(&g).await;
        for bitmap in [0, 1 << 14, 1 << 13, 1 << 6 | 1 << 3] {
            for op in [
                Op::Raise(6, None),
                Op::Raise(3, None),
                Op::Raise(13, Some(0)),
                Op::Raise(14, Some(0)),
                Op::Raise(14, Some(2)),
                // nvmx refuses these itself.
                Op::Wrmsr(0x480, 0),
                Op::Wrmsr(0x277, 2),
                Op::Vmfunc(0, 0),
            ] {
                let outcome = g.run(op).await;
                g.see((bitmap, op, outcome));
                if g.level() == Level::L2 {
                    look(&g, "out").await;
                    g.run(Op::Vmresume).await;
                }
            }
            leave(&g).await;
            write(&g, &[(EXCEPTION_BITMAP, bitmap)]).await;
            g.run(Op::Vmresume).await;
        }
    });
}

#[test]
fn an_nmi_that_arrives_in_nvmx_reaches_l2_when_it_can_take_it() {
    everywhere(|g| async move {
        // L2 in VMX root operation.
        g.nmi_at_next_exit();
        delivered(&g);
        g.run(Op::Cpuid).await;
        assert_eq!(delivered(&g).iter().map(|e| e.info).collect::<Vec<_>>(), [NMI]);
        assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO), 8);
        // Blocked: it waits until an IRET.
        g.nmi_at_next_exit();
        g.run(Op::Cpuid).await;
        assert_eq!(delivered(&g), []);
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        g.exit(Exit::new(8)).await;
        assert_eq!(delivered(&g).iter().map(|e| e.info).collect::<Vec<_>>(), [NMI]);
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        g.run(Op::Cpuid).await;
        assert_eq!(delivered(&g), [], "one NMI is one");
    });
}

#[test]
fn an_nmi_in_nvmx_while_l3_runs_is_its_own_or_an_exit() {
    everywhere(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        // L3 takes its own NMIs.
        g.nmi_at_next_exit();
        delivered(&g);
        g.run(Op::Write(0x6_0000, 1)).await;
        assert_eq!(g.level(), Level::L3);
        assert_eq!(delivered(&g).iter().map(|e| e.info).collect::<Vec<_>>(), [NMI]);
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        leave(&g).await;
        assert_eq!(g.vmread(VM_ENTRY_INTR_INFO_FIELD).await, Some(0), "L2's field");
        let pin = g.vmread(PIN_BASED_VM_EXEC_CONTROL).await;
        assert_eq!(pin.map(|pin| pin & 0x28), Some(0));

        // L2 wants them.
        for (pin, blocking, comes) in [
            (1 << 3, 0, true),
            (1 << 3, 1, true),
            (1 << 3, 8, false),
            (1 << 3 | 1 << 5, 0, true),
            (1 << 3 | 1 << 5, 8, true),
        ] {
            let fields = [
                control(PIN_BASED_VM_EXEC_CONTROL, pin, 0),
                (GUEST_INTERRUPTIBILITY_INFO, blocking),
                (GUEST_RFLAGS, 0x202),
            ];
            write(&g, &fields).await;
            g.nmi_at_next_exit();
            g.run(Op::Vmresume).await;
            if g.level() == Level::L3 && comes {
                // The processor stops it after the instruction that STI covers.
                g.run(Op::Clts).await;
            }
            if comes {
                assert_eq!(g.level(), Level::L2, "{pin:#x} {blocking}");
                assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(0));
                assert_eq!(g.vmread(VM_EXIT_INTR_INFO).await, Some(0x8000_0202));
                assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO), 8, "blocked behind an exit by an NMI");
                assert_eq!(g.vmread(GUEST_ACTIVITY_STATE).await, Some(0));
                g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
            } else {
                assert_eq!(g.level(), Level::L3);
                g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
                // The next entry of nvmx brings it.
                g.run(Op::Write(0x7_0000, 1)).await;
                assert_eq!(g.level(), Level::L2);
                g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
            }
        }
    });
}

#[test]
fn an_nmi_behind_an_injected_event_comes_behind_its_delivery() {
    everywhere(|g| async move {
        hypervisor(&g, &[control(PIN_BASED_VM_EXEC_CONTROL, 1 << 3, 0)]).await;
        write(&g, &[(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0B0D), (VM_ENTRY_EXCEPTION_ERROR_CODE, 8)]).await;
        g.nmi_at_next_exit();
        delivered(&g);
        g.run(Op::Vmlaunch).await;
        assert_eq!(g.level(), Level::L2);
        assert_eq!(delivered(&g).iter().map(|e| e.info).collect::<Vec<_>>(), [0xB0D], "the event came first");
        assert_eq!(g.vmread(VM_EXIT_INTR_INFO).await, Some(0x8000_0202));
        // L2's controls are its own again.
        assert_eq!(g.vmread(CPU_BASED_VM_EXEC_CONTROL).await.map(|v| v >> 27 & 1), Some(0));
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        g.run(Op::Vmresume).await;
        assert_eq!(g.level(), Level::L3);
        g.run(Op::Clts).await;
        assert_eq!(g.level(), Level::L3, "no trap of nvmx's is left");
    });
}

#[test]
fn an_init_waits_for_the_end_of_vmx_operation_or_takes_l3_out() {
    everywhere(|g| async move {
        hypervisor(&g, &[]).await;
        // Blocked in VMX root operation.
        g.exit(Exit::new(3)).await;
        g.see("blocked");
        let rip = g.get(GUEST_RIP);
        g.run(Op::Vmlaunch).await;
        assert_eq!(g.level(), Level::L2, "it takes L3 out before its first instruction");
        assert_ne!(g.get(GUEST_RIP), rip);
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(3));
        // While L3 runs it is an exit like others.
        g.run(Op::Vmresume).await;
        assert_eq!(g.level(), Level::L3);
        g.exit(Exit::new(3)).await;
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(3));
        // With an event of L2's that is delivered first.
        g.exit(Exit::new(3)).await;
        write(&g, &[(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0B0D), (VM_ENTRY_EXCEPTION_ERROR_CODE, 8)]).await;
        delivered(&g);
        g.run(Op::Vmresume).await;
        assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(3)));
        // And at last VMXOFF lets it through: the processor that booted begins at the reset vector.
        g.exit(Exit::new(3)).await;
        g.run(Op::Vmxoff).await;
        assert_eq!(g.get(GUEST_RIP), 0xFFF0);
        assert_eq!((g.get(GUEST_CS_SELECTOR), g.get(GUEST_CS_BASE)), (0xF000, 0xFFFF_0000));
        assert_eq!(g.gpr(2), 0x806C1, "the signature");
        assert_eq!(g.get(GUEST_CR0) & !0x20, 0x10);
    });
}
