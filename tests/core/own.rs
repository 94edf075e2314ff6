//! What L2 itself exits for, and how the machine ends.

use crate::kit::*;
use l2_protocol::abi::{self, Counter};
use nvmx::trace::KillReason;
use nvmx_machine::exits::OPERAND;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::Exit;
use nvmx_machine::world::{End, OWN, agree};
use nvmx_machine::{Setup, World};

fn everywhere<F: Future<Output = ()> + 'static>(program: impl Fn(Guest) -> F + Clone + 'static) {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(program.clone());
        assert!(matches!(end, End::Over), "{:?} {:?}: {end:?}", setup.strategy, setup.storage);
    }
}

/// How the machine ends by this program.
fn killed<F: Future<Output = ()> + 'static>(program: impl FnOnce(Guest) -> F + 'static) -> KillReason {
    let mut world = World::new(Setup::all()[0]);
    match world.boot(program) {
        End::Killed(reason) => reason,
        End::Over => panic!("it goes on"),
    }
}

#[test]
fn control_registers_that_nvmx_owns_bits_of_read_as_l2_wrote_them() {
    agree(|g| async move {
        for op in [
            Op::MovToCr4(0x2020),
            Op::MovToCr4(0x20A0),
            Op::MovToCr0(0x8001_0031),
            Op::MovToCr0(0x8001_0039),
            Op::Clts,
            Op::Lmsw(0xB),
            Op::MovToCr0(0x8001_0011),
            Op::MovToCr3(0x1000),
            Op::MovFromCr3,
            Op::MovToCr4(0x20),
        ] {
            let outcome = g.run(op).await;
            g.see((op, outcome));
        }
    });
}

#[test]
fn in_vmx_operation_the_fixed_bits_fault() {
    everywhere(|g| async move {
        vmxon(&g).await;
        let before = (g.get(GUEST_CR0), g.get(GUEST_CR4));
        for op in
            [Op::MovToCr0(0x8001_0011), Op::MovToCr0(0x1_0031), Op::MovToCr4(0x20), Op::MovToCr4(0x2020 | 1 << 32)]
        {
            assert!(matches!(g.run(op).await, Outcome::Event(event) if event.info == 0xB0D), "{op:?}");
        }
        assert_eq!((g.get(GUEST_CR0), g.get(GUEST_CR4)), before);
    });
}

#[test]
fn msrs_are_passed_noted_answered_or_refused() {
    everywhere(|g| async move {
        for (op, fault) in [
            (Op::Wrmsr(0xC000_0081, 7), false),
            (Op::Rdmsr(0xC000_0081), false),
            (Op::Wrmsr(0x277, 0x0606), false),
            (Op::Wrmsr(0x277, 2), true),
            (Op::Wrmsr(0x174, 8), false),
            (Op::Wrmsr(0x175, 1 << 63), true),
            (Op::Rdmsr(0x480), false),
            (Op::Wrmsr(0x480, 0), true),
            (Op::Rdmsr(0x3A), false),
            (Op::Wrmsr(0x3A, 5), true),
            (Op::Rdmsr(0x1A0), false),
            (Op::Wrmsr(0x1A0, 1), false),
            (Op::Wrmsr(0x1A0, 1 << 34), true),
            (Op::Wrmsr(0xDA0, 0), false),
            (Op::Wrmsr(0xDA0, 1 << 8), true),
            (Op::Wrmsr(0x79, 0x1234), false),
            (Op::Rdmsr(0x345), false),
            (Op::Wrmsr(0x345, 0), true),
            (Op::Rdmsr(0x570), true),
            (Op::Wrmsr(0x570, 0), true),
            (Op::Rdmsr(0x2FF), true),
            (Op::Rdmsr(0x4000_0000), true),
            // The page of the APIC's registers must not hide nvmx.
            (Op::Wrmsr(0x1B, 0xFEE0_0900), false),
            (Op::Wrmsr(0x1B, OWN.start() | 0x900), true),
        ] {
            let outcome = g.run(op).await;
            assert_eq!(matches!(outcome, Outcome::Event(event) if event.info == 0xB0D), fault, "{op:?}: {outcome:?}");
        }
        g.run(Op::Rdmsr(0x480)).await;
        assert_eq!(g.gpr(0) as u32, nvmx::vmx::region::REVISION);
        g.run(Op::Rdmsr(0x1A0)).await;
        assert_eq!(g.gpr(0), 1 | 1 << 11 | 1 << 12, "no branch trace, no sampling");
        g.run(Op::Rdmsr(0x345)).await;
        assert_eq!(g.gpr(0), 0x2000);
    });
}

