//! The usual way of an exit and of the entry after it: whatever makes one of them special in between counts, once or from then
//! on, and what comes after it is usual again. Seen by what the bare machine shows.

use crate::kit::{self, *};
use l2_protocol::abi::Strategy;
use nvmx_machine::guest::{Guest, Op, Outcome};
use nvmx_machine::processor::Storage;
use nvmx_machine::world::{End, Setup, World, agree};

const AREA: u64 = 0x3_8000;
/// An MSR bitmap of zeros: L3's accesses do not exit to L2.
const BITMAP: u64 = 0x3_9000;

/// Exits and entries without anything in between, each looked at from both sides.
async fn rounds(g: &Guest, what: &str) {
    for n in 0..3 {
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Left, "{what}, round {n}: error {}", g.error().await);
        g.see(format!("{what}: L3 in round {n}"));
        let op = if n == 1 { Op::Cpuid } else { Op::Vmcall };
        assert_eq!(g.run(op).await, Outcome::Left);
        look(g, &format!("{what}: L2 in round {n}")).await;
    }
}

/// The value of a control field with which nothing is special, with other bits: all that an entry and an exit may load and save of
/// IA32_EFER, IA32_PAT and debug registers is loaded and saved.
fn control(field: Field, set: u64, clear: u64) -> (Field, u64) {
    let all = match field {
        VM_EXIT_CONTROLS => 1 << 2 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21,
        VM_ENTRY_CONTROLS => 1 << 2 | 1 << 14 | 1 << 15,
        _ => 0,
    };
    kit::control(field, set | all & !clear, clear)
}

/// The fields of a vmcs12 whose entries and exits do nothing but what all do.
fn usual() -> Vec<(Field, u64)> {
    let mut fields = valid();
    fields.extend([control(VM_EXIT_CONTROLS, 0, 0), control(VM_ENTRY_CONTROLS, 0, 0)]);
    fields
}

/// A hypervisor whose controls are `changes`, with rounds after it.
async fn begin(g: &Guest, changes: &[(Field, u64)]) {
    for (n, (index, value)) in [(0x277u64, 0x0606u64), (0xC000_0081, 0x1111)].iter().enumerate() {
        g.poke(AREA + 16 * n as u64, *index);
        g.poke(AREA + 16 * n as u64 + 8, *value);
    }
    hypervisor(g, &usual()).await;
    write(g, changes).await;
    launch(g).await;
    leave(g).await;
    rounds(g, "begin").await;
}

const PAT: u64 = 0x0007_0406_0007_0406;
const SAVES: u64 = 1 << 18;
const HOST_LOADS: u64 = 1 << 19;
const LOADS: u64 = 1 << 14;

/// Each way in which vmcs12 can treat IA32_PAT.
fn ways() -> impl Iterator<Item = [(Field, u64); 2]> {
    (0..8u64).map(|n| {
        let bit = |of: u64, value: u64| if n >> of & 1 == 1 { value } else { 0 };
        [
            control(VM_EXIT_CONTROLS, bit(0, SAVES) | bit(1, HOST_LOADS), SAVES | HOST_LOADS),
            control(VM_ENTRY_CONTROLS, bit(2, LOADS), LOADS),
        ]
    })
}

#[test]
fn pat_goes_as_vmcs12_asks_whoever_writes_it() {
    for way in ways() {
        agree(move |g| async move {
            let [exit, entry] = way;
            begin(&g, &[exit, entry, control(CPU_BASED_VM_EXEC_CONTROL, 1 << 28, 0), (MSR_BITMAP, BITMAP)]).await;
            // L3's own, which its hypervisor does not see.
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
            g.run(Op::Wrmsr(0x277, 0x0604)).await;
            g.see("L3 wrote it");
            leave(&g).await;
            look(&g, "an exit behind it").await;
            rounds(&g, "L3 wrote PAT").await;
            assert!(g.vmwrite(GUEST_IA32_PAT, 0x0106).await);
            rounds(&g, "L2 wrote the guest's").await;
            assert!(g.vmwrite(HOST_IA32_PAT, 0x0601).await);
            rounds(&g, "L2 wrote the host's").await;
            for value in [0x0404, PAT] {
                g.run(Op::Wrmsr(0x277, value)).await;
                g.see("L2 wrote its own");
                rounds(&g, "L2 wrote PAT").await;
            }
        });
    }
}

