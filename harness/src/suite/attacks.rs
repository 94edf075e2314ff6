//! The boot tests of the guest that attacks what is below it.

use super::{Case, Judge, Suite, all_pass, compare, fixtures::inside_nvmx};
use crate::backend::Spec;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::Session;
use crate::transcript::Line;
use anyhow::Result;
use l2_protocol::{Kind, Level};

/// Attacks there are at least on one CPU, and tries.
const ATTACKS: u64 = 730;
const TRIES: u64 = 1_470;
/// Parts in which CPUs race.
const RACES: &str = "part=races,roles,inits";
/// Machines with so many CPUs get the storms of messages alone, beside the one with three that gets all.
const STORMED: [u32; 2] = [2, 8];

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let inside = inside_nvmx(session.machine.memory);
    let one = format!("inside={inside:#x} rounds=2 changes=20000 exits=50000");
    let several = format!("inside={inside:#x} {RACES} rounds=2 changes=10000");
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
    boot("attacks-3-bare", 3, session.bare("attacks", &several));
    boot("attacks-3", 3, session.nested("attacks", &several, Fields::Auto));
    for cpus in STORMED {
        let args = format!("inside={inside:#x} part=inits rounds=1");
        boot(&format!("inits-{cpus}-bare"), cpus, session.bare("attacks", &args));
        boot(&format!("inits-{cpus}"), cpus, session.nested("attacks", &args, Fields::Auto));
    }
    let stale = |guest: &str, args: &str| {
        let spec = session.nested(guest, args, Fields::Auto);
        spec.map(|mut spec| {
            spec.kernel.args.push_str(" stale=warn");
            spec
        })
    };
    boot("stale-roles", 1, stale("attacks", &format!("inside={inside:#x} part=roles rounds=1 changes=300")));
    boot("stale-none", 1, stale("cascade", "events=50"));
    for (bare, nested) in [("attacks-bare", "attacks-zero-copy"), ("attacks-3-bare", "attacks-3")] {
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
    let name = "what several CPUs try against nvmx at once gets nowhere and is answered as on the bare machine";
    case(name, &["attacks-3-bare", "attacks-3"], Box::new(|o| compare::agree(o[0], o[1])));
    for cpus in STORMED {
        let name = format!("storms of INITs, start-up messages and NMIs on {cpus} CPUs get nowhere");
        let boots = [format!("inits-{cpus}-bare"), format!("inits-{cpus}")];
        case(&name, &boots.each_ref().map(String::as_str), Box::new(|o| compare::agree(o[0], o[1])));
    }
    let name = "an L2 that leaves out INVEPTs is told of with stale=warn, and one that does not is not";
    case(name, &["stale-roles", "stale-none"], Box::new(|o| told(o[0], o[1])));
}

/// The one boot has warnings, the other none; both pass.
fn told(with: &Outcome, without: &Outcome) -> Result<(), String> {
    const WARNING: &str = "INVEPT is missing";
    let count = |o: &Outcome| {
        o.transcript.lines.iter().filter(|line| matches!(line, Line::Text(text) if text.contains(WARNING))).count()
    };
    for outcome in [with, without] {
        outcome.verdict().map_err(|e| format!("{}: {e}", outcome.name))?;
    }
    match (count(with), count(without)) {
        (0, _) => Err(format!("{}: no warning", with.name)),
        (_, 0) => Ok(()),
        (_, more) => Err(format!("{}: {more} warnings", without.name)),
    }
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
