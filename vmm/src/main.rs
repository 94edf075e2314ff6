//! A small VMM on `/dev/kvm`: boots one multiboot image with its modules, or a Linux, shows its COM1, and counts what KVM had to do.
//!
//! It is made to be init of a Linux that runs on an emulated machine and has nothing else to do: then it mounts what it
//! needs, loads the modules of KVM, and switches the machine off at the end. It runs on any other Linux with KVM as well.
//!
//! The machine that its guest gets: one CPU as the host's KVM offers it (VMX included), memory, the interrupt controllers
//! and the timer of KVM, COM1 without interrupts, the exit ports of Bochs and QEMU, ACPI tables that list the CPU.

mod acpi;
mod console;
mod cpu;
mod guest;
mod init;
mod linux;
mod machine;
mod multiboot;
mod plan;
mod serial;
mod stats;

use anyhow::{Context, Result};
use console::Console;
use machine::{End, Machine};
use plan::Plan;
use std::path::PathBuf;

/// Where init finds its orders.
const PLAN_OF_INIT: &str = "/plan";

fn main() {
    let as_init = std::process::id() == 1;
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
    let end = run(&path, as_init, &mut console);
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

fn run(path: &std::path::Path, as_init: bool, console: &mut Console) -> Result<End> {
    if as_init {
        init::mount()?;
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let plan = Plan::parse(&text)?;
    for module in &plan.modules {
        init::load_module(module)?;
    }
    console.log("INFO", &init::describe_kvm()?);
    init::check_kvm(plan.nested)?;
    Machine::new(&plan)?.run(console)
}
