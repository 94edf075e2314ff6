//! All processors of the machine: each runs L2 under nvmx, or is parked where L2 cannot start it.
//!
//! Before L2 runs, nvmx starts every processor that firmware lists. One that is used builds its own
//! [`Cpu`] and enters L2 in the wait-for-SIPI state, where it stays until L2 starts it. One that is not used
//! stays in VMX root operation, which blocks INIT, and halts: L2 finds a processor that does not start.
//!
//! Nothing of this is shared afterwards (ADR 0010) but whether L2 runs on more than one of them.

use crate::boot::options::StopOption;
use crate::boot::{CpuList, FoundProcessor, acpi};
use crate::cpu::{Cpu, others};
use crate::emul::init;
use crate::hw::apic::LocalApic;
use crate::hw::boot::ap::Trampoline;
use crate::hw::cpu;
use crate::hw::epitaph::{self, Status};
use crate::hw::halt::halt;
use crate::hw::msr;
use crate::mm::FramePool;
use crate::mm::paging::PageRights;
use crate::run::Machine;
use crate::run::build::{self, Common};
use crate::run::end::{run_to_the_end, too_little_memory};
use crate::sync::start::Start;
use core::fmt::Display;
use core::sync::atomic::{AtomicU32, Ordering};
use raw_cpuid::CpuId;
use spin::{Mutex, Once};

/// What the others build themselves from.
static COMMON: Once<Common> = Once::new();
/// The frames of the processor that is started next.
static FRAMES: Mutex<Option<FramePool>> = Mutex::new(None);
/// How far the start is.
static START: Start<AtomicU32> = Start::new(AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
/// How many were started.
static OTHERS: AtomicU32 = AtomicU32::new(0);
/// Starts all other processors of the machine, which get their share of its frames; returns how many CPUs L2 has. They
/// wait until [`wait_for_others`] is called, at the latest.
#[inline(never)]
pub fn start_others(machine: &mut Machine) -> u32 {
    let own_id = machine.processor.apic_id;
    let others: CpuList = machine.cpus.iter().copied().filter(|id| *id != own_id).collect();
    if others.is_empty() {
        return 1;
    }
    let Some(apic) = LocalApic::find(&machine.guest) else {
        give_up("the local APIC is off: no processor can be started")
    };
    let Some(trampoline) = Trampoline::new(&machine.memory, &machine.tables, &mut machine.frames, machine.phys) else {
        give_up("no page below 640 KiB is free to start processors in")
    };

    let all = 1 + others.len();
    let used = used(machine, &others);
    others::set_used_cpus(used as u32);
    hide(machine, |id| id == own_id || others.iter().take(used - 1).any(|other| *other == id));
    COMMON.call_once(|| Common::new(machine));
    for (i, other) in others.iter().enumerate() {
        let mut pool = FramePool::new(machine.layout.share(1 + i, used, all));
        // nvmx requires execute-disable.
        let Machine { tables, phys, .. } = machine;
        let idle = cpu::prepare(1 + i as u32, cpu::this().idt(), PageRights::DATA, &mut pool, tables, *phys);
        let Ok(idle) = idle else { too_little_memory() };
        *FRAMES.lock() = Some(pool);
        let arrived = || START.arrived() as usize == 1 + i;
        if !apic.reaches(*other) || !trampoline.start(apic, *other, idle, begin, arrived) {
            // L2 might have more luck, and run there without nvmx.
            give_up(format_args!("the processor with APIC id {other} does not start"));
        }
    }
    trampoline.remove(&mut machine.frames);
    OTHERS.store(others.len() as u32, Ordering::Release);
    START.go();
    used as u32
}

/// L2 finds the processors that it does not get disabled in firmware's list, and does not wait for them.
fn hide(machine: &Machine, keep: impl Fn(u32) -> bool) {
    if let Some(Err(error)) = machine.rsdp.as_ref().map(|rsdp| acpi::disable(rsdp, &machine.guest, keep)) {
        log::warn!("{error}: L2 finds processors in the list that it does not get");
    }
}

/// How many processors run L2: the one that booted, and as many of the others, from the first on.
fn used(machine: &Machine, others: &[u32]) -> usize {
    if !machine.processor.vmx.misc.activity_wait_for_sipi() && machine.options.stop == StopOption::Never {
        log::warn!(
            "this CPU lacks activity state wait-for-SIPI (IA32_VMX_MISC bit 8): L2 has one CPU, the rest is parked"
        );
        return 1;
    }
    let all = 1 + others.len();
    let wanted = machine.options.cpus.map_or(all, |cpus| all.min(cpus as usize));
    let used = wanted.min(machine.layout.used);
    if let Some(without) = others.get(used - 1..wanted - 1).filter(|ids| !ids.is_empty()) {
        log::warn!("too little memory for {wanted} CPUs: L2 has {used}, and not those with APIC ids {without:?}");
    }
    used
}

/// Waits until all other processors are where L2 can start them, or where it cannot.
pub fn wait_for_others() {
    START.wait_ready(OTHERS.load(Ordering::Acquire));
}

/// What a started processor does.
extern "C" fn begin() -> ! {
    let frames = FRAMES.lock().take();
    START.arrive();
    // Before VMX is touched: there may be none.
    if COMMON.get().is_some_and(Common::stops) {
        halt()
    }
    let (Some(common), Some(frames)) = (COMMON.get(), frames) else { too_little_memory() };
    same_as_the_first(common);
    if cpu::this().index() < others::used_cpus() { run(common, frames) } else { park(common, frames) }
}

/// What nvmx decided by the processor that booted must hold on this one: a hybrid machine may have two kinds.
fn same_as_the_first(common: &Common) {
    let (own, _) = FoundProcessor::examine(&CpuId::new(), |index| msr::rdmsr_safe(index).unwrap_or(0));
    if let Some(what) = common.processor().differences(&own).next() {
        give_up(format_args!(
            "the processor with APIC id {} differs from the one that booted in {what}: nvmx needs them to be equal; switch one \
             kind of cores off in the firmware's set-up",
            own.apic_id
        ));
    }
}

/// Runs L2, once L2 starts this processor.
fn run(common: &Common, frames: FramePool) -> ! {
    let Some(mut cpu) = common.build(frames) else { too_little_memory() };
    build::set_up(&mut cpu, init::reset);
    START.ready();
    run_to_the_end(&mut cpu)
}

/// Never runs anything: VMX root operation blocks INIT, and a SIPI does nothing without.
fn park(common: &Common, mut frames: FramePool) -> ! {
    if common.enter_vmx(&mut frames).is_none() {
        give_up("a processor refuses VMX operation");
    }
    cpu::this().park();
    START.ready();
    halt()
}

/// How many processors have come into nvmx beside the one that booted.
pub fn started() -> u32 {
    START.arrived()
}

/// The machine ends by this processor's word: the others are to stop.
pub fn stop_others(cpu: &Cpu) {
    if others::used_cpus() > 1 {
        if let Some(apic) = LocalApic::find_or_enable(&cpu.guest) {
            apic.stop_others();
        }
    }
}

fn give_up(why: impl Display) -> ! {
    log::error!("{why}");
    epitaph::end(Status::Fail)
}
