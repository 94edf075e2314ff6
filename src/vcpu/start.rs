//! From a settled machine to the run loop, on the processor that booted.

use super::build::{self, Common};
use super::{Cpu, initial, run, smp};
use crate::boot::{Machine, Processor};
use crate::hw::epitaph::{self, Status, Who};
use crate::hw::serial;
use crate::vmx::Field;
use l2_protocol::abi::Strategy;

/// What was decided at start, for the banner.
pub struct Decided {
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub strategy: Strategy,
    /// VMCSs that are not current are edited in memory.
    pub vmcs_in_memory: bool,
    /// Processors that run L2.
    pub cpus: u32,
}

/// Starts L2 on all CPUs; returns never. The processor was found to have all that nvmx needs. `announce` is called when all
/// is decided.
pub fn start(mut machine: Machine, announce: fn(&Processor, &Decided)) -> ! {
    let cpus = smp::start_others(&mut machine);
    let common = Common::new(&machine);
    let Machine { frames, processor, strategy, start, .. } = machine;
    let Some(mut cpu) = common.build(frames) else { too_little_memory() };
    smp::wait_for_others();
    announce(&processor, &Decided { strategy, vmcs_in_memory: cpu.config.layout.is_some(), cpus });
    build::set_up(&mut cpu, |cpu| initial::write_boot_state(cpu, &start));
    run_to_the_end(&mut cpu)
}

/// The frames do not suffice.
pub(super) fn too_little_memory() -> ! {
    log::error!("too little memory: nvmx's frames do not suffice for its VMCSs and EPT tables");
    epitaph::end(Status::Fail)
}

/// Runs L2 and L3 on this processor until the machine ends: one epitaph, the last exits before it.
pub(super) fn run_to_the_end(cpu: &mut Cpu) -> ! {
    let reason = run::run(cpu);
    serial::dying();
    smp::stop_others(cpu);
    for (reason, l3) in cpu.vmx.counters.recent() {
        log::info!("exit of {}: {reason}", if l3 { "L3" } else { "L2" });
    }
    let rip = cpu.vmx.read(Field::GUEST_RIP);
    epitaph::epitaph(Who::L2, format_args!("rip {rip:#x}"), format_args!("{reason}"))
}
