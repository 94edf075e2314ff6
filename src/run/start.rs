//! From a settled machine to the run loop, on the processor that booted.

use super::end::{run_to_the_end, too_little_memory};
use super::smp;
use crate::boot::FoundProcessor;
use crate::guest::initial;
use crate::run::Machine;
use crate::run::build::{self, Common};
use crate::vmcs::access::Description;

/// What was decided at start, for the banner.
pub struct Decided {
    /// How L2's VMREAD and VMWRITE reach vmcs12.
    pub access: Description,
    /// Processors that run L2.
    pub cpus: u32,
}

/// Starts L2 on all CPUs; returns never. The processor was found to have all that nvmx needs. `announce` is called when all
/// is decided.
pub fn start(mut machine: Machine, announce: fn(&FoundProcessor, &Decided)) -> ! {
    let cpus = smp::start_others(&mut machine);
    let common = Common::new(&machine);
    let Machine { frames, processor, start, .. } = machine;
    let Some(mut cpu) = common.build(frames) else { too_little_memory() };
    smp::wait_for_others();
    announce(&processor, &Decided { access: cpu.config.access.description(), cpus });
    build::set_up(&mut cpu, |cpu| initial::write_boot_state(cpu, &start));
    run_to_the_end(&mut cpu)
}
