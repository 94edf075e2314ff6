//! growth: how the costs of a guest hypervisor grow with what it uses: VMCSs, EPTs, memory mapped by small and large pages.
//!
//! Each experiment is a bracket round a number of equal rounds: `vmcs_N` and `ept_N` make another of N guests current and enter
//! it, whose VMCALL ends the round; `invept_*` executes INVEPT and enters a guest that has so much memory in use. Words:
//! `part=vmcs|ept|invept` chooses one kind, `most=N` bounds N; `part=cpus` starts all CPUs and enters one guest, `cpus_N`.
#![no_std]
#![no_main]

mod bracket;
mod cpus;
mod guest;
mod invept;
mod switch;

use l2_kit::{BootInfo, caps, identity, protocol::Kind, report, setup};

l2_kit::entry!(main);

const PARTS: [&str; 4] = ["vmcs", "ept", "invept", "cpus"];

fn main(info: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"growth"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    if !info.knows(&["part", "most"]) {
        return;
    }
    let part = info.option("part");
    if let Some(name) = part.filter(|name| !PARTS.contains(name)) {
        return report::fail(format_args!("there is no part `{name}`; there are: vmcs, ept, invept, cpus"));
    }
    let most = info.option("most").map_or(Ok(switch::MOST), str::parse);
    let Some(most) = most.ok().filter(|most| (1..=switch::MOST).contains(most)) else {
        return report::fail(format_args!("most= takes a number from 1 to {}", switch::MOST));
    };
    caps::init(info);
    let chosen = |name| part.is_none_or(|part| part == name);
    let run = || -> Result<(), guest::Stop> {
        setup::enter_vmx()?;
        // What reading the counters costs is no cost of a round.
        bracket::measure(format_args!("empty"), 0, 1, |_| Ok(()))?;
        if chosen("vmcs") {
            switch::all("vmcs", switch::Memory::Shared, most)?;
        }
        if chosen("ept") {
            switch::all("ept", switch::Memory::Own, most)?;
        }
        if chosen("invept") {
            invept::all()?;
        }
        if part == Some("cpus") {
            cpus::all()?;
        }
        Ok(())
    };
    if let Err(why) = run() {
        report::fail(format_args!("{why}"));
    }
}
