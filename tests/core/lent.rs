//! Fields of the host-state area are lent: L2 reads and writes them in vmcs02 while that is a shadow VMCS, and no entry runs with L2's
//! values. The model refuses each entry with another host-state area than nvmx's own.

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

/// What a thread of L2 writes before an entry; each `n` has other values, and keeps the rules.
fn thread(n: u64) -> [(Field, u64); 4] {
    [(HOST_RSP, 0x7100 + n), (HOST_CR3, 0x1000 | ((n % 4) << 3)), (HOST_FS_BASE, n << 12), (HOST_GS_BASE, !0 << 47 | n)]
}

async fn has_thread(g: &Guest, n: u64) {
    for (field, value) in thread(n) {
        assert_eq!(g.vmread(field).await, Some(value), "{field} of {n}");
    }
}

/// Another thread runs L3 until it exits.
async fn thread_round(g: &Guest, n: u64) {
    write(g, &thread(n)).await;
    has_thread(g, n).await;
    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left, "error {}", g.error().await);
    leave(g).await;
    for ((_, value), field) in thread(n).into_iter().zip([GUEST_RSP, GUEST_CR3, GUEST_FS_BASE, GUEST_GS_BASE]) {
        assert_eq!(g.get(field), value, "{field} of {n}");
    }
    has_thread(g, n).await;
}

async fn first_threads(g: &Guest) {
    first_rounds(g).await;
    for n in 0..3 {
        thread_round(g, n).await;
        look(g, "a thread").await;
    }
}

#[test]
fn each_thread_is_the_one_that_the_handler_runs_in() {
    agree(|g| async move {
        first_threads(&g).await;
        for n in [3, 3, 5, 4, 5, 0, 1 << 34] {
            thread_round(&g, n).await;
            look(&g, "a thread").await;
        }
        // For long none, and then again.
        for n in 0..40 {
            round(&g, n).await;
        }
        for n in 6..10 {
            thread_round(&g, n).await;
            look(&g, "a thread").await;
        }
    });
}

#[test]
fn a_thread_goes_with_its_vmcs_over_vmclear_vmxoff_and_the_memory_of_l2() {
    agree(|g| async move {
        first_threads(&g).await;
        write(&g, &thread(0xA)).await;
        make_current(&g, OTHER).await;
        write(&g, &valid()).await;
        write(&g, &thread(0xB)).await;
        launch(&g).await;
        leave(&g).await;
        for n in 0..3 {
            thread_round(&g, 0xB0 + n).await;
            write(&g, &thread(0xBA + n)).await;
            g.run(Op::Vmptrld(VMCS)).await;
            has_thread(&g, 0xA + n).await;
            thread_round(&g, 0xA0 + n).await;
            write(&g, &thread(0xB + n)).await;
            g.run(Op::Vmptrld(OTHER)).await;
            has_thread(&g, 0xBA + n).await;
        }
        for n in 0..70 {
            make_current(&g, 0x4_0000 + 0x1000 * n).await;
            write(&g, &thread(n)).await;
        }
        g.run(Op::Vmclear(OTHER)).await;
        g.run(Op::Vmptrld(OTHER)).await;
        has_thread(&g, 0xBC).await;
        g.run(Op::Vmptrld(VMCS)).await;
        has_thread(&g, 0xD).await;
        for n in 0..3 {
            thread_round(&g, n).await;
        }
        write(&g, &thread(7)).await;
        g.run(Op::Vmxoff).await;
        g.run(Op::Vmxon(VMXON)).await;
        g.run(Op::Vmptrld(VMCS)).await;
        has_thread(&g, 7).await;
        thread_round(&g, 8).await;
    });
}

/// Values that break a rule are refused by the entry, with the error of host state but after those of controls, and what was written
/// stays; the same whether nvmx sees each of the writes or none.
#[test]
fn a_thread_that_breaks_a_rule_is_refused() {
    let broken = [
        (HOST_CR3, 1u64 << 50),
        (HOST_CR3, u64::MAX),
        (HOST_FS_BASE, 1 << 47),
        (HOST_GS_BASE, 1 << 63),
        (HOST_FS_BASE, u64::MAX >> 1),
    ];
    agree(move |g| async move {
        first_threads(&g).await;
        for (n, (field, value)) in (10..).zip(broken) {
            write(&g, &thread(n)).await;
            write(&g, &[(field, value)]).await;
            for _ in 0..2 {
                assert_eq!(g.run(Op::Vmresume).await, Outcome::Done, "{field} {value:#x}");
                assert_eq!(g.error().await, 8, "{field} {value:#x}");
                look(&g, "refused").await;
                assert_eq!(g.vmread(field).await, Some(value));
            }
            // A control besides: of those in nvmx's copy, and in vmcs02.
            for (control, bad) in [(VM_ENTRY_CONTROLS, u64::from(u32::MAX)), (CR3_TARGET_COUNT, 5)] {
                let good = g.vmread(control).await.unwrap();
                write(&g, &[(control, bad)]).await;
                assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
                assert_eq!(g.error().await, 7, "{control}");
                look(&g, "refused for a control").await;
                write(&g, &[(control, good)]).await;
            }
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
            assert_eq!(g.error().await, 8);
            thread_round(&g, n + 1).await;
            look(&g, "good again").await;
        }
    });
}

