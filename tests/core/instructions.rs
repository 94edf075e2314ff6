//! VMX instructions with their results, errors and faults, in the order in which the SDM's pseudocode asks.

use crate::kit::*;
use nvmx::vmx::region::REVISION;
use nvmx_machine::guest::{OPERAND, Op, Outcome};
use nvmx_machine::processor::{Delivered, Level};
use nvmx_machine::world::agree;

const ZF: u64 = 1 << 6;
const CF: u64 = 1;

fn is_fault(outcome: Outcome, vector: u32) -> bool {
    matches!(outcome, Outcome::Event(Delivered { info, .. }) if info & 0x7FF == 0x300 | vector)
}

/// Every VMX instruction but VMXON, with operands that are good once there is a VMCS.
const ALL: [Op; 12] = [
    Op::Vmxoff,
    Op::Vmclear(VMCS),
    Op::Vmptrld(VMCS),
    Op::Vmptrst,
    Op::Vmread(0x681E),
    Op::Vmwrite(0x681E, 1),
    Op::Vmlaunch,
    Op::Vmresume,
    Op::Vmcall,
    Op::Invept(2, 0),
    Op::Invvpid(2, 0, 0),
    Op::Vmfunc(0, 0),
];

#[test]
fn a_guest_is_entered_and_exits() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        g.see("before");
        launch(&g).await;
        g.see("in the guest");
        g.run(Op::Cpuid).await;
        g.see("behind its exit");
        g.note(format!("{:x?}", exit_information(&g).await));
        let rip = g.vmread(GUEST_RIP).await.unwrap();
        g.vmwrite(GUEST_RIP, rip + 2).await;
        g.run(Op::Vmresume).await;
        g.see("in the guest again");
        g.run(Op::Vmcall).await;
        g.see("out again");
    });
}

#[test]
fn outside_vmx_operation_each_is_an_invalid_opcode() {
    agree(|g| async move {
        for op in ALL {
            let outcome = g.run(op).await;
            assert!(is_fault(outcome, 6), "{op:?}: {outcome:?}");
            g.see(op);
        }
        let outcome = g.run(Op::Vmxon(VMXON)).await;
        assert!(is_fault(outcome, 6), "without CR4.VMXE: {outcome:?}");
        vmxon(&g).await;
        g.run(Op::Vmxoff).await;
        let outcome = g.run(Op::Vmread(0x681E)).await;
        assert!(is_fault(outcome, 6), "behind VMXOFF: {outcome:?}");
    });
}

#[test]
fn above_privilege_level_0_each_is_a_protection_fault() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        for (field, value) in [
            (GUEST_SS_SELECTOR, 0x13),
            (GUEST_SS_AR_BYTES, 0xC0F3),
            (GUEST_CS_SELECTOR, 0xB),
            (GUEST_CS_AR_BYTES, 0xA0FB),
        ] {
            g.set(field, value);
        }
        for op in ALL.into_iter().filter(|op| !matches!(op, Op::Vmfunc(..))).chain([Op::Vmxon(VMXON)]) {
            let outcome = g.run(op).await;
            assert!(is_fault(outcome, 13), "{op:?}: {outcome:?}");
            g.see(op);
        }
    });
}

#[test]
fn vmxon_takes_a_region_of_the_right_revision_in_the_right_mode() {
    agree(|g| async move {
        g.poke_u32(VMXON, REVISION);
        g.run(Op::MovToCr4(0x2020)).await;
        // CR0.NE is fixed to 1.
        assert!(is_fault(g.run(Op::Vmxon(VMXON)).await, 13));
        g.run(Op::MovToCr0(0x8001_0031)).await;
        for (at, word) in [(0x1_0008, REVISION), (1 << 39, 0), (VMXON, REVISION + 1), (VMXON, REVISION | 1 << 31)] {
            if at < 1 << 30 {
                g.poke_u32(at, word);
            }
            g.run(Op::Vmxon(at)).await;
            assert_eq!(g.flags(), CF, "{at:#x} {word:#x}");
            g.see(at);
        }
        g.poke_u32(VMXON, REVISION);
        g.run(Op::Vmxon(VMXON)).await;
        assert_eq!(g.flags(), 0);
        g.run(Op::Vmxon(VMXON)).await;
        assert_eq!(g.flags(), CF, "in VMX operation, without a current VMCS");
        make_current(&g, VMCS).await;
        g.run(Op::Vmxon(VMXON)).await;
        assert_eq!((g.flags(), g.error().await), (ZF, 15));
    });
}