/// Each way in which vmcs12 can treat IA32_EFER and the debug registers.
#[test]
fn what_is_carried_goes_as_vmcs12_asks_whoever_writes_it() {
    const EFER: u32 = 0xC000_0080;
    const DEBUG: u64 = 1 << 2;
    for n in 0..32u64 {
        agree(move |g| async move {
            let bit = |of: u64, value: u64| if n >> of & 1 == 1 { value } else { 0 };
            let exit = bit(0, 1 << 20) | bit(1, 1 << 21) | bit(2, DEBUG);
            let entry = bit(3, 1 << 15) | bit(4, DEBUG);
            let changes = [
                control(VM_EXIT_CONTROLS, exit, 1 << 20 | 1 << 21 | DEBUG),
                control(VM_ENTRY_CONTROLS, entry, 1 << 15 | DEBUG),
                control(CPU_BASED_VM_EXEC_CONTROL, 1 << 28, 0),
                (MSR_BITMAP, BITMAP),
            ];
            begin(&g, &changes).await;
            for value in [0xD01, 0x501, 0xD00] {
                assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                g.run(Op::Wrmsr(EFER, value)).await;
                g.see("L3 wrote it");
                leave(&g).await;
                look(&g, "an exit behind it").await;
                rounds(&g, "L3 wrote EFER").await;
            }
            for (field, values) in [(GUEST_IA32_EFER, [0x501, 0xD01]), (GUEST_DR7, [0x401, 0x400])] {
                for value in values {
                    assert!(g.vmwrite(field, value).await);
                    rounds(&g, "L2 wrote the guest's").await;
                }
            }
            assert!(g.vmwrite(HOST_IA32_EFER, 0xD01).await);
            rounds(&g, "L2 wrote the host's").await;
            for value in [0xD01, 0xD00] {
                g.run(Op::Wrmsr(EFER, value)).await;
                g.see("L2 wrote its own");
                rounds(&g, "L2 wrote EFER").await;
            }
        });
    }
}

#[test]
fn what_l2_writes_to_its_msrs_is_loaded_over_by_the_next_exit() {
    agree(|g| async move {
        begin(&g, &[]).await;
        for (msr, value) in [(0x174, 0x10), (0x175, 0x7000), (0x176, 0x8000), (0xC000_0080, 0xD01)] {
            g.run(Op::Wrmsr(msr, value)).await;
            g.see(("wrote", msr));
            rounds(&g, "L2 wrote an MSR").await;
        }
        for (field, value) in
            [(HOST_IA32_SYSENTER_CS, 0x18), (HOST_IA32_SYSENTER_ESP, 0x9000), (HOST_IA32_SYSENTER_EIP, 0xA000)]
        {
            assert!(g.vmwrite(field, value).await);
            rounds(&g, "L2 wrote the host's MSR").await;
        }
    });
}

/// What becomes special by this change of a field, and usual again by the field's old value.
#[test]
fn a_change_of_controls_counts_from_the_next_entry_on() {
    for (what, changes) in [
        ("the timer", vec![control(PIN_BASED_VM_EXEC_CONTROL, 1 << 6, 0), (VMX_PREEMPTION_TIMER_VALUE, 1 << 30)]),
        ("a list for entries", vec![(VM_ENTRY_MSR_LOAD_ADDR, AREA), (VM_ENTRY_MSR_LOAD_COUNT, 2)]),
        ("a list for exits", vec![(VM_EXIT_MSR_LOAD_ADDR, AREA), (VM_EXIT_MSR_LOAD_COUNT, 2)]),
        ("a list to store", vec![(VM_EXIT_MSR_STORE_ADDR, AREA), (VM_EXIT_MSR_STORE_COUNT, 2)]),
        ("NMIs", vec![control(PIN_BASED_VM_EXEC_CONTROL, 1 << 3, 0)]),
        ("virtual NMIs", vec![control(PIN_BASED_VM_EXEC_CONTROL, 1 << 3 | 1 << 5, 0)]),
        ("no VPID", vec![control(SECONDARY_VM_EXEC_CONTROL, 0, 1 << 5), (VIRTUAL_PROCESSOR_ID, 0)]),
        ("another VPID", vec![control(SECONDARY_VM_EXEC_CONTROL, 1 << 5, 0), (VIRTUAL_PROCESSOR_ID, 77)]),
        ("EFER stays", vec![control(VM_EXIT_CONTROLS, 0, 1 << 21 | 1 << 20)]),
        ("debug registers stay", vec![control(VM_EXIT_CONTROLS, 0, 1 << 2), control(VM_ENTRY_CONTROLS, 0, 1 << 2)]),
        ("blocking by NMI", vec![(GUEST_INTERRUPTIBILITY_INFO, 8)]),
        ("another stack", vec![(HOST_RSP, 0x7770)]),
        ("other segments", vec![(HOST_ES_SELECTOR, 0), (HOST_FS_BASE, 0x1234)]),
    ] {
        agree(move |g| {
            let changes = changes.clone();
            async move {
                begin(&g, &[]).await;
                let mut before = vec![];
                for (field, _) in &changes {
                    before.push((*field, g.vmread(*field).await.unwrap_or_default()));
                }
                for _ in 0..2 {
                    write(&g, &changes).await;
                    rounds(&g, what).await;
                    write(&g, &before).await;
                    rounds(&g, "as before").await;
                }
            }
        });
    }
}

