//! Several processors of the modelled machine. A test program of its own: that L2 runs on more than one is state of the process.

#[path = "core/kit.rs"]
#[allow(dead_code, reason = "of tests/core")]
mod kit;

use kit::*;
use nvmx::mm::Span;
use nvmx_machine::guest::Op;
use nvmx_machine::processor::{Exit, Level};
use nvmx_machine::world::{End, OWN, memory, restart};
use nvmx_machine::{Setup, World};

/// Two processors that share memory; each has half of nvmx's frames.
fn two(setup: Setup) -> [World; 2] {
    let phys = memory();
    let half = OWN.len() / 2;
    [0, 1].map(|n| {
        let own = Span::sized(OWN.start() + half * u64::from(n), half);
        World::on(Setup { booted: n == 0, frames: 400, ..setup }, phys, own, n)
    })
}

#[test]
fn a_vmcs_moves_from_one_processor_to_another_by_vmclear() {
    for setup in Setup::all() {
        let [mut first, mut second] = two(setup);
        let end = first.boot(|g| async move {
            hypervisor(&g, &[(GUEST_RSP, 0x1234), (HOST_RSP, 0x5678)]).await;
            launch(&g).await;
            g.run(Op::Write(0x3_0000, 1)).await;
            leave(&g).await;
            g.run(Op::Vmclear(VMCS)).await;
            assert_eq!(g.flags(), 0);
        });
        assert!(matches!(end, End::Over), "{end:?}");
        let end = second.run(|g| async move {
            // INIT and SIPI bring it to life.
            g.exit(Exit::new(3)).await;
            assert_eq!(g.get(GUEST_ACTIVITY_STATE), 3);
            g.exit(Exit::new(4).because(0x12)).await;
            restart(&g);
            g.poke_u32(VMXON + 0x5_0000, nvmx::vmx::region::REVISION);
            g.run(Op::MovToCr4(0x2020)).await;
            g.run(Op::MovToCr0(0x8001_0031)).await;
            g.run(Op::Vmxon(VMXON + 0x5_0000)).await;
            g.run(Op::Vmptrld(VMCS)).await;
            assert_eq!(g.flags(), 0);
            assert_eq!((g.vmread(GUEST_RSP).await, g.vmread(HOST_RSP).await), (Some(0x1234), Some(0x5678)));
            launch(&g).await;
            assert_eq!((g.level(), g.get(GUEST_RSP)), (Level::L3, 0x1234));
            g.run(Op::Read(0x3_0000)).await;
            assert_eq!(g.gpr(0), 1);
            leave(&g).await;
            g.vmwrite(GUEST_RSP, 0x4321).await;
            g.run(Op::Vmclear(VMCS)).await;
        });
        assert!(matches!(end, End::Over), "{end:?}");
        // And back, where its slot still is: it must not be believed.
        let end = first.run(|g| async move {
            g.run(Op::Vmptrld(VMCS)).await;
            assert_eq!(g.vmread(GUEST_RSP).await, Some(0x4321));
            launch(&g).await;
            assert_eq!(g.get(GUEST_RSP), 0x4321);
            leave(&g).await;
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn what_another_processor_writes_to_an_msr_bitmap_counts_at_the_next_entry() {
    for setup in Setup::all() {
        let [mut first, mut second] = two(setup);
        let end = second.boot(|g| async move {
            g.exit(Exit::new(3)).await;
            g.exit(Exit::new(4).because(0x12)).await;
        });
        assert!(matches!(end, End::Over), "{end:?}");
        const BITMAP: u64 = 0x2_0000;
        let end = first.boot(|g| async move {
            hypervisor(&g, &[control(CPU_BASED_VM_EXEC_CONTROL, 1 << 28, 0), (MSR_BITMAP, BITMAP)]).await;
            launch(&g).await;
            g.run(Op::Rdmsr(0xC000_0081)).await;
            assert_eq!(g.level(), Level::L3, "the bitmap lets it through");
            leave(&g).await;
            // By the other processor: nothing in this one's ept01 tells.
            g.poke(BITMAP + 1024 + 0x80 / 64 * 8, 1 << 1);
            g.run(Op::Vmresume).await;
            g.run(Op::Rdmsr(0xC000_0081)).await;
            assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(31)));
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn a_processor_that_did_not_boot_waits_for_its_sipi() {
    for setup in Setup::all() {
        let mut world = World::new(Setup { booted: false, ..setup });
        let end = world.boot(|g| async move {
            g.exit(Exit::new(3)).await;
            assert_eq!(g.get(GUEST_ACTIVITY_STATE), 3, "wait-for-SIPI");
            g.exit(Exit::new(4).because(0x12)).await;
            // What was held back comes before the NMI window, which opens after it.
            assert_eq!((g.get(GUEST_CS_SELECTOR), g.get(GUEST_RIP)), (0x1200, 0));
            assert_eq!((g.get(GUEST_CS_BASE), g.get(GUEST_ACTIVITY_STATE)), (0x1_2000, 0));
            assert_eq!(g.get(GUEST_CR0) & 1, 0);
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}