#[test]
fn pointers_are_judged_by_address_vmxon_region_and_revision() {
    agree(|g| async move {
        vmxon(&g).await;
        make_current(&g, VMCS).await;
        for (op, error) in [
            (Op::Vmclear(VMCS + 8), 2),
            (Op::Vmclear(1 << 39), 2),
            (Op::Vmclear(VMXON), 3),
            (Op::Vmptrld(VMCS + 8), 9),
            (Op::Vmptrld(1 << 39), 9),
            (Op::Vmptrld(VMXON), 10),
            (Op::Vmptrld(OTHER), 11),
        ] {
            g.run(op).await;
            assert_eq!((g.flags(), g.error().await), (ZF, error), "{op:?}");
        }
        g.run(Op::Vmptrst).await;
        assert_eq!(g.peek(OPERAND), VMCS, "an instruction that fails leaves the current VMCS alone");
        g.run(Op::Vmclear(VMCS)).await;
        g.run(Op::Vmptrst).await;
        assert_eq!(g.peek(OPERAND), u64::MAX);
        for op in [Op::Vmread(0x681E), Op::Vmwrite(0x681E, 0), Op::Vmlaunch, Op::Vmresume, Op::Vmclear(VMCS + 8)] {
            g.run(op).await;
            assert_eq!(g.flags(), CF, "{op:?} without a current VMCS");
        }
    });
}

#[test]
fn vmptrld_of_memory_that_is_nvmxs_finds_no_revision() {
    for setup in nvmx_machine::Setup::all() {
        let mut world = nvmx_machine::World::new(setup);
        let end = world.boot(|g| async move {
            vmxon(&g).await;
            make_current(&g, VMCS).await;
            let own = nvmx_machine::world::OWN.start();
            g.run(Op::Vmptrld(own)).await;
            assert_eq!((g.flags(), g.error().await), (ZF, 11));
            // A write that nothing takes.
            let before = g.peek(own + 8);
            g.run(Op::Vmclear(own)).await;
            assert_eq!((g.flags(), g.peek(own + 8)), (0, before));
        });
        assert!(matches!(end, nvmx_machine::world::End::Over), "{end:?}");
    }
}

#[test]
fn fields_keep_what_is_written_in_the_width_that_they_have() {
    agree(|g| async move {
        vmxon(&g).await;
        make_current(&g, VMCS).await;
        for field in Field::ALL {
            let encoding = u64::from(field.encoding());
            g.run(Op::Vmwrite(encoding, 0x1234_5678_9ABC_DEF0)).await;
            g.note(format!("{field} written: {:#x}", g.flags()));
            g.run(Op::Vmread(encoding)).await;
            g.note(format!("{field}: {:#x} {:#x}", g.flags(), g.gpr(0)));
            // The upper half alone.
            g.run(Op::Vmwrite(encoding | 1, 0x55)).await;
            g.note(format!("{field} high written: {:#x}", g.flags()));
            g.run(Op::Vmread(encoding | 1)).await;
            g.note(format!("{field} high: {:#x} {:#x}", g.flags(), g.gpr(0)));
            if field.is_read_only() {
                // Read-only, or not there at all.
                g.note(format!("{}", g.error().await));
            }
        }
        for encoding in [0x7FFE, 0xFFFF_FFFF, 1 << 32, 0x6C16 | 1 << 40, 0x6C16 | 1 << 15] {
            for op in [Op::Vmread(encoding), Op::Vmwrite(encoding, 0)] {
                g.run(op).await;
                assert_eq!((g.flags(), g.error().await), (ZF, 12), "{op:?}");
            }
        }
    });
}