/// The timer runs while L3 does, which the model leaves to the test: L2 finds what is left of it, or what it set.
#[test]
fn the_timer_stops_and_starts_with_l3() {
    const SAVES_TIMER: u64 = 1 << 22;
    for saves in [SAVES_TIMER, 0] {
        agree(move |g| async move {
            let exit = control(VM_EXIT_CONTROLS, saves, SAVES_TIMER);
            begin(&g, &[control(PIN_BASED_VM_EXEC_CONTROL, 1 << 6, 0), (VMX_PREEMPTION_TIMER_VALUE, 0x1000), exit])
                .await;
            for left in [0x800, 0x400, 0] {
                for op in [Op::Vmcall, Op::Cpuid, Op::Vmcall] {
                    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                    g.set(VMX_PREEMPTION_TIMER_VALUE, left);
                    assert_eq!(g.run(op).await, Outcome::Left);
                    look(&g, "L3 ran for a while").await;
                    g.note(format!("the timer: {:?}", g.vmread(VMX_PREEMPTION_TIMER_VALUE).await));
                    assert!(g.vmwrite(VMX_PREEMPTION_TIMER_VALUE, 0x2000 + left).await);
                }
            }
            // It is over as soon as L3 runs.
            assert!(g.vmwrite(VMX_PREEMPTION_TIMER_VALUE, 0).await);
            for _ in 0..2 {
                g.note(format!("{:?}", g.run(Op::Vmresume).await));
                look(&g, "no time for L3").await;
                g.note(format!("the timer: {:?}", g.vmread(VMX_PREEMPTION_TIMER_VALUE).await));
            }
        });
    }
}

/// The two things that an entry by the usual way sees to in passing, alone and together.
#[test]
fn a_window_that_opens_and_a_violation_that_was_answered_count_for_the_entry_behind() {
    const RDTSC_EXITS: u64 = 1 << 12;
    const AT: u64 = EPT + 0x3000 + 8 * 0x61;
    agree(|g| async move {
        begin(&g, &[]).await;
        for (opens, violates, maps) in
            (0..8u64).map(|n| (n & 1 == 0, n & 2 == 0, n & 4 == 0)).chain([(true, true, true)])
        {
            g.poke(AT, 0);
            g.run(Op::Invept(2, 0)).await;
            // From here on nothing but these two is stale.
            rounds(&g, "behind INVEPT").await;
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
            let op = if violates { Op::Read(0x6_1000) } else { Op::Vmcall };
            assert_eq!(g.run(op).await, Outcome::Left);
            look(&g, "before the entry").await;
            if maps {
                g.poke(AT, 0x61 << 12 | 0x37);
                g.poke(0x6_1000, 0xAA);
            }
            let bit = if opens { RDTSC_EXITS } else { 0 };
            write(&g, &[control(CPU_BASED_VM_EXEC_CONTROL, bit, RDTSC_EXITS)]).await;
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
            for op in [Op::Read(0x6_1000), Op::Rdtsc] {
                let outcome = g.run(op).await;
                g.note(format!("{outcome:?}"));
                if outcome == Outcome::Left {
                    look(&g, "an exit behind it").await;
                    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                }
            }
            leave(&g).await;
            rounds(&g, "what was opened stays").await;
        }
    });
}

