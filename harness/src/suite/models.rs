//! Processors other than the one that tests run on: the guests see under nvmx what they see bare on each of them.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::backend::{Machine, Spec};
use crate::cli::Fields;
use crate::session::Session;

/// From the newest server to the oldest with a use for nvmx; the last has no VMCS shadowing.
const MODELS: [&str; 6] = [
    "sapphire_rapids",
    "tigerlake",
    "arrow_lake",
    "corei7_skylake_x",
    "corei7_haswell_4770",
    "corei7_ivy_bridge_3770k",
];
/// Parts of vmxtest that do not depend on the processor, or that take long: they run on the session's model only.
const VMXTEST: &str = "skip=random,orderings,explained,nmis,machine_checks,traps,instructions,operands,modes";

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    for model in MODELS.into_iter().filter(|model| *model != session.machine.model) {
        for (guest, args) in [("cascade", ""), ("vmxtest", VMXTEST)] {
            let names = ["bare", "nvmx"].map(|slot| format!("{guest}-{model}-{slot}"));
            let specs = [session.bare(guest, args), session.nested(guest, args, Fields::Auto)];
            for (name, spec) in names.iter().zip(specs) {
                let spec = spec.map(|spec| Spec {
                    name: name.clone(),
                    machine: Machine { model: model.into(), ..spec.machine.clone() },
                    ..spec
                });
                suite.boots.insert(name.clone(), spec.map_err(|e| format!("{e:#}")));
            }
            suite.clamps.insert(names[0].clone(), names[1].clone());
            let judge: Judge = Box::new(|o| all_pass(o).and_then(|()| compare::agree(o[0], o[1])));
            let name = format!("{guest} sees under nvmx on {model} what it sees bare");
            suite.cases.push(Case { name, boots: names.to_vec(), judge });
        }
    }
    large(suite, session);
    let many = session.bare("cascade", "").map(|spec| Spec {
        name: "cascade-16-bare".into(),
        machine: Machine { cpus: 16, ..spec.machine.clone() },
        ..spec
    });
    suite.boots.insert("cascade-16-bare".into(), many.map_err(|e| format!("{e:#}")));
    let name = "a guest hypervisor passes on one of 16 CPUs of the bare machine";
    suite.cases.push(Case { name: name.into(), boots: vec!["cascade-16-bare".into()], judge: Box::new(all_pass) });
}

/// Machines with so much memory, in MiB: a hole below 4 GiB, and memory above it.
const SIZES: [u32; 5] = [3072, 4096, 5120, 8192, 16384];
/// With all that the guest hands to VMX above 4 GiB: VMXON and VMCS regions, EPT tables, bitmaps, pages of the APIC, MSR areas.
const HIGH: u32 = 6144;
/// All parts of vmxtest that are short and hand addresses to VMX; guests without paging (part unrestricted) reach 4 GiB, and part
/// leaves takes other pages under nvmx.
const WITH_ADDRESSES: &str = "high skip=random,orderings,explained,nmis,traps,operands,modes,tasks,memory,msrs,hardware,windows,unrestricted,leaves";

fn large(suite: &mut Suite, session: &Session) {
    let cascade = SIZES.map(|memory| ("cascade", "events=50", memory));
    let high = [("cascade", "high events=50", HIGH), ("vmxtest", WITH_ADDRESSES, HIGH)];
    for (guest, args, memory) in cascade.into_iter().chain(high) {
        let place = if args.starts_with("high") { "-high" } else { "" };
        let names = ["bare", "nvmx"].map(|slot| format!("{guest}-{memory}{place}-{slot}"));
        let specs = [session.bare(guest, args), session.nested(guest, args, Fields::Auto)];
        for (name, spec) in names.iter().zip(specs) {
            let machine = |spec: &Spec| Machine { memory, ..spec.machine.clone() };
            let spec = spec.map(|spec| Spec { name: name.clone(), machine: machine(&spec), ..spec });
            suite.boots.insert(name.clone(), spec.map_err(|e| format!("{e:#}")));
        }
        suite.clamps.insert(names[0].clone(), names[1].clone());
        let judge: Judge = Box::new(|o| all_pass(o).and_then(|()| compare::agree(o[0], o[1])));
        let what = if place.is_empty() { "" } else { ", its own memory above 4 GiB," };
        let name = format!("{guest} with {} GiB{what} sees under nvmx what it sees bare", memory / 1024);
        suite.cases.push(Case { name, boots: names.to_vec(), judge });
    }
}
