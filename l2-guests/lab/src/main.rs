//! lab: the story of the VM exit, each step an experiment.
//!
//! The image is a hypervisor, its guests, and plain programs, all in ring 0 of the same addresses: a loop is measured without
//! a hypervisor (`scope=native`) and as a guest's (`scope=l3`) by the same instructions. Alone on the machine its guests have
//! one hypervisor below them, under nvmx two. Words on the command line: `only=NAME,NAME` runs these experiments, `events=N`
//! limits how many events are in a bracket.
#![no_std]
#![no_main]

mod experiments;
mod guest;
mod kernel;
mod record;
mod rings;
mod shadow;
mod store;
mod vm;

use experiments::EXPERIMENTS;
use l2_kit::{BootInfo, apic, caps, identity, protocol::Kind, report, setup};
use record::Stop;

l2_kit::entry!(main);

fn main(info: &BootInfo) {
    let slot = identity::Slot::find();
    report::record(
        Kind::Hello,
        &[
            ("name", &"lab"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &slot.word()),
            ("cpu", &identity::cpu_name().as_str()),
            ("depth", &identity::depth()),
        ],
    );
    if !info.knows(&["only", "events", "trace"]) {
        return;
    }
    if let Err(why) = record::options(info) {
        return report::fail(format_args!("{why}"));
    }
    let only = info.option("only").unwrap_or("");
    let known = |name: &str| EXPERIMENTS.iter().any(|e| e.name == name);
    if let Some(name) = only.split(',').find(|name| !name.is_empty() && !known(name)) {
        return report::fail(format_args!("only={name}: there is no such experiment"));
    }
    apic::init();
    caps::init(info);
    if let Err(missing) = setup::enter_vmx() {
        return report::fail(format_args!("{missing}"));
    }
    match vm::calibrate() {
        Ok(()) => {}
        // What of an experiment needs no guest is done all the same.
        Err(Stop::Missing(what)) => record::missing(what),
        Err(why) => return report::fail(format_args!("{why}")),
    }
    // What every nested figure depends on; under an nvmx it is nvmx that offers it.
    if slot == identity::Slot::Bare && !setup::allowed_one(setup::Kind::Secondary, setup::secondary::VMCS_SHADOWING) {
        record::missing("VMCS shadowing");
    }
    for experiment in EXPERIMENTS.iter().filter(|e| only.is_empty() || only.split(',').any(|name| name == e.name)) {
        record::begin(experiment.name);
        match (experiment.run)() {
            Ok(()) => {}
            // The harness says what it would have shown.
            Err(Stop::Missing(what)) => record::missing(what),
            Err(why) => report::fail(format_args!("{}: {why}", experiment.name)),
        }
    }
}
