//! What follows when ept02, or spp02 below it, has got an entry that L3 needs.

use crate::cpu::Cpu;
use crate::vmcs::slots::SlotId;
use l2_protocol::abi::Counter;

/// Counts a fill.
pub fn count(cpu: &mut Cpu) {
    cpu.vmx.counters.bump(Counter::Ept02Fills);
}

/// Lets vmcs02, which is current, run on the ept02 of its eptp12 as it is now, with what has to be flushed for that.
pub fn run_on_it(cpu: &mut Cpu, id: SlotId) {
    let slot = &mut cpu.nested.slots[id];
    let mut tables = Cpu::tables(&mut cpu.frames, &cpu.phys);
    let activation = cpu.ept02.activate(slot.eptp12(), &cpu.guest, None, &mut tables);
    slot.vmcs02.run_on(&mut cpu.vmx, activation, cpu.ept01.eptp());
}
