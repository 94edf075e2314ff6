//! cascade: a small hypervisor whose guest exercises and times every kind of exit.
//!
//! It prints, for each event of [`events::EVENTS`], what the event costs without any VMX (`scope=native`) and when its guest
//! raises it (`scope=l3`), and what it saw of the exit (`check`). Alone on a machine it is one hypervisor, under nvmx the
//! second: the same image, the same records. `events=N` limits how many events are in a bracket, `brackets=N` measures each event so
//! often and tells the median, where the TSC counts time.
#![no_std]
#![no_main]

mod calls;
mod cpuid;
mod events;
mod exits;
mod guest;
mod hypervisor;
mod measure;
mod observe;
mod payload;

use hypervisor::Hypervisor;
use l2_kit::{
    BootInfo, apic, caps,
    identity::{self, Slot},
    protocol::Kind,
    report, setup,
};

l2_kit::entry!(main);

fn main(info: &BootInfo) {
    let slot = Slot::find();
    report::record(
        Kind::Hello,
        &[
            ("name", &"cascade"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &slot.word()),
            ("cpu", &identity::cpu_name().as_str()),
            ("features", &guest::features().as_str()),
        ],
    );
    if !info.knows(&["events", "brackets"]) {
        return;
    }
    report::say("Hello from the guest hypervisor: first my own work, then my guest's.");
    if let Some(text) = info.option("events") {
        match text.parse() {
            // Guests take turns in pairs of switches.
            Ok(most) if most >= 2 && most % 2 == 0 => events::limit(most),
            _ => {
                report::fail(format_args!("events={text}: an even number above 0 is expected"));
                return;
            }
        }
    }
    if let Some(text) = info.option("brackets") {
        match text.parse() {
            Ok(count) if (1..=events::MOST_BRACKETS).contains(&count) => events::set_brackets(count),
            _ => {
                report::fail(format_args!("brackets={text}: a number from 1 to {} is expected", events::MOST_BRACKETS));
                return;
            }
        }
    }
    apic::init();
    caps::init(info);
    measure::native();
    match setup::enter_vmx().and_then(|_| Hypervisor::new(slot)) {
        Ok(mut hypervisor) => {
            measure::own_exit(slot);
            hypervisor.work();
        }
        Err(missing) => report::fail(format_args!("{missing}")),
    }
}