/// The same, for vmcs12s whose entries are never the usual ones: with an MSR area.
#[test]
fn a_thread_that_breaks_a_rule_is_refused_on_the_long_way_too() {
    agree(|g| async move {
        g.poke_u32(0x9000, 0x174);
        g.poke(0x9008, 0x10);
        let carries = control(VM_ENTRY_CONTROLS, 0, 1 << 2 | 1 << 15);
        hypervisor(&g, &[(VM_ENTRY_MSR_LOAD_ADDR, 0x9000), (VM_ENTRY_MSR_LOAD_COUNT, 1), carries]).await;
        launch(&g).await;
        leave(&g).await;
        for n in 0..4 {
            thread_round(&g, n).await;
        }
        for (field, value) in [(HOST_GS_BASE, 1 << 62), (HOST_CR3, 1 << 51)] {
            // These are carried, and L2 finds what it wrote.
            let carried = [(GUEST_IA32_EFER, 0x501 | value >> 40 & 0x800), (GUEST_DR7, 0x401)];
            write(&g, &carried).await;
            write(&g, &[(field, value)]).await;
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
            assert_eq!(g.error().await, 8);
            for (field, value) in carried {
                assert_eq!(g.vmread(field).await, Some(value), "{field}");
            }
            look(&g, "refused").await;
            thread_round(&g, 5).await;
            look(&g, "good again").await;
        }
    });
}

/// Exits by VMREAD and VMWRITE that nvmx has counted.
fn trapped(world: &World) -> u64 {
    [Counter::TrappedVmread, Counter::TrappedVmwrite].into_iter().map(|c| world.cpu.vmx.counters.get(c)).sum()
}

/// nvmx on a machine of this kind, whose L2 has a vmcs12 after its first exit.
fn launched(storage: Storage) -> World {
    let setup = Setup::all().into_iter().find(|s| s.storage == storage && s.strategy == Strategy::ZeroCopy);
    let mut world = World::new(setup.expect("there is one"));
    let end = world.boot(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        leave(&g).await;
    });
    assert!(matches!(end, End::Over));
    world
}

/// Exits by VMREAD and VMWRITE in so many rounds.
fn trapped_in<F: Future<Output = ()> + 'static>(
    world: &mut World,
    rounds: u64,
    round: impl Fn(Guest, u64) -> F + 'static,
) -> u64 {
    let before = trapped(world);
    let end = world.run(move |g| async move {
        for n in 0..rounds {
            round(g.clone(), n).await;
        }
    });
    assert!(matches!(end, End::Over));
    trapped(world) - before
}

async fn stack_round(g: Guest, n: u64) {
    assert!(g.vmwrite(HOST_RSP, 0x7100 + n).await);
    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
    leave(&g).await;
    assert_eq!((g.get(GUEST_RSP), g.vmread(HOST_RSP).await), (0x7100 + n, Some(0x7100 + n)));
}

#[test]
fn the_first_write_of_a_vmcs_in_use_exits_and_no_other_does() {
    let world = &mut launched(Storage::OnChip);
    assert_eq!(trapped_in(world, 1, stack_round), 1);
    assert_eq!(trapped_in(world, 50, stack_round), 0);
}

#[test]
fn threads_exit_until_they_are_a_habit_and_again_once_that_is_over() {
    let thread = |g: Guest, n| async move { thread_round(&g, n).await };
    let world = &mut launched(Storage::OnChip);
    // The stack pointer once, three fields written and read before the entry, and read after it.
    assert_eq!(trapped_in(world, 1, thread), 1 + 3 * 3);
    assert_eq!(trapped_in(world, 1, thread), 1);
    assert_eq!(trapped_in(world, 50, thread), 0);
    // Now and then is enough to keep it.
    let seldom =
        |g: Guest, n| async move { if n % 20 == 0 { thread_round(&g, n).await } else { stack_round(g, n).await } };
    assert_eq!(trapped_in(world, 100, seldom), 0);
    // Where that is over the stack pointer is learned anew: a read of it, and a write.
    assert_eq!(trapped_in(world, 60, stack_round), 1 + 1);
    assert_eq!(trapped_in(world, 1, thread), 3 * 3);
    assert_eq!(trapped_in(world, 20, stack_round), 0);
    assert_eq!(trapped_in(world, 1, thread), 3 * 3, "too long ago to be a habit");
    assert_eq!(trapped_in(world, 1, thread), 1);
    assert_eq!(trapped_in(world, 50, thread), 0);
}

