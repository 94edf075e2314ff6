//! The boot tests of the guest that attacks what is below it.

use super::{Case, Judge, Suite, all_pass, compare, fixtures::inside_nvmx};
use crate::backend::Spec;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::Session;
use anyhow::Result;
use l2_protocol::{Kind, Level};

/// Attacks there are at least, and tries.
const ATTACKS: u64 = 300;
const TRIES: u64 = 900;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let args = format!("inside={:#x} rounds=4", inside_nvmx(session.machine.memory));
    let mut boot = |name: &str, spec: Result<Spec>| {
        let spec = spec.map(|spec| Spec { name: name.into(), ..spec }).map_err(|e| format!("{e:#}"));
        suite.boots.insert(name.into(), spec);
    };
    boot("attacks-bare", session.bare("attacks", &args));
    boot("attacks-zero-copy", session.nested("attacks", &args, Fields::ZeroCopy));
    boot("attacks-trapped", session.nested("attacks", &args, Fields::Trapped));
    suite.clamps.insert("attacks-bare".into(), "attacks-zero-copy".into());

    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    for (fields, nested) in [("VMCS shadowing", "attacks-zero-copy"), ("trapped field access", "attacks-trapped")] {
        let name = format!("nothing that L2 and L3 try against nvmx with {fields} gets anywhere");
        case(&name, &[nested], Box::new(|o| all_pass(o).and_then(|()| tried(o[0]))));
        let name = format!("what L2 and L3 try against nvmx with {fields} is answered as on the bare machine");
        case(&name, &["attacks-bare", nested], Box::new(|o| compare::agree(o[0], o[1])));
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
