//! vmxtest: the edges of VMX as `check` records: every error of every VMX instruction, entries that fail, exits and what is
//! recorded of them. The same image runs alone and under nvmx and must print the same.
//!
//! Where the SDM says what must come out, the check asks for it, so that a machine is judged by the SDM and not only by
//! another run. What depends on the CPU's capabilities is asked for only if the capability MSRs offer it.
#![no_std]
#![no_main]

mod entries;
mod exits;
mod expect;
mod guest;
mod injection;
mod instructions;
mod memory;
mod modes;
mod operands;
mod paging;

mod registers;
mod state;
mod vmxon;
mod windows;

use l2_kit::{BootInfo, apic, cpu, identity, log, protocol::Kind, report, setup, vmx};

l2_kit::entry!(main);

/// The parts that need guests.
const PARTS: [(&str, fn() -> Result<(), setup::Missing>); 7] = [
    ("entries", entries::all),
    ("memory", memory::all),
    ("injection", injection::all),
    ("windows", windows::all),
    ("exits", exits::all),
    ("state", state::all),
    ("paging", paging::all),
];

fn main(_: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"vmxtest"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        report::fail(format_args!("{}", setup::Missing::Vmx));
        return;
    }
    for msr in 0x480..=0x491 {
        if let Ok(value) = cpu::try_rdmsr(msr) {
            log!("MSR {msr:#x} = {value:#018x}");
        }
    }
    apic::init();
    modes::outside("without CR4.VMXE");
    vmxon::unlocked();
    if let Err(missing) = setup::prepare_vmx() {
        report::fail(format_args!("{missing}"));
        return;
    }
    modes::outside("with CR4.VMXE");
    let region = vmxon::errors();
    vmxon::enter(region);
    modes::inside();
    instructions::without_vmcs(region);
    instructions::with_vmcs(region);

    operands::all();
    registers::all();
    for (name, part) in PARTS {
        if let Err(missing) = part() {
            report::fail(format_args!("{name}: {missing}"));
        }
    }
    expect::expect("vmxoff", expect::got(vmx::vmxoff), expect::SUCCEED);
    modes::outside("after VMXOFF");
}
