//! The boot tests of the guest that attacks what is below it.

use super::{Case, Judge, Suite, all_pass, compare, fixtures::inside_nvmx};
use crate::backend::Spec;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::Session;
use anyhow::Result;
use l2_protocol::{Kind, Level};

/// Attacks there are at least on one CPU, and tries.
const ATTACKS: u64 = 730;
const TRIES: u64 = 1_470;
/// Parts in which CPUs race.
const RACES: &str = "part=races,roles";

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let inside = inside_nvmx(session.machine.memory);
    let one = format!("inside={inside:#x} rounds=2 changes=20000 exits=50000");
    let two = format!("inside={inside:#x} {RACES} rounds=2 changes=10000");
    let mut boot = |name: &str, cpus: u32, spec: Result<Spec>| {
        let with_cpus = |mut spec: Spec| {
            spec.machine.cpus = cpus;
            Spec { name: name.into(), ..spec }
        };
        suite.boots.insert(name.into(), spec.map(with_cpus).map_err(|e| format!("{e:#}")));
    };
    boot("attacks-bare", 1, session.bare("attacks", &one));
    boot("attacks-zero-copy", 1, session.nested("attacks", &one, Fields::ZeroCopy));
    boot("attacks-trapped", 1, session.nested("attacks", &one, Fields::Trapped));
    boot("attacks-2-bare", 2, session.bare("attacks", &two));
    boot("attacks-2", 2, session.nested("attacks", &two, Fields::Auto));
    for (bare, nested) in [("attacks-bare", "attacks-zero-copy"), ("attacks-2-bare", "attacks-2")] {
        suite.clamps.insert(bare.into(), nested.into());
    }

    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    for (fields, nested) in [("VMCS shadowing", "attacks-zero-copy"), ("trapped field access", "attacks-trapped")] {
        let name = format!("nothing that L2 and L3 try against nvmx with {fields} gets anywhere");
        case(&name, &[nested], Box::new(|o| all_pass(o).and_then(|()| tried(o[0]))));
        let name = format!("what L2 and L3 try against nvmx with {fields} is answered as on the bare machine");
        case(&name, &["attacks-bare", nested], Box::new(|o| compare::agree(o[0], o[1])));
    }
    let name = "what two CPUs try against nvmx at once gets nowhere and is answered as on the bare machine";
    case(name, &["attacks-2-bare", "attacks-2"], Box::new(|o| compare::agree(o[0], o[1])));
}

/// That it was tried at all.
fn tried(outcome: &Outcome) -> Result<(), String> {
    let sum = |key: &str| -> u64 {
        let records = outcome.transcript.of_kind(Kind::Check).filter(|r| r.level == Level::L2);
        records.filter(|r| r.get("attacks").is_some()).filter_map(|r| r.get(key)?.parse::<u64>().ok()).sum()
    };
    let (attacks, tries) = (sum("attacks"), sum("cases"));
    if attacks < ATTACKS || tries < TRIES {
        return Err(format!("{attacks} attacks in {tries} tries; there should be {ATTACKS} and {TRIES}"));
    }
    Ok(())
}
