//! Where a hypervisor below keeps VMCSs in memory, nvmx executes VMREAD and VMWRITE only of fields that it serves without an exit.

use crate::kit::*;
use nvmx::vmx::Field;
use nvmx_machine::guest::{Op, Outcome};
use nvmx_machine::processor::Storage;
use nvmx_machine::world::{End, Setup, World};

/// Of what nvmx asks at an exit and an entry, what KVM 6.12 serves without an exit, as traces of it show.
const SERVED: [Field; 7] = [
    VM_EXIT_REASON,
    EXIT_QUALIFICATION,
    VM_EXIT_INTR_INFO,
    GUEST_PHYSICAL_ADDRESS,
    GUEST_INTERRUPTIBILITY_INFO,
    GUEST_SS_AR_BYTES,
    VMX_PREEMPTION_TIMER_VALUE,
];

const SAVE_EFER: u64 = 1 << 20;
const HOST_EFER: u64 = 1 << 21;
const LOAD_EFER: u64 = 1 << 15;
const SAVE_DEBUG: u64 = 1 << 2;
const UNRESTRICTED: u64 = 1 << 7;

/// Whatever L2's controls say of IA32_EFER, of the debug registers at exits and of the guest's mode.
#[test]
fn rounds_of_exit_and_entry_reach_no_field_that_exits() {
    for setup in Setup::all().into_iter().filter(|setup| setup.storage == Storage::InMemory) {
        for n in 0..32u64 {
            let bit = move |of: u64, value: u64| if n >> of & 1 == 1 { value } else { 0 };
            let world = &mut World::new(setup);
            let end = world.boot(move |g| async move {
                let exit = bit(0, SAVE_EFER) | bit(1, HOST_EFER) | bit(2, SAVE_DEBUG);
                let changes = [
                    control(VM_EXIT_CONTROLS, exit, SAVE_EFER | HOST_EFER | SAVE_DEBUG),
                    control(VM_ENTRY_CONTROLS, SAVE_DEBUG | bit(3, LOAD_EFER), LOAD_EFER),
                    control(SECONDARY_VM_EXEC_CONTROL, bit(4, UNRESTRICTED), 0),
                ];
                hypervisor(&g, &changes).await;
                launch(&g).await;
                leave(&g).await;
            });
            assert!(matches!(end, End::Over));
            world.guest.core().reached.clear();
            let end = world.run(|g| async move {
                for op in [Op::Vmcall, Op::Cpuid] {
                    assert_eq!(g.run(Op::Vmresume).await, Outcome::Left);
                    assert_eq!(g.run(op).await, Outcome::Left);
                }
            });
            assert!(matches!(end, End::Over));
            let reached = world.guest.core().reached.clone();
            // A program's end is a refused entry, whose error nvmx reads.
            let served = |field: &Field| SERVED.contains(field) || *field == VM_INSTRUCTION_ERROR;
            let others: Vec<&Field> = reached.iter().filter(|field| !served(field)).collect();
            assert!(others.is_empty(), "{:?}, {n:#b}: {others:?}", setup.strategy);
            assert!(reached.contains(&VM_EXIT_REASON));
        }
    }
}
