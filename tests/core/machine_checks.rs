//! Machine checks that hit nvmx and leave it alone: one before any instruction of nvmx reaches L2 or L3 once, as if it had come while
//! the guest ran; what L2 is told of it is what the processor wrote.

use crate::kit::*;
use nvmx::trace::KillReason;
use nvmx_machine::guest::{Guest, Op};
use nvmx_machine::processor::{Delivered, Exit, Level, MCG_STATUS};
use nvmx_machine::world::End;
use nvmx_machine::{Setup, World};

/// Hardware exception 18, as an event and as exit information.
const MC: u32 = 0x312;
const EXIT: u64 = 0x8000_0312;
/// Restart IP valid, machine check in progress.
const STATUS: u64 = 5;
/// CR4.PAE, MCE, VMXE.
const CR4: u64 = 0x2060;
/// More than nvmx executes in what is tested.
const MANY: u32 = 4000;

/// What became of machine checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Taken {
    by_l2: u32,
    by_l3: u32,
    exits: u32,
}

impl Taken {
    fn all(self) -> u32 {
        self.by_l2 + self.by_l3 + self.exits
    }

    /// Looks at what the last instruction brought: whoever takes a machine check ends it.
    fn look(&mut self, g: &Guest) -> Vec<Delivered> {
        let events = std::mem::take(&mut g.core().delivered);
        for event in events.iter().filter(|event| event.info == MC) {
            assert_eq!(event.error, None);
            // An exit may follow in the same step.
            match g.level() {
                Level::L2 => self.by_l2 += 1,
                Level::L3 => self.by_l3 += 1,
            }
            end(g);
        }
        events
    }

    /// L2 runs, after an exit of L3: was it one by a machine check?
    async fn exit(&mut self, g: &Guest) -> bool {
        let exits = g.vmread(VM_EXIT_REASON).await == Some(0);
        self.look(g);
        if exits {
            assert_eq!(g.vmread(VM_EXIT_INTR_INFO).await, Some(EXIT));
            self.look(g);
            assert_eq!(g.vmread(IDT_VECTORING_INFO_FIELD).await, Some(0));
            self.look(g);
            assert_eq!(g.get(GUEST_INTERRUPTIBILITY_INFO) & 8, 0, "no NMI blocks");
            self.exits += 1;
            end(g);
        }
        exits
    }
}

/// The handler reads the status and ends the machine check.
fn end(g: &Guest) {
    let mut core = g.core();
    assert_eq!(core.msrs.insert(MCG_STATUS, 0), Some(STATUS), "the status is the guest's to end");
}

/// L2 with CR4.MCE, and an L3 with or without, that exits by machine checks or not.
async fn both(g: &Guest, exits: bool, mce: u64) {
    hypervisor(g, &[(HOST_CR4, CR4), (GUEST_CR4, 0x2020 | mce), (EXCEPTION_BITMAP, u64::from(exits) << 18)]).await;
    g.run(Op::MovToCr4(CR4)).await;
}

#[test]
fn before_any_instruction_for_l2_it_is_l2s_once() {
    everywhere(|g| async move {
        g.run(Op::MovToCr4(0x60)).await;
        let mut hits = 0;
        for n in 0..MANY {
            g.machine_check_in(n);
            let mut taken = Taken::default();
            for op in [Op::Cpuid, Op::Rdmsr(0x480), Op::Xsetbv(0, 1)] {
                g.run(op).await;
                taken.look(&g);
            }
            if g.no_machine_check() {
                break;
            }
            hits += 1;
            assert_eq!(taken, Taken { by_l2: 1, ..Taken::default() }, "before instruction {n}");
        }
        assert!(hits > 20 && hits < MANY, "{hits}");
    });
}

