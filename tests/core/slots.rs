//! Slots grow with the vmcs12s that L2 has active: none is stored to L2's memory before it must be
//! ([ADR 0016](../../docs/adr/0016-slots-and-roots-grow.md)). L2 cannot tell, but its memory can.

use crate::kit::*;
use nvmx_machine::guest::{Guest, Op};
use nvmx_machine::world::End;
use nvmx_machine::{Setup, World};

/// Slots at most.
const MOST: u64 = 64;
/// Where the first of many vmcs12s lies.
const FIRST: u64 = 0x4_0000;

fn region(number: u64) -> u64 {
    FIRST + number * 0x1000
}

/// Whether anything stands in a region after the revision and the abort indicator.
fn is_stored(g: &Guest, number: u64) -> bool {
    (8..0x1000).step_by(8).any(|at| g.peek(region(number) + at) != 0)
}

async fn activate(g: &Guest, number: u64) {
    g.run(Op::Vmptrld(region(number))).await;
    assert!(g.vmwrite(HOST_RSP, 0x1000 + number).await);
}

#[test]
fn as_many_stay_active_as_there_are_slots_and_then_the_one_longest_out_of_use_goes() {
    for setup in Setup::all() {
        let end = World::new(setup).boot(|g| async move {
            vmxon(&g).await;
            for number in 0..MOST {
                make_current(&g, region(number)).await;
                assert!(g.vmwrite(HOST_RSP, 0x1000 + number).await);
            }
            assert_eq!((0..MOST).filter(|number| is_stored(&g, *number)).count(), 0);
            // The first one is used again, so that the second is the one longest out of use.
            activate(&g, 0).await;
            make_current(&g, region(MOST)).await;
            assert_eq!((0..=MOST).filter(|number| is_stored(&g, *number)).collect::<Vec<_>>(), [1]);
            g.run(Op::Vmptrld(region(1))).await;
            assert_eq!(g.vmread(HOST_RSP).await, Some(0x1001));
        });
        assert!(matches!(end, End::Over), "{:?} {:?}: {end:?}", setup.strategy, setup.storage);
    }
}

#[test]
fn of_those_that_were_cleared_eight_keep_their_slots() {
    for setup in Setup::all() {
        let end = World::new(setup).boot(|g| async move {
            vmxon(&g).await;
            // Each is stored by its VMCLEAR; the ninth takes the slot of one of the eight, and of no active one.
            make_current(&g, region(0)).await;
            for number in 1..20 {
                make_current(&g, region(number)).await;
                assert!(g.vmwrite(HOST_RSP, 0x1000 + number).await);
                g.run(Op::Vmclear(region(number))).await;
            }
            assert!(!is_stored(&g, 0));
            for number in 1..20 {
                assert!(is_stored(&g, number));
                g.run(Op::Vmptrld(region(number))).await;
                assert_eq!(g.vmread(HOST_RSP).await, Some(0x1000 + number));
            }
        });
        assert!(matches!(end, End::Over), "{:?} {:?}: {end:?}", setup.strategy, setup.storage);
    }
}
