//! HOST_RSP is lent: L2 reads and writes it in vmcs02 while that is a shadow VMCS, and no entry runs with L2's value. The model
//! refuses each entry with another HOST_RSP than nvmx's own.

use crate::kit::*;
use l2_protocol::abi::{Counter, Strategy};
use nvmx::hw::host_area::Lent;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::Storage;
use nvmx_machine::world::{End, Setup, World, agree};

/// Writes HOST_RSP, reads it back, and runs L3 until it exits, to a handler that starts with it.
async fn round(g: &Guest, host_rsp: u64) {
    assert!(g.vmwrite(HOST_RSP, host_rsp).await);
    assert_eq!(g.vmread(HOST_RSP).await, Some(host_rsp));
    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
    leave(g).await;
    assert_eq!(g.get(GUEST_RSP), host_rsp);
    assert_eq!(g.vmread(HOST_RSP).await, Some(host_rsp), "an exit leaves it alone");
    look(g, "a round").await;
}

async fn first_rounds(g: &Guest) {
    hypervisor(g, &[(HOST_RSP, 0x7000)]).await;
    launch(g).await;
    leave(g).await;
    for n in 0..3 {
        round(g, 0x7100 + n).await;
    }
}

#[test]
fn each_value_is_the_one_that_the_handler_starts_with() {
    agree(|g| async move {
        first_rounds(&g).await;
        for value in [0, u64::MAX, 1 << 47, 0x8000_0000_0000_0001] {
            round(&g, value).await;
        }
    });
}

#[test]
fn it_goes_with_its_vmcs() {
    agree(|g| async move {
        first_rounds(&g).await;
        assert!(g.vmwrite(HOST_RSP, 0xAAAA).await);
        make_current(&g, OTHER).await;
        write(&g, &valid()).await;
        assert!(g.vmwrite(HOST_RSP, 0xBBBB).await);
        launch(&g).await;
        leave(&g).await;
        assert_eq!(g.get(GUEST_RSP), 0xBBBB);
        for n in 0..3 {
            round(&g, 0xBBB0 + n).await;
            assert!(g.vmwrite(HOST_RSP, 0xBC00 + n).await);
            g.run(Op::Vmptrld(VMCS)).await;
            assert_eq!(g.vmread(HOST_RSP).await, Some(if n == 0 { 0xAAAA } else { 0xAB00 + n - 1 }));
            round(&g, 0xAAA0 + n).await;
            assert!(g.vmwrite(HOST_RSP, 0xAB00 + n).await);
            g.run(Op::Vmptrld(OTHER)).await;
            assert_eq!(g.vmread(HOST_RSP).await, Some(0xBC00 + n));
        }
        // Many others push them out of their slots.
        for n in 0..70 {
            make_current(&g, 0x4_0000 + 0x1000 * n).await;
            assert!(g.vmwrite(HOST_RSP, n).await);
        }
        for (at, value) in [(VMCS, 0xAB02), (OTHER, 0xBC02), (0x4_0000, 0)] {
            g.run(Op::Vmptrld(at)).await;
            assert_eq!(g.vmread(HOST_RSP).await, Some(value), "{at:#x}");
        }
        g.run(Op::Vmptrld(VMCS)).await;
        round(&g, 0xCCCC).await;
    });
}

#[test]
fn it_lasts_over_vmclear_vmxoff_and_the_memory_of_l2() {
    agree(|g| async move {
        first_rounds(&g).await;
        assert!(g.vmwrite(HOST_RSP, 0x1234).await);
        g.run(Op::Vmclear(VMCS)).await;
        g.run(Op::Vmptrld(VMCS)).await;
        assert_eq!(g.vmread(HOST_RSP).await, Some(0x1234));
        assert!(g.vmwrite(HOST_RSP, 0x1235).await, "not launched");
        launch(&g).await;
        leave(&g).await;
        assert_eq!(g.get(GUEST_RSP), 0x1235);
        round(&g, 0x1236).await;
        assert!(g.vmwrite(HOST_RSP, 0x1237).await);
        g.run(Op::Vmclear(VMCS)).await;
        g.run(Op::Vmxoff).await;
        g.run(Op::Vmxon(VMXON)).await;
        make_current(&g, OTHER).await;
        write(&g, &valid()).await;
        launch(&g).await;
        leave(&g).await;
        g.run(Op::Vmptrld(VMCS)).await;
        assert_eq!(g.vmread(HOST_RSP).await, Some(0x1237));
        launch(&g).await;
        leave(&g).await;
        assert_eq!(g.get(GUEST_RSP), 0x1237);
        round(&g, 0x1238).await;
    });
}

#[test]
fn entries_that_fail_leave_what_was_written() {
    agree(|g| async move {
        first_rounds(&g).await;
        let bad = [(CR3_TARGET_COUNT, 5), (HOST_CR3, u64::MAX), (VMCS_LINK_POINTER, 1), (GUEST_RFLAGS, 0)];
        for (n, (field, value)) in (0..).zip(bad) {
            let good = g.vmread(field).await.unwrap();
            write(&g, &[(field, value), (HOST_RSP, 0x5000 + n)]).await;
            g.run(Op::Vmresume).await;
            look(&g, "refused").await;
            assert_eq!(g.vmread(HOST_RSP).await, Some(0x5000 + n), "{field}");
            write(&g, &[(field, good), (HOST_RSP, 0x6000 + n)]).await;
            round(&g, 0x6000 + n).await;
        }
    });
}

/// Exits by VMREAD and VMWRITE that nvmx has counted.
fn trapped(world: &World) -> u64 {
    [Counter::TrappedVmread, Counter::TrappedVmwrite].into_iter().map(|c| world.cpu.vmx.counters.get(c)).sum()
}

#[test]
fn the_first_write_of_a_vmcs_in_use_exits_and_no_other_does() {
    for storage in [Storage::OnChip, Storage::InMemory] {
        let setup = Setup::all().into_iter().find(|s| s.storage == storage && s.strategy == Strategy::ZeroCopy);
        let mut world = World::new(setup.expect("there is one"));
        let end = world.boot(|g| async move {
            hypervisor(&g, &[]).await;
            launch(&g).await;
            leave(&g).await;
        });
        assert!(matches!(end, End::Over));
        let mut before = trapped(&world);
        for (rounds, exits) in [(1, 1), (50, 0)] {
            let end = world.run(|g| async move {
                for n in 0..rounds {
                    round_without_a_look(&g, 0x7100 + n).await;
                }
            });
            assert!(matches!(end, End::Over));
            assert_eq!(trapped(&world) - before, exits, "{storage:?}: {rounds} rounds");
            before = trapped(&world);
        }
    }
}

async fn round_without_a_look(g: &Guest, host_rsp: u64) {
    assert!(g.vmwrite(HOST_RSP, host_rsp).await);
    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
    leave(g).await;
    assert_eq!((g.get(GUEST_RSP), g.vmread(HOST_RSP).await), (host_rsp, Some(host_rsp)));
}

/// Nothing is lent from a VMCS that could be entered.
#[test]
#[should_panic(expected = "only a shadow VMCS is lent from")]
fn an_ordinary_vmcs_is_not_lent_from() {
    let mut world = World::new(Setup::all()[0]);
    let cpu = &mut *world.cpu;
    let _ = Lent::from_shadow(&mut cpu.vmx, &cpu.phys, cpu.vmcs01, 0x1000);
}