/// CPUID with these registers.
async fn cpuid(g: &Guest, leaf: u32, subleaf: u32) -> [u64; 4] {
    {
        let mut core = g.core();
        (core.gprs[0], core.gprs[1]) = (leaf.into(), subleaf.into());
    }
    g.run(Op::Cpuid).await;
    [0, 3, 1, 2].map(|register| g.gpr(register))
}

#[test]
fn cpuid_shows_vmx_counters_and_the_last_refusal() {
    everywhere(|g| async move {
        let [eax, _, ecx, _] = cpuid(&g, 1, 0).await;
        assert_eq!((eax, ecx & (1 << 5 | 1 << 31)), (0x806C1, 1 << 5 | 1 << 31));
        let [last, ..] = cpuid(&g, abi::LEAF_SIGNATURE, 0).await;
        assert_eq!(last as u32, abi::LEAF_MAX);
        hypervisor(&g, &[(HOST_CR0, 0)]).await;
        g.run(Op::Vmlaunch).await;
        let [refused, number, _, count] = cpuid(&g, abi::LEAF_REFUSAL, abi::REFUSAL_SUMMARY).await;
        assert_eq!((refused as u32, number, count), (abi::Refused::HostState as u32, 8, 1));
        let [rule, fields, name, text] = cpuid(&g, abi::LEAF_REFUSAL, abi::REFUSAL_RULE).await;
        assert!(rule > 0 && fields > 0 && name > 0 && text > 0);
        let [first, ..] = cpuid(&g, abi::LEAF_REFUSAL, abi::REFUSAL_FIELDS).await;
        assert_eq!(first as u32, HOST_CR0.encoding());
        let words = cpuid(&g, abi::LEAF_REFUSAL, abi::REFUSAL_NAME).await;
        let bytes: Vec<u8> = words.iter().flat_map(|word| (*word as u32).to_le_bytes()).collect();
        assert!(String::from_utf8_lossy(&bytes).starts_with("HostCr0"), "{bytes:?}");
        // Counters: a snapshot, and what it holds.
        write(&g, &valid().into_iter().filter(|(f, _)| *f == HOST_CR0).collect::<Vec<_>>()).await;
        launch(&g).await;
        leave(&g).await;
        cpuid(&g, abi::LEAF_COUNTERS, abi::SNAPSHOT).await;
        let [reflected, there, ..] = cpuid(&g, abi::LEAF_COUNTERS, Counter::Reflected as u32).await;
        assert_eq!((reflected, there), (1, 1));
        let [exits, ..] = cpuid(&g, abi::LEAF_COUNTERS, Counter::ExitsL3 as u32).await;
        assert_eq!(exits, 1);
        let [frames, ..] = cpuid(&g, abi::LEAF_COUNTERS, abi::FRAMES_FREE).await;
        assert!(frames > 0);
    });
}

#[test]
fn cpuid_mirrors_cr4_of_l2() {
    const KL: u64 = 1 << 19;
    everywhere(|g| async move {
        for (cr4, shown) in [(0x2020, 0), (0x2020 | KL, 1), (0x2020, 0)] {
            g.run(Op::MovToCr4(cr4)).await;
            assert_eq!(cpuid(&g, 0x19, 0).await, [1, shown, 0, 0], "{cr4:#x}");
        }
    });
}

#[test]
fn instructions_that_always_exit() {
    everywhere(|g| async move {
        g.run(Op::Invd).await;
        assert!(matches!(g.run(Op::Getsec).await, Outcome::Event(event) if event.info == 0x306));
        g.run(Op::Xsetbv(0, 7)).await;
        assert_eq!(g.core().xcr0, 7);
        assert!(matches!(g.run(Op::Xsetbv(0, 4)).await, Outcome::Event(event) if event.info == 0xB0D));
        assert!(matches!(g.run(Op::Xsetbv(1, 1)).await, Outcome::Event(event) if event.info == 0xB0D));
        assert_eq!(g.core().xcr0, 7);
    });
}

