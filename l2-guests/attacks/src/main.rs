//! attacks: a guest hypervisor, and a guest of it, that attack what is below them. Each attack has a name and is tried with
//! several seeds; what must hold is that the machine goes on, that VMX works afterwards, and that nothing of the hypervisor
//! below was read or changed. The same image runs alone and under nvmx.
//!
//! Words of the command line: `list` (names the attacks and does nothing), `part=NAME,NAME`, `attack=TEXT` (those whose name has it,
//! `_` for a space), `seed=N`, `rounds=N` (tries of each), `changes=N` (of tables, in
//! part `roles`), `exits=N` (in part `soak`), `inside=ADDRESS` (an address of the hypervisor below).
#![no_std]
#![no_main]

mod addresses;
mod controls;
mod guest;
mod inits;
mod lab;
mod liveness;
mod memory;
mod place;
mod races;
mod random;
mod rings;
mod roles;
mod soak;
mod state;

use l2_kit::{
    BootInfo, Global, apic, caps, cpu, identity, log,
    protocol::Kind,
    report,
    setup::{self, Missing},
    smp,
};
use lab::{Choice, Lab};

l2_kit::entry!(main);

/// A name, and what tries the attacks of that kind.
type Part = (&'static str, fn(&mut Lab));

/// The parts, in order.
const PARTS: &[Part] = &[
    ("memory", memory::all),
    ("addresses", addresses::all),
    ("controls", controls::all),
    ("state", state::all),
    ("liveness", liveness::all),
    ("rings", rings::all),
    ("races", races::all),
    ("roles", roles::all),
    ("inits", inits::all),
    ("soak", soak::all),
];

/// The words that the command line may have.
const WORDS: &[&str] = &["list", "part", "attack", "seed", "rounds", "changes", "exits", "inside", "caps"];

fn main(info: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"attacks"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    for word in info.command_line.split_ascii_whitespace() {
        let key = word.split('=').next().unwrap_or(word);
        if !WORDS.contains(&key) {
            report::fail(format_args!("there is no word `{key}`; there are {WORDS:?}"));
            return;
        }
    }
    let chosen = info.option("part");
    let mut names = chosen.into_iter().flat_map(|names| names.split(','));
    if let Some(name) = names.find(|name| PARTS.iter().all(|(part, _)| part != name)) {
        report::fail(format_args!("there is no part `{name}`"));
        return;
    }
    let Some(choice) = choice(info) else { return };
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        report::fail(format_args!("{}", Missing::Vmx));
        return;
    }
    caps::init(info);
    apic::init();
    let ids = smp::find();
    let others = ids.iter().enumerate().skip(1).take(1).filter(|(index, id)| smp::start(*index, **id)).count();
    CPUS.set(1 + others);
    if let Err(missing) = run(choice, |part| chosen.is_none_or(|names| names.split(',').any(|name| name == part))) {
        report::fail(format_args!("{missing}"));
    }
}

/// What the command line asks for, or `None` if it cannot be read.
fn choice(info: &BootInfo) -> Option<Choice> {
    let number = |key: &str, usual: u64| match info.option(key).map(|text| (text, text.strip_prefix("0x"))) {
        None => Some(usual),
        Some((_, Some(digits))) => u64::from_str_radix(digits, 16).ok(),
        Some((text, None)) => text.parse().ok(),
    };
    let read = |key: &str, usual: u64| {
        let value = number(key, usual);
        if value.is_none() {
            report::fail(format_args!("{key}= needs a number"));
        }
        value
    };
    let inside = read("inside", 0)?;
    if let Err(why) = place::init(info, inside) {
        report::fail(format_args!("{why}"));
        return None;
    }
    let list = info.option("list").is_some();
    Some(Choice {
        seed: read("seed", 1)?,
        rounds: read("rounds", 4)?,
        changes: read("changes", 10_000)?,
        exits: read("exits", 100_000)?,
        only: info.option("attack"),
        list,
    })
}

/// CPUs that attack: two if there are as many.
static CPUS: Global<usize> = Global::new(1);
/// The other CPU is in VMX operation.
static ENTERED: Global<bool> = Global::new(false);

/// How many CPUs attack.
fn cpus() -> usize {
    CPUS.get()
}

/// The other CPU enters VMX operation, where it stays.
fn enter_vmx_once() {
    if !ENTERED.replace(true) {
        if let Err(missing) = setup::enter_vmx() {
            report::die(format_args!("{missing}"));
        }
    }
}

/// Into VMX operation, and the parts.
fn run(choice: Choice, chosen: impl Fn(&str) -> bool) -> Result<(), Missing> {
    // XMM registers and XSETBV: in the host state of every VMCS
    const OSFXSR: u64 = 1 << 9;
    let region = setup::enter_vmx()?;
    cpu::set_cr4(cpu::cr4() | OSFXSR | cpu::CR4_OSXSAVE);
    let mut lab = Lab::new(region, choice)?;
    for (name, part) in PARTS.iter().filter(|(name, _)| chosen(name)) {
        log!("part {name}");
        part(&mut lab);
        lab.end(name);
    }
    Ok(())
}
