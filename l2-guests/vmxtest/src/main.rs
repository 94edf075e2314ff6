//! vmxtest: the edges of VMX as `check` records: every error of every VMX instruction, entries that fail, exits and what is
//! recorded of them. The same image runs alone and under nvmx and must print the same.
//!
//! Where the SDM says what must come out, the check asks for it, so that a machine is judged by the SDM and not only by
//! another run. What depends on the CPU's capabilities is asked for only if the capability MSRs offer it.
#![no_std]
#![no_main]

mod apic;
mod areas;
mod bitmaps;
mod debugctl;
mod entries;
mod ept;
mod execute;
mod exits;
mod expect;
mod explained;
mod failures;
mod functions;
mod guest;
mod halted;
mod hardware;
mod injection;
mod inner;
mod instructions;
mod leaves;
mod machine_checks;
mod memory;
mod modes;
mod msrs;
mod nmis;
mod operands;
mod orderings;
mod paging;
mod random;
mod registers;
mod resident;
mod shadow;
mod state;
mod tasks;
mod tertiary;
mod traps;
mod unrestricted;
mod ve;
mod vmxon;
mod windows;

use l2_kit::{
    BootInfo, Check, apic as local_apic, caps, cpu, identity, log,
    protocol::Kind,
    report,
    serial::Serial,
    setup::{self, Missing},
    vmx,
};

l2_kit::entry!(main);

/// A part that works in VMX operation.
#[derive(Clone, Copy)]
enum Part {
    /// Instructions only; gets the address of the VMXON region
    Instructions(fn(u64)),
    /// With guests
    Guests(fn() -> Result<(), Missing>),
}

use Part::{Guests, Instructions};

/// The parts, but for `tasks`, which needs what VMX operation forbids; `part=NAME` on the command line chooses one, `skip=NAME,NAME` leaves some out.
const PARTS: &[(&str, Part)] = &[
    ("modes", Instructions(|_| modes::inside())),
    ("instructions", Instructions(instructions::all)),
    ("operands", Instructions(|_| operands::all())),
    ("registers", Instructions(|_| registers::all())),
    ("leaves", Instructions(|_| leaves::all())),
    ("entries", Guests(entries::all)),
    ("failures", Guests(failures::all)),
    ("areas", Guests(areas::all)),
    ("unrestricted", Guests(unrestricted::all)),
    ("memory", Guests(memory::all)),
    ("injection", Guests(injection::all)),
    ("windows", Guests(windows::all)),
    ("orderings", Guests(orderings::all)),
    ("halted", Guests(halted::all)),
    ("hardware", Guests(hardware::all)),
    ("nmis", Guests(nmis::all)),
    ("machine_checks", Guests(machine_checks::all)),
    ("traps", Guests(traps::all)),
    ("debugctl", Guests(debugctl::all)),
    ("exits", Guests(exits::all)),
    ("state", Guests(state::all)),
    ("resident", Guests(resident::all)),
    ("tertiary", Guests(tertiary::all)),
    ("bitmaps", Guests(bitmaps::all)),
    ("msrs", Guests(msrs::all)),
    ("paging", Guests(paging::all)),
    ("inner", Guests(inner::all)),
    ("functions", Guests(functions::all)),
    ("execute", Guests(execute::all)),
    ("ve", Guests(ve::all)),
    ("apic", Guests(apic::all)),
    ("ept", Guests(ept::all)),
    ("sub_pages", Guests(ept::sub_pages::all)),
    ("shadow", Guests(shadow::all)),
    ("random", Guests(random::all)),
    ("explained", Guests(explained::all)),
];

fn main(info: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"vmxtest"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    if !info.knows(&["part", "skip", "outside", "seed", "cases", "first", "case"]) {
        return;
    }
    let chosen = info.option("part");
    if let Some(name) = chosen {
        if name != "tasks" && !PARTS.iter().any(|(part, _)| *part == name) {
            report::fail(format_args!("there is no part `{name}`"));
            return;
        }
    }
    local_apic::init();
    let Ok(outside) = u64::from_str_radix(info.option("outside").unwrap_or("0").trim_start_matches("0x"), 16) else {
        report::fail(format_args!("outside= needs an address"));
        return;
    };
    let skipped = |part: &str| info.option("skip").is_some_and(|names| names.split(',').any(|name| name == part));
    if chosen.is_none_or(|c| c == "tasks") && !skipped("tasks") {
        log!("part tasks");
        tasks::all(outside as u32);
    }
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        report::fail(format_args!("{}", Missing::Vmx));
        return;
    }
    caps::init(info);
    for msr in 0x480..=0x493 {
        if let Some(value) = caps::own(msr) {
            log!("MSR {msr:#x} = {value:#018x}");
        }
    }
    match random::Choice::of(info) {
        Ok(choice) => random::CHOICE.set(choice),
        Err(key) => {
            report::fail(format_args!("{key}= needs a number"));
            return;
        }
    }
    ept::outside::ADDRESS.set(outside);
    msrs::OUTSIDE.set(outside);
    if let Err(missing) = run(|part| chosen.is_none_or(|c| c == part) && !skipped(part)) {
        report::fail(format_args!("{missing}"));
    }
}

/// Into VMX operation, the parts, and out again.
fn run(chosen: impl Fn(&str) -> bool) -> Result<(), Missing> {
    modes::outside("without CR4.VMXE");
    vmxon::unlocked();
    setup::prepare_vmx()?;
    modes::outside("with CR4.VMXE");
    registers::each_bit("outside of VMX operation");
    let region = vmxon::errors();
    vmxon::enter(region);
    for (name, part) in PARTS.iter().filter(|(name, _)| chosen(name)) {
        // The harness names the part of a record that differs.
        log!("part {name}");
        let before = report::checks();
        match *part {
            Instructions(part) => part(region),
            Guests(part) => {
                if let Err(missing) = part() {
                    report::fail(format_args!("{name}: {missing}"));
                }
            }
        }
        let records = report::checks() - before;
        Check::new(&mut Serial, format_args!("part {name}")).fact("records", records).end();
    }
    expect::expect("vmxoff", expect::got(vmx::vmxoff), expect::SUCCEED);
    modes::outside("after VMXOFF");
    Ok(())
}