#[test]
fn vmcs12s_in_turn_have_each_its_own() {
    agree(|g| async move {
        begin(&g, &[(HOST_IA32_SYSENTER_ESP, 0x5000)]).await;
        make_current(&g, OTHER).await;
        write(&g, &usual()).await;
        write(&g, &[(HOST_IA32_SYSENTER_ESP, 0x6000), (VIRTUAL_PROCESSOR_ID, 9), (GUEST_IA32_PAT, 0x0606)]).await;
        launch(&g).await;
        leave(&g).await;
        for _ in 0..3 {
            rounds(&g, "one").await;
            g.run(Op::Vmptrld(VMCS)).await;
            rounds(&g, "the other").await;
            g.run(Op::Vmptrld(OTHER)).await;
        }
        // What was cleared is not resumed, and what another one replaced is made anew.
        g.run(Op::Vmclear(OTHER)).await;
        g.run(Op::Vmptrld(OTHER)).await;
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
        g.note(format!("error {}", g.error().await));
        launch(&g).await;
        leave(&g).await;
        rounds(&g, "launched again").await;
        // VPIDs that share a place with those in use.
        for vpid in [9 + 64, 9, 1 + 64] {
            assert!(g.vmwrite(VIRTUAL_PROCESSOR_ID, vpid).await);
            rounds(&g, "another VPID").await;
            g.run(Op::Vmptrld(VMCS)).await;
            rounds(&g, "the old one").await;
            g.run(Op::Vmptrld(OTHER)).await;
        }
    });
}

#[test]
fn what_changed_in_ept12_is_seen_by_the_next_entry() {
    agree(|g| async move {
        begin(&g, &[]).await;
        for n in 0..3u64 {
            g.poke(EPT + 0x3000 + 8 * 0x60, (0x60 + n) << 12 | 0x37);
            g.run(Op::Invept(1, EPT | 3 << 3 | 6)).await;
            g.poke((0x60 + n) << 12, 0xAA00 + n);
            assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
            g.run(Op::Read(0x6_0000)).await;
            g.see(("the page", n));
            leave(&g).await;
            rounds(&g, "behind INVEPT").await;
        }
        // A page that is not there, and the entry after it.
        g.poke(EPT + 0x3000 + 8 * 0x61, 0);
        g.run(Op::Invept(2, 0)).await;
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
        assert_eq!(g.run(Op::Read(0x6_1000)).await, Outcome::Left);
        look(&g, "a violation").await;
        g.poke(EPT + 0x3000 + 8 * 0x61, 0x61 << 12 | 0x37);
        rounds(&g, "behind a violation").await;
    });
}

#[test]
fn an_l2_that_may_not_enter_does_not() {
    agree(|g| async move {
        begin(&g, &[]).await;
        let (cs, ss) = (g.get(GUEST_CS_AR_BYTES), g.get(GUEST_SS_AR_BYTES));
        for (field, value) in [(GUEST_CS_AR_BYTES, 0xA0FB), (GUEST_SS_AR_BYTES, 0xC0F3)] {
            g.set(field, value);
        }
        let outcome = g.run(Op::Vmresume).await;
        g.see(("at privilege level 3", outcome));
        g.set(GUEST_CS_AR_BYTES, cs);
        g.set(GUEST_SS_AR_BYTES, ss);
        g.set(GUEST_INTERRUPTIBILITY_INFO, 2);
        assert_eq!(g.run(Op::Vmresume).await, Outcome::Done);
        g.note(format!("behind MOV SS: error {}", g.error().await));
        g.set(GUEST_INTERRUPTIBILITY_INFO, 0);
        rounds(&g, "allowed again").await;
    });
}

/// What is counted always of an exit and of the entry behind it: three reads and two exchanges, one for the exit with its writes, one
/// for the entry with its reads, and here four selectors of L2's that are null (docs/adr/0027). Each takes one instruction.
#[test]
fn little_is_counted_always_of_an_exit_that_is_usual() {
    const ALWAYS: u64 = 11;
    let updates = |setup: &Setup, rounds: usize| {
        let mut world = World::new(*setup);
        let end = world.boot(move |g| async move {
            hypervisor(&g, &usual()).await;
            launch(&g).await;
            leave(&g).await;
            for _ in 0..rounds {
                assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                assert_eq!(g.run(Op::Cpuid).await, Outcome::Left);
            }
        });
        assert!(matches!(end, End::Over));
        world.cpu.vmx.counters.updates()
    };
    let zero_copy = |setup: &Setup| setup.strategy == Strategy::ZeroCopy && setup.storage == Storage::OnChip;
    for setup in Setup::all().into_iter().filter(zero_copy) {
        let each = (updates(&setup, 30) - updates(&setup, 10)) / 20;
        assert_eq!(each, ALWAYS, "places that count an exit");
    }
}
