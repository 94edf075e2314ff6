//! How it ends.

use super::{run_loop, smp, tracing};
use crate::cpu::Cpu;
use crate::hw::cpu;
use crate::hw::epitaph::{self, Status, Who};
use crate::hw::serial;
use crate::trace::Ran;
use crate::vmx::Field;

/// Bytes. A compiler that moves values once more would soon overflow a stack of which less is left.
const LITTLE_STACK: u64 = 24 << 10;

/// The frames do not suffice.
pub(super) fn too_little_memory() -> ! {
    log::error!("too little memory: nvmx's frames do not suffice for its VMCSs and EPT tables");
    epitaph::end(Status::Fail)
}

/// Runs L2 and L3 on this processor until the machine ends: one epitaph, the last exits before it.
pub(super) fn run_to_the_end(cpu: &mut Cpu) -> ! {
    let left = cpu::this().stack_left();
    if left < LITTLE_STACK {
        log::warn!("the start left {left} bytes of a stack of nvmx");
    }
    let reason = run_loop::run(cpu);
    serial::dying();
    smp::stop_others(cpu);
    tracing::tell(cpu);
    for (reason, ran) in cpu.vmx.counters.recent() {
        log::info!("exit of {}: {reason}", if ran == Ran::Nested { "L3" } else { "L2" });
    }
    let rip = cpu.vmx.read(Field::GUEST_RIP);
    epitaph::epitaph(Who::Guest, format_args!("rip {rip:#x}"), format_args!("{reason}"))
}
