//! MSRs that an entry may not load.

use super::{Change::Set, NOT_CANONICAL, attempt};
use crate::guest::{Exit, Guest};
use l2_kit::{Check, cpu, fields as f, pages, protocol::Hex, serial::Serial};

/// All of it. The qualification is the number of the entry in the list.
pub fn all(guest: &mut Guest) {
    let list = pages::page();
    let address = pages::address(list);
    let good = u64::from(cpu::CSTAR);
    for (name, entries, wanted) in [
        ("load FS.base by the list", [(u64::from(cpu::FS_BASE), 0), (good, 0)], Exit::Failed(34, 1)),
        ("load GS.base by the list", [(good, 0x10), (u64::from(cpu::GS_BASE), 0)], Exit::Failed(34, 2)),
        ("load an x2APIC register by the list", [(good, 0x20), (0x808, 0)], Exit::Failed(34, 2)),
        ("load an MSR with high bits by the list", [(good, 0x30), (1 << 32 | good, 0)], Exit::Failed(34, 2)),
        ("load a bad value by the list", [(good, 0x50), (good, NOT_CANONICAL)], Exit::Failed(34, 2)),
        ("load good MSRs by the list", [(good, 0x60), (u64::from(cpu::LSTAR), 0x70)], Exit::Done(5)),
    ] {
        for (slot, (index, value)) in list.chunks_exact_mut(2).zip(entries) {
            slot.copy_from_slice(&[index, value]);
        }
        attempt(guest, name, &[(f::ENTRY_MSR_LOAD_ADDR, Set(address)), (f::ENTRY_MSR_LOAD_COUNT, Set(2))], wanted);
        // Those before the bad one stay loaded.
        Check::new(&mut Serial, format_args!("CSTAR after: {name}")).fact("value", Hex(cpu::rdmsr(cpu::CSTAR))).end();
    }
    cpu::wrmsr(cpu::CSTAR, 0);
    cpu::wrmsr(cpu::LSTAR, 0);
}
