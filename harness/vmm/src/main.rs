//! A small VMM on `/dev/kvm`: boots one multiboot image with its modules, or a Linux, shows its COM1, and counts what KVM had to do.
//!
//! It is made to be init of a Linux that runs on an emulated machine and has nothing else to do: then it mounts what it
//! needs, loads the modules of KVM, and switches the machine off at the end. It runs on any other Linux with KVM as well. As init
//! of Xen's control domain it starts Xen's tools instead, and has no machine of its own.
//!
//! The machine that its guest gets: CPUs as the host's KVM offers them (VMX included), memory, the interrupt controllers and
//! the timer of KVM, a clock, COM1 without interrupts, the exit ports of Bochs and QEMU, ACPI tables that list the CPUs.

mod acpi;
mod clock;
mod console;
mod counters;
mod cpu;
mod ending;
mod facts;
mod guest;
mod hotplug;
mod init;
mod linux;
mod loads;
mod machine;
mod multiboot;
mod plan;
mod program;
mod serial;
mod stats;
mod switching;
mod workload;
mod xen;

use anyhow::{Context, Result};
use console::Console;
use counters::Counters;
use l2_protocol::{Kind, Level};
use machine::{End, Machine};
use plan::{Plan, Role};
use std::path::PathBuf;

/// Where init finds its orders.
const PLAN_OF_INIT: &str = "/plan";

fn main() {
    let boot = facts::ticks();
    let as_init = std::process::id() == 1;
    if !as_init && std::env::args().nth(1).as_deref() == Some(loads::CHILD) {
        std::process::exit(loads::child());
    }
    let console = if as_init { Console::debug_port() } else { Console::standard() };
    let mut console = match console {
        Ok(console) => console,
        Err(e) => {
            eprintln!("vmm: {e:#}");
            std::process::exit(3);
        }
    };
    let path = match std::env::args_os().nth(1) {
        Some(path) if !as_init => PathBuf::from(path),
        _ => PathBuf::from(PLAN_OF_INIT),
    };
    let end = run(&path, as_init, boot, &mut console);
    let code = match &end {
        Ok(End::Itself) => 0,
        Ok(End::Broken(why)) => {
            console.log("ERROR", why);
            1
        }
        Err(e) => {
            console.log("ERROR", &format!("{e:#}"));
            3
        }
    };
    if as_init {
        console.power_off()
    }
    std::process::exit(code);
}

fn run(path: &std::path::Path, as_init: bool, boot: u64, console: &mut Console) -> Result<End> {
    if as_init {
        init::mount()?;
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let plan = Plan::parse(&text)?;
    match plan.role {
        Role::Host => machines(&plan, console),
        Role::Workload => {
            workload::run(console, boot)?;
            plan.loads.then(|| loads::run(console)).transpose()?;
            Ok(End::Itself)
        }
        Role::Hypervisor | Role::Dom0 => {
            match plan.role {
                Role::Dom0 => xen::tell(console)?,
                _ => facts::tell_linux(console)?,
            }
            facts::tell(console, boot)?;
            let end = machines(&plan, console)?;
            if end == End::Itself {
                facts::record(console, Level::L2, Kind::End, &[("status", "pass"), ("failed", "0")]);
            }
            Ok(end)
        }
    }
}

/// Runs the plan's machines, one after the other, to the first that breaks.
fn machines(plan: &Plan, console: &mut Console) -> Result<End> {
    tell_frames(console);
    for turn in 0..plan.times {
        if turn == 0 || plan.reload {
            prepare(plan, console)?;
        }
        if turn == 0 && plan.hotplug {
            hotplug::run(console)?;
        }
        let end = machine(plan, turn, console)?;
        if end != End::Itself {
            return Ok(end);
        }
        if plan.switches_after(turn) {
            switching::run(console)?;
        }
        if plan.reload {
            plan.modules.iter().rev().try_for_each(init::unload_module)?;
        }
        // With its last machine a hypervisor may leave VMX operation: what nvmx took for it must be free again.
        tell_frames(console);
    }
    Ok(End::Itself)
}

/// Loads the kernel modules, and sees to it that KVM or Xen is there.
fn prepare(plan: &Plan, console: &mut Console) -> Result<()> {
    let start = facts::ticks();
    plan.modules.iter().try_for_each(init::load_module)?;
    if plan.role == Role::Dom0 {
        xen::start(&plan.services)?;
        facts::measured(console, "services", facts::ticks() - start, []);
        return Ok(());
    }
    if plan.role == Role::Hypervisor {
        facts::measured(console, "kvm_load", facts::ticks() - start, []);
    }
    console.log("INFO", &init::describe_kvm()?);
    init::check_kvm(plan.nested)
}

/// One machine from its start to its end, and what it cost.
fn machine(plan: &Plan, turn: u32, console: &mut Console) -> Result<End> {
    let (before, start) = (Counters::read(), facts::ticks());
    let end = match &plan.program {
        // The first turn, and the last of an odd number, run to their end.
        Some(program) => {
            let ending = plan.end.filter(|_| turn == 0);
            program::run(program, plan.kill.filter(|_| turn % 2 == 1), ending, console)?
        }
        None => Machine::new(plan)?.run(console)?,
    };
    let ticks = facts::ticks() - start;
    let counters = before.zip(Counters::read());
    if plan.role != Role::Host {
        let counts = counters.iter().flat_map(|(from, to)| from.between(to));
        facts::measured(console, "machine", ticks, counts);
    }
    if let Some((before, after)) = &counters {
        let [l2, l3] = before.reasons(after);
        facts::record(console, Level::L2, Kind::Event, &[("name", "exits"), ("l2", &l2), ("l3", &l3)]);
    }
    Ok(end)
}

/// How many frames nvmx has left, if it is there.
fn tell_frames(console: &mut Console) {
    if let Some(free) = counters::free_frames() {
        facts::record(console, Level::L2, Kind::Event, &[("name", "frames"), ("free", &free.to_string())]);
    }
}