#[test]
fn between_l3_and_l2_it_is_an_exit_or_one_exception() {
    everywhere(|g| async move {
        for exits in [true, false] {
            g.run(Op::Vmxoff).await;
            both(&g, exits, 0x40).await;
            launch(&g).await;
            let (mut hits, mut kinds) = (0, Taken::default());
            for n in 0..MANY {
                g.machine_check_in(n);
                let mut taken = Taken::default();
                // L3's CPUID is L2's, and a page of L3 is nvmx's to fill.
                for _ in 0..2 {
                    g.run(Op::Cpuid).await;
                    taken.look(&g);
                    while g.level() == Level::L2 {
                        taken.exit(&g).await;
                        g.run(Op::Vmresume).await;
                        taken.look(&g);
                    }
                    g.run(Op::Write(0x4_0000 + (u64::from(n) << 12 & 0xF_F000), 1)).await;
                    taken.look(&g);
                    while g.level() == Level::L2 {
                        taken.exit(&g).await;
                        g.run(Op::Vmresume).await;
                        taken.look(&g);
                    }
                }
                if g.no_machine_check() {
                    break;
                }
                hits += 1;
                assert_eq!(taken.all(), 1, "exits: {exits}, before instruction {n}: {taken:?}");
                kinds.by_l2 += taken.by_l2;
                kinds.by_l3 += taken.by_l3;
                kinds.exits += taken.exits;
            }
            assert!(hits > 15 && hits < MANY && kinds.by_l2 > 0, "{hits} {kinds:?}");
            assert_eq!((kinds.exits > 0, kinds.by_l3 > 0), (exits, !exits), "{kinds:?}");
            leave(&g).await;
            // L2 finds its own fields.
            assert_eq!(g.vmread(VM_ENTRY_INTR_INFO_FIELD).await.map(|info| info >> 31), Some(0));
            assert_eq!(g.vmread(CPU_BASED_VM_EXEC_CONTROL).await.map(|v| v >> 27 & 1), Some(0));
        }
    });
}

#[test]
fn what_l2_injects_comes_first() {
    everywhere(|g| async move {
        for exits in [true, false] {
            g.run(Op::Vmxoff).await;
            both(&g, exits, 0x40).await;
            let mut hits = 0;
            for n in 0..MANY {
                let event = [(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0B0D), (VM_ENTRY_EXCEPTION_ERROR_CODE, 8)];
                write(&g, &event).await;
                g.core().delivered.clear();
                g.machine_check_in(n);
                let mut taken = Taken::default();
                g.run(if n == 0 { Op::Vmlaunch } else { Op::Vmresume }).await;
                let mut seen: Vec<_> = taken.look(&g).into_iter().map(|event| event.info).collect();
                // It comes before the entry, to L2, which goes on.
                if seen == [MC] {
                    assert_eq!(g.level(), Level::L3);
                    seen = vec![0xB0D, MC];
                }
                if g.level() == Level::L2 && taken.exit(&g).await {
                    seen.push(MC);
                    g.run(Op::Vmresume).await;
                }
                let over = g.no_machine_check();
                if g.level() == Level::L3 {
                    leave(&g).await;
                    taken.look(&g);
                }
                if over {
                    break;
                }
                hits += 1;
                assert_eq!(taken.all(), 1, "before instruction {n}: {taken:?}");
                assert_eq!(seen.first(), Some(&0xB0D), "before instruction {n}");
            }
            assert!(hits > 5 && hits < MANY, "{hits}");
        }
    });
}

#[test]
fn in_l2_it_comes_behind_an_event_that_is_delivered_again() {
    everywhere(|g| async move {
        g.run(Op::MovToCr4(0x60)).await;
        g.set(GUEST_RFLAGS, 0x202);
        g.core().delivered.clear();
        let at = 0x6_0000;
        let hit = Exit { qualification: 2 | 3 << 7, physical: at, linear: at, vectoring: 0x8000_0055, ..Exit::new(48) };
        let mut hits = 0;
        for n in 0..MANY {
            g.machine_check_in(n);
            g.exit(hit).await;
            if g.no_machine_check() {
                break;
            }
            hits += 1;
            let events: Vec<_> = g.core().delivered.iter().map(|event| event.info).collect();
            assert_eq!(events, [0x55, MC], "before instruction {n}");
            Taken::default().look(&g);
            // No trap of nvmx's is left.
            g.run(Op::Clts).await;
            assert_eq!(Taken::default().look(&g), []);
        }
        assert!(hits > 3, "{hits}");
    });
}

#[test]
fn states_in_which_l3_executes_nothing_end_too() {
    everywhere(|g| async move {
        for (activity, exits) in [(1, true), (1, false), (2, true), (2, false), (3, true), (3, false)] {
            g.run(Op::Vmxoff).await;
            both(&g, exits, 0x40).await;
            write(&g, &[(GUEST_ACTIVITY_STATE, activity), (GUEST_RFLAGS, 0x202)]).await;
            g.core().delivered.clear();
            g.machine_check_in(0);
            let mut taken = Taken::default();
            g.run(Op::Vmlaunch).await;
            taken.look(&g);
            // It hit before nvmx knew that L3 is to run.
            if taken.by_l2 == 0 && g.level() == Level::L2 {
                let shuts_down = g.vmread(VM_EXIT_REASON).await == Some(2);
                if shuts_down {
                    taken.exits += 1
                } else {
                    assert!(taken.exit(&g).await)
                }
                assert_eq!(g.vmread(GUEST_ACTIVITY_STATE).await, Some(activity), "{activity} {exits}");
                assert_eq!(shuts_down, activity == 3 && !exits);
            }
            assert_eq!(taken.all(), 1, "{activity} {exits}: {taken:?}");
            g.core().msrs.insert(MCG_STATUS, 0);
            if g.level() == Level::L3 {
                leave(&g).await;
            }
        }
    });
}

