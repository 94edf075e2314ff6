//! The trace in nvmx's memory: each exit of L2 and L3, in order, with what followed; and nothing else is different.

use crate::kit::*;
use l2_protocol::trace::TracedExit;
use nvmx::trace::ring::Reader;
use nvmx::vmx::exit::BasicReason as R;
use nvmx_machine::guest::{Guest, Op};
use nvmx_machine::{Setup, World};

/// CPUID of L3 that L2 handles, twice, and an access that nvmx completes alone.
async fn program(g: Guest) {
    hypervisor(&g, &[]).await;
    launch(&g).await;
    for _ in 0..2 {
        g.run(Op::Cpuid).await;
        g.see(exit_information(&g).await);
        g.run(Op::Vmresume).await;
    }
}

fn traced(setup: Setup) -> (Vec<TracedExit>, u64, Vec<String>) {
    let mut world = World::new(setup);
    world.boot(program);
    let cpu = &world.cpu;
    let (phys, Some(trace)) = (&cpu.phys, &cpu.trace) else { return (Vec::new(), 0, world.guest.log()) };
    let reader = Reader::new(phys, trace.ring.hpa());
    let exits = reader.kept(phys).filter_map(|n| reader.get(phys, n)).map(TracedExit::of).collect();
    (exits, reader.written(phys), world.guest.log())
}

#[test]
fn each_exit_is_there_with_what_was_entered_after_it() {
    for setup in Setup::all() {
        let (exits, written, log) = traced(Setup { trace: 1000, ..setup });
        let (none, _, without) = traced(setup);
        assert!(none.is_empty() && log == without, "a trace changes what the guests see");
        assert_eq!(written, exits.len() as u64);
        // The end, in which nothing is entered any more, is no exit.
        let after = exits.iter().position(|exit| exit.level == 3).expect("an exit of L3");
        let (before, from) = exits.split_at(after);
        assert!(before.iter().all(|exit| exit.level == 2));
        let launch = before.last().expect("VMLAUNCH");
        assert_eq!((launch.reason, launch.next_level), (R::VMLAUNCH.0.into(), 3));
        let reasons = |of: &[TracedExit], level| -> Vec<u32> {
            of.iter().filter(|exit| exit.level == level).map(|exit| exit.reason).collect()
        };
        assert_eq!(reasons(from, 3), [u32::from(R::CPUID.0); 2]);
        let resumed = from.iter().filter(|exit| exit.reason == R::VMRESUME.0.into());
        assert!(resumed.clone().count() == 2 && resumed.clone().all(|exit| (exit.level, exit.next_level) == (2, 3)));
        for exit in from.iter().filter(|exit| exit.level == 3) {
            assert_eq!((exit.next_level, exit.next_rip), (2, HANDLER), "{exit:x?}");
            assert_ne!(exit.vmcs, exit.next_vmcs);
            assert!(exit.exited <= exit.entered && exit.counts[0] > 0);
        }
        // What was entered is what exits next.
        for pair in exits.windows(2) {
            assert_eq!((pair[0].next_level, pair[0].next_vmcs), (pair[1].level, pair[1].vmcs));
        }
    }
}

#[test]
fn a_small_ring_has_the_last_exits() {
    let setup = Setup::all()[0];
    let (all, written, _) = traced(Setup { trace: 1000, ..setup });
    let (some, count, _) = traced(Setup { trace: 3, ..setup });
    let without_time = |exits: &[TracedExit]| -> Vec<(u32, u64, u8)> {
        exits.iter().map(|e| (e.reason, e.rip, e.next_level)).collect()
    };
    assert_eq!((count, some.len()), (written, 3));
    assert_eq!(without_time(&some), without_time(&all[all.len() - 3..]));
}