#[test]
fn a_vmcs_keeps_its_fields_over_vmclear_and_moves() {
    agree(|g| async move {
        vmxon(&g).await;
        let regions: Vec<u64> = (0..12).map(|n| VMCS + 0x1000 * n).collect();
        for round in 0..3 {
            for at in &regions {
                if round == 0 {
                    g.poke_u32(*at, REVISION);
                }
                g.run(Op::Vmptrld(*at)).await;
                let (old, marker) = (g.vmread(GUEST_RSP).await, g.vmread(HOST_RSP).await);
                assert_eq!((old, marker), (Some(at * round), Some(at + round)).min((old, marker)), "{at:#x}");
                g.note(format!("{at:#x}: {old:x?} {marker:x?}"));
                g.vmwrite(GUEST_RSP, at * (round + 1)).await;
                g.vmwrite(HOST_RSP, at + round + 1).await;
                g.vmwrite(TSC_OFFSET, !at).await;
                if at % 3 == round {
                    g.run(Op::Vmclear(*at)).await;
                }
            }
        }
        for at in &regions {
            g.run(Op::Vmclear(*at)).await;
        }
        for at in regions {
            g.run(Op::Vmptrld(at)).await;
            assert_eq!(g.vmread(GUEST_RSP).await, Some(at * 3));
            assert_eq!(g.vmread(HOST_RSP).await, Some(at + 3));
            assert_eq!(g.vmread(TSC_OFFSET).await, Some(!at));
        }
    });
}

#[test]
fn launch_states_follow_vmlaunch_and_vmclear() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        g.run(Op::Vmresume).await;
        assert_eq!((g.flags(), g.error().await), (ZF, 5));
        launch(&g).await;
        g.run(Op::Vmcall).await;
        assert_eq!(g.level(), Level::L2);
        g.run(Op::Vmlaunch).await;
        assert_eq!((g.flags(), g.error().await), (ZF, 4));
        // It moves away and comes back launched.
        make_current(&g, OTHER).await;
        g.run(Op::Vmptrld(VMCS)).await;
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
        g.run(Op::Vmcall).await;
        g.run(Op::Vmclear(VMCS)).await;
        g.run(Op::Vmptrld(VMCS)).await;
        g.run(Op::Vmresume).await;
        assert_eq!((g.flags(), g.error().await), (ZF, 5));
        launch(&g).await;
        g.see("launched again");
    });
}

#[test]
fn blocking_by_mov_ss_keeps_a_guest_out() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        g.set(GUEST_INTERRUPTIBILITY_INFO, 2);
        g.run(Op::Vmlaunch).await;
        g.see("blocked");
        assert_eq!((g.flags(), g.error().await), (ZF, 26));
        launch(&g).await;
    });
}

#[test]
fn invalidations_are_judged_by_type_and_descriptor() {
    agree(|g| async move {
        hypervisor(&g, &[]).await;
        launch(&g).await;
        g.run(Op::Vmcall).await;
        let eptp = EPT | 3 << 3 | 6;
        for (op, error) in [
            (Op::Invept(1, eptp), 0),
            (Op::Invept(2, 0), 0),
            (Op::Invept(0, eptp), 28),
            (Op::Invept(3, eptp), 28),
            (Op::Invept(1, EPT | 3 << 3 | 1), 28),
            (Op::Invept(1, 1 << 40 | 3 << 3 | 6), 28),
            (Op::Invept(1 << 32 | 1, eptp), 28),
            (Op::Invvpid(0, 1, 0x1000), 0),
            (Op::Invvpid(0, 1, u64::MAX << 47), 0),
            (Op::Invvpid(0, 1, 1 << 47), 28),
            (Op::Invvpid(0, 0, 0), 28),
            (Op::Invvpid(1, 1, 0), 0),
            (Op::Invvpid(1, 7, 0), 0),
            (Op::Invvpid(1, 0, 0), 28),
            (Op::Invvpid(2, 0, 0), 0),
            (Op::Invvpid(3, 1, 0), 0),
            (Op::Invvpid(3, 0, 0), 28),
            (Op::Invvpid(3, 1 << 16, 0), 28),
            (Op::Invvpid(4, 1, 0), 28),
        ] {
            g.run(op).await;
            assert_eq!(g.flags(), if error == 0 { 0 } else { ZF }, "{op:?}");
            if error != 0 {
                assert_eq!(g.error().await, error, "{op:?}");
            }
        }
        g.run(Op::Vmcall).await;
        assert_eq!((g.flags(), g.error().await), (ZF, 1));
    });
}
