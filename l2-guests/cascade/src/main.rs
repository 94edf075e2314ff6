//! cascade: a small hypervisor whose guest exercises and times every kind of exit.
#![no_std]
#![no_main]

use l2_kit::{BootInfo, identity, protocol::Kind, report};

l2_kit::entry!(main);

fn main(_: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"cascade"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
}