#[test]
fn a_32_bit_l2_switches_tasks() {
    everywhere(|g| async move {
        two_tasks(&g);
        g.set(GUEST_CR4, 0x2000);
        for at in (0x20..0x68).step_by(4) {
            g.poke_u32(0x4000 + at, 0);
        }
        for (at, value) in [(0x20, 0x5000), (0x24, 2), (0x38, 0x7000), (0x48, 16), (0x4C, 8), (0x50, 16), (0x54, 16)] {
            g.poke_u32(0x4000 + at, value);
        }
        g.exit(Exit { length: 2, ..Exit::new(9) }.because(2 << 30 | 0x28)).await;
        assert_eq!((g.get(GUEST_TR_SELECTOR), g.get(GUEST_TR_BASE)), (0x28, 0x4000));
        assert_eq!((g.get(GUEST_RIP), g.get(GUEST_RSP), g.get(GUEST_RFLAGS)), (0x5000, 0x7000, 2));
        assert_eq!(g.peek(0x3000 + 0x20) as u32, 0x10_0000 + 2, "the old task's EIP");
        // To a task that is not there: #TS, which the old task gets.
        g.core().delivered.clear();
        g.exit(Exit { length: 2, ..Exit::new(9) }.because(2 << 30 | 0x10)).await;
        assert_eq!(g.core().delivered.len(), 1);
        assert_eq!(g.get(GUEST_TR_SELECTOR), 0x28);
    });
}

#[test]
fn the_machine_ends_for_reasons_that_are_named() {
    let reason = killed(|g| async move { g.exit(Exit::new(2)).await });
    assert_eq!(reason, KillReason::TripleFault);
    let reason = killed(|g| async move { _ = g.run(Op::Write(OWN.start(), 1)).await });
    assert!(matches!(reason, KillReason::ForbiddenMemory(at) if at.get() == OWN.start()), "{reason:?}");
    // An exit by a control that nvmx does not set.
    let reason = killed(|g| async move { g.exit(Exit::new(12)).await });
    assert!(matches!(reason, KillReason::UnexpectedExit(12)), "{reason:?}");
    // L2's own state is bad: nvmx has no say in that.
    let reason = killed(|g| async move {
        g.set(GUEST_RFLAGS, 0);
        g.run(Op::Cpuid).await;
    });
    assert!(matches!(reason, KillReason::EntryFailed { reason, .. } if reason == 1 << 31 | 33), "{reason:?}");
    // MSR areas of VM exits.
    for (field, count) in
        [(VM_EXIT_MSR_STORE_ADDR, VM_EXIT_MSR_STORE_COUNT), (VM_EXIT_MSR_LOAD_ADDR, VM_EXIT_MSR_LOAD_COUNT)]
    {
        let reason = killed(move |g| async move {
            g.poke(0x2_5000, 1 << 32);
            hypervisor(&g, &[(field, 0x2_5000), (count, 1)]).await;
            launch(&g).await;
            g.run(Op::Vmcall).await;
        });
        let indicator = if count == VM_EXIT_MSR_STORE_COUNT { 1 } else { 4 };
        assert_eq!(reason, KillReason::VmxAbort(indicator));
    }
}

/// An exit by an EPT violation of nvmx's memory, for the PDPTEs that a MOV to a control register loads: no linear address.
fn pdptes_in_nvmx() -> Exit {
    Exit { physical: OWN.start() + 0x20, length: 3, ..Exit::new(48) }.because(1)
}

#[test]
fn a_mov_to_cr3_whose_pdptes_are_nvmxs_faults() {
    everywhere(|g| async move {
        g.core().delivered.clear();
        let before = g.get(GUEST_RIP);
        g.exit(pdptes_in_nvmx()).await;
        let events: Vec<_> = g.core().delivered.iter().map(|event| event.info).collect();
        assert_eq!((events, g.get(GUEST_RIP)), (vec![0xB0D], before));
        g.run(Op::Cpuid).await;
    });
    // What has a linear address is an access like any other.
    let reason = killed(|g| async move { g.exit(pdptes_in_nvmx().because(1 | 1 << 7)).await });
    assert!(matches!(reason, KillReason::ForbiddenMemory(_)), "{reason:?}");
}

#[test]
fn a_mov_to_cr3_of_an_l3_without_ept_faults_too_or_exits() {
    for exits in [false, true] {
        everywhere(move |g| async move {
            hypervisor(
                &g,
                &[control(SECONDARY_VM_EXEC_CONTROL, 0, 1 << 1), (EXCEPTION_BITMAP, if exits { 1 << 13 } else { 0 })],
            )
            .await;
            launch(&g).await;
            g.core().delivered.clear();
            g.exit(pdptes_in_nvmx()).await;
            if exits {
                assert_eq!(g.vmread(VM_EXIT_INTR_INFO).await, Some(0x8000_0B0D));
                return;
            }
            assert_eq!(g.core().delivered.iter().map(|event| event.info).collect::<Vec<_>>(), [0xB0D]);
            leave(&g).await;
        });
    }
}