#[test]
fn in_memory_no_write_of_a_thread_or_a_window_exits() {
    let rounds = |g: Guest, n| async move {
        thread_round(&g, n).await;
        window_round(&g, n).await;
    };
    let world = &mut launched(Storage::InMemory);
    assert_eq!(trapped_in(world, 50, rounds), 0);
    // Another vmcs12, and the first again after VMCLEAR, whose page L2 has not changed.
    let end = world.run(|g| async move {
        make_current(&g, OTHER).await;
        write(&g, &valid()).await;
        launch(&g).await;
        leave(&g).await;
    });
    assert!(matches!(end, End::Over));
    assert_eq!(trapped_in(world, 50, rounds), 0);
    let end = world.run(|g| async move {
        g.run(Op::Vmclear(VMCS)).await;
        g.run(Op::Vmptrld(VMCS)).await;
    });
    assert!(matches!(end, End::Over));
    let written = |g: Guest, n| async move {
        write(&g, &thread(n)).await;
        assert_eq!(primary(&g).await & WINDOWS, if n % 2 == 0 { 0 } else { WINDOWS }, "{n}");
        assert!(g.vmwrite(CPU_BASED_VM_EXEC_CONTROL, primary(&g).await ^ WINDOWS).await);
        has_thread(&g, n).await;
    };
    assert_eq!(trapped_in(world, 2, written), 0);
}

/// What opens and closes without a look at the other controls: the two windows, and exits by HLT.
const WINDOWS: u64 = 1 << 2 | 1 << 22;
const HLT_EXITING: u64 = 1 << 7;

async fn primary(g: &Guest) -> u64 {
    g.vmread(CPU_BASED_VM_EXEC_CONTROL).await.unwrap()
}

/// HLT exits in L3 or does not, as the primary controls say that L2 has written just before.
async fn window_round(g: &Guest, n: u64) {
    let value = primary(g).await & !HLT_EXITING | if n % 2 == 0 { HLT_EXITING } else { 0 };
    assert!(g.vmwrite(CPU_BASED_VM_EXEC_CONTROL, value).await);
    assert_eq!(primary(g).await, value);
    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left, "error {}", g.error().await);
    if n % 2 == 0 {
        assert_eq!(g.run(Op::Hlt).await, Outcome::Left);
        assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(12));
    } else {
        leave(g).await;
    }
    assert_eq!(primary(g).await, value, "an exit leaves it alone");
}

/// Primary controls of each kind: followed, merged anew, and refused, first of all where other rules are broken too.
#[test]
fn primary_controls_are_those_that_l2_wrote_last() {
    const USE_IO_BITMAPS: u64 = 1 << 25;
    agree(|g| async move {
        first_threads(&g).await;
        let good = primary(&g).await;
        for n in 0..6 {
            window_round(&g, n).await;
            look(&g, "a window").await;
        }
        for value in [good ^ USE_IO_BITMAPS, good, good ^ USE_IO_BITMAPS ^ HLT_EXITING, good] {
            assert!(g.vmwrite(CPU_BASED_VM_EXEC_CONTROL, value).await);
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Left, "{value:#x}: error {}", g.error().await);
            leave(&g).await;
            look(&g, "merged anew").await;
            assert_eq!(primary(&g).await, value);
        }
        for bad in [0, u64::from(u32::MAX), good & !(1 << 1)] {
            write(&g, &[(CPU_BASED_VM_EXEC_CONTROL, bad), (HOST_FS_BASE, 1 << 62)]).await;
            for _ in 0..2 {
                assert_eq!(g.run(Op::Vmresume).await, Outcome::Done, "{bad:#x}");
                assert_eq!(g.error().await, 7, "{bad:#x}");
                look(&g, "refused").await;
                assert_eq!(primary(&g).await, bad);
            }
            assert!(g.vmwrite(CPU_BASED_VM_EXEC_CONTROL, good).await);
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
            assert_eq!(g.error().await, 8, "a host field is left");
            thread_round(&g, 3).await;
            look(&g, "good again").await;
        }
        // A refused value goes with its VMCS, to L2's memory and back.
        for bad in [0, good] {
            write(&g, &[(CPU_BASED_VM_EXEC_CONTROL, bad), (HOST_CR3, if bad == 0 { 0x1000 } else { u64::MAX })]).await;
            g.run(Op::Vmclear(VMCS)).await;
            g.run(Op::Vmptrld(VMCS)).await;
            assert_eq!(primary(&g).await, bad);
            assert_eq!(g.run(Op::Vmlaunch).await, Outcome::Done);
            assert_eq!(g.error().await, if bad == 0 { 7 } else { 8 });
            look(&g, "refused behind VMCLEAR").await;
        }
        write(&g, &thread(5)).await;
        launch(&g).await;
        leave(&g).await;
        window_round(&g, 2).await;
        look(&g, "good at the end").await;
    });
}

/// Nothing is lent from a VMCS that could be entered.
#[test]
#[should_panic(expected = "only a shadow VMCS is lent from")]
fn an_ordinary_vmcs_is_not_lent_from() {
    let mut world = World::new(Setup::all()[0]);
    let cpu = &mut *world.cpu;
    let _ = Lent::from_shadow(&mut cpu.vmx, &cpu.phys, cpu.vmcs01, [0x1000]);
}