#[test]
fn an_l3_without_cr4_mce_shuts_down_and_its_l2_goes_on() {
    everywhere(|g| async move {
        both(&g, false, 0).await;
        launch(&g).await;
        let mut shut_down = 0;
        for n in 0..MANY {
            g.machine_check_in(n);
            let mut taken = Taken::default();
            g.run(Op::Write(0x4_0000 + (u64::from(n) << 12 & 0xF_F000), 1)).await;
            if g.level() == Level::L2 {
                assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(2), "triple fault");
                shut_down += 1;
                end(&g);
                g.run(Op::Vmresume).await;
            }
            let events = taken.look(&g);
            if g.no_machine_check() {
                break;
            }
            assert_eq!(events, []);
        }
        assert!(shut_down > 0, "{shut_down}");
    });
}

#[test]
fn an_l2_without_cr4_mce_ends_its_machine() {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(|g| async move {
            g.machine_check_in(0);
            g.run(Op::Cpuid).await;
        });
        assert!(matches!(end, End::Killed(KillReason::MachineCheck)), "{end:?}");
    }
}

#[test]
fn where_nobody_runs_nvmx_ends_it() {
    for setup in Setup::all() {
        let mut world = World::new(Setup { booted: false, ..setup });
        let end = world.boot(|g| async move {
            let mut hits = 0;
            for n in 0..MANY {
                g.machine_check_in(n);
                // An INIT: L2's processor waits for a start-up message.
                g.exit(Exit::new(3)).await;
                if g.no_machine_check() {
                    break;
                }
                hits += 1;
                assert_eq!(g.core().delivered, []);
                assert_eq!(g.core().msrs.get(&MCG_STATUS), Some(&0), "the next one is no shutdown");
                assert_eq!(g.get(GUEST_ACTIVITY_STATE), 3);
            }
            assert!(hits > 3, "{hits}");
        });
        assert!(matches!(end, End::Over), "{end:?}");
    }
}

#[test]
fn an_nmi_comes_behind_it() {
    everywhere(|g| async move {
        g.run(Op::MovToCr4(0x60)).await;
        g.core().delivered.clear();
        g.machine_check_in(0);
        g.nmi_at_next_exit();
        g.run(Op::Cpuid).await;
        assert_eq!(g.core().delivered.iter().map(|event| event.info).collect::<Vec<_>>(), [MC, 0x202]);
    });
}

#[test]
fn an_entry_that_fails_by_a_machine_check_is_made_again_behind_it() {
    everywhere(|g| async move {
        both(&g, true, 0x40).await;
        // Of L2.
        g.core().delivered.clear();
        g.core().machine_check_at_entry = true;
        g.run(Op::Cpuid).await;
        assert_eq!(Taken::default().look(&g).iter().map(|event| event.info).collect::<Vec<_>>(), [MC]);
        // Of L3, by L2: it has run, as an exit of an instruction says.
        g.core().machine_check_at_entry = true;
        g.run(Op::Vmlaunch).await;
        let mut taken = Taken::default();
        assert!(g.level() == Level::L2 && taken.exit(&g).await);
        g.run(Op::Vmresume).await;
        assert_eq!(g.level(), Level::L3);
        // By nvmx, behind an exit that L2 does not see.
        g.core().machine_check_at_entry = true;
        g.run(Op::Write(0x4_0000, 1)).await;
        assert!(g.level() == Level::L2 && taken.exit(&g).await);
        g.run(Op::Vmresume).await;
        assert_eq!((g.level(), taken.all()), (Level::L3, 2));
    });
}

#[test]
fn an_entry_that_fails_by_a_machine_check_of_nvmx_s_own_ends_the_machine() {
    for setup in Setup::all() {
        let mut world = World::new(setup);
        let end = world.boot(|g| async move {
            // Not restartable.
            g.core().next_status = 4;
            g.core().machine_check_at_entry = true;
            g.run(Op::Cpuid).await;
        });
        assert!(matches!(end, End::Killed(KillReason::EntryFailed { reason: 0x8000_0029, .. })), "{end:?}");
    }
}