#[test]
fn long_mode_does_not_start_with_a_16_bit_tss() {
    everywhere(|g| async move {
        two_tasks(&g);
        g.run(Op::MovToCr4(0x20)).await;
        g.run(Op::Wrmsr(0xC000_0080, 0x100)).await;
        g.set(GUEST_TR_AR_BYTES, 0x83);
        // CR0.NE, which is nvmx's.
        let outcome = g.run(Op::MovToCr0(0x8000_0031)).await;
        assert!(matches!(outcome, Outcome::Event(event) if event.info == 0xB0D), "{outcome:?}");
    });
}

#[test]
fn an_operand_in_the_lower_half_is_not_the_supervisors_under_lass() {
    const SMAP: u64 = 1 << 21;
    const LASS: u64 = 1 << 27;
    const AC: u64 = 1 << 18;
    everywhere(|g| async move {
        vmxon(&g).await;
        let (cr4, flags) = (g.get(GUEST_CR4), g.get(GUEST_RFLAGS));
        for (bits, ac, faults) in [(SMAP | LASS, 0, true), (SMAP | LASS, AC, false), (LASS, 0, false)] {
            g.set(GUEST_CR4, cr4 | bits);
            g.set(GUEST_RFLAGS, flags | ac);
            let outcome = g.run(Op::Vmptrst).await;
            let fault = matches!(outcome, Outcome::Event(event) if event.info == 0xB0D);
            assert_eq!(fault, faults, "{bits:#x} {ac:#x}: {outcome:?}");
        }
        g.set(GUEST_CR4, cr4);
        g.set(GUEST_RFLAGS, flags);
    });
}

#[test]
fn a_protection_key_keeps_the_supervisor_off_an_operand() {
    const PKE: u64 = 1 << 22;
    everywhere(|g| async move {
        vmxon(&g).await;
        let cr4 = g.get(GUEST_CR4);
        g.set(GUEST_CR4, cr4 | PKE);
        // The lowest GiB is user-mode, with key 0.
        for at in [0x1000, 0x2000] {
            g.poke(at, g.peek(at) | 4);
        }
        for (pkru, event) in [(0, None), (0b10, Some(0xB0E)), (0b01, Some(0xB0E)), (0b1100, None)] {
            g.core().pkru = pkru;
            let outcome = g.run(Op::Vmptrst).await;
            let seen = if let Outcome::Event(event) = outcome { Some(event.info) } else { None };
            assert_eq!(seen, event, "{pkru:#b}: {outcome:?}");
            assert_eq!(g.get(GUEST_CR4) & PKE, PKE);
        }
        g.core().pkru = 0b01;
        g.set(GUEST_CR4, cr4);
        assert!(!matches!(g.run(Op::Vmptrst).await, Outcome::Event(_)), "keys are off");
        g.core().pkru = 0;
    });
}

/// DR7 enables two breakpoints: 0 on writes of the operand's first byte, 1 on reads and writes of its upper half. The operand is in
/// memory, nvmx accesses it, and the trap is L2's (SDM vol. 3B, "Debug Registers"; vol. 3C, "Format of Pending-Debug-Exceptions").
#[test]
fn data_breakpoints_on_an_operand_trap_behind_the_instruction() {
    const ENABLED: u64 = 1 << 12;
    everywhere(|g| async move {
        hypervisor(&g, &[]).await;
        g.core().dr[..2].copy_from_slice(&[OPERAND, OPERAND + 4]);
        for (dr7, load, store) in [
            (0x400, 0, 0),
            (0x400 | 0b01 << 16 | 0b1111 << 20, 0, 0),
            (0x400 | 0b101 | 0b01 << 16 | 0b1111 << 20, ENABLED | 0b10, ENABLED | 0b11),
            (0x400 | 0b001 | 0b01 << 16 | 0b1111 << 20, 0, ENABLED | 0b11),
        ] {
            g.set(GUEST_DR7, dr7);
            for (op, pending) in [(Op::Vmptrld(VMCS), load), (Op::Vmptrst, store)] {
                g.set(GUEST_PENDING_DBG_EXCEPTIONS, 0);
                g.run(op).await;
                assert_eq!(g.get(GUEST_PENDING_DBG_EXCEPTIONS), pending, "{op:?} with DR7 {dr7:#x}");
            }
        }
        g.set(GUEST_DR7, 0x400);
    });
}
