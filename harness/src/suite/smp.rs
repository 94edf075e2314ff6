//! The boot tests on machines with several CPUs.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::backend::Spec;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::Session;
use anyhow::Result;
use l2_protocol::{Kind, Level};

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let mut boot = |name: &str, cpus: u32, spec: Result<Spec>| {
        let with_cpus = |mut spec: Spec| {
            spec.machine.cpus = cpus;
            Spec { name: name.into(), ..spec }
        };
        suite.boots.insert(name.into(), spec.map(with_cpus).map_err(|e| format!("{e:#}")));
    };
    for cpus in [2, 4] {
        boot(&format!("smp-{cpus}-bare"), cpus, session.bare("smp", ""));
        boot(&format!("smp-{cpus}"), cpus, session.nested("smp", "", Fields::Auto));
    }
    boot("smp-2-trapped", 2, session.nested("smp", "", Fields::Trapped));
    boot("cascade-8", 8, session.nested("cascade", "", Fields::Auto));
    let one = session.nested("smp", "parked", Fields::Auto).map(|mut spec| {
        spec.kernel.args.push_str(" cpus=1");
        spec
    });
    boot("smp-parked", 2, one);

    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    let same = || -> Judge { Box::new(|o| compare::agree(o[0], o[1])) };
    case("a guest hypervisor on 2 CPUs sees what it sees bare", &["smp-2-bare", "smp-2"], same());
    let name = "a guest hypervisor on 2 CPUs sees with trapped field access what it sees bare";
    case(name, &["smp-2-bare", "smp-2-trapped"], same());
    case("a guest hypervisor on 4 CPUs sees what it sees bare", &["smp-4-bare", "smp-4"], same());
    case("a guest hypervisor on one of 8 CPUs passes", &["cascade-8"], Box::new(|o| uses(o[0], 8)));
    case("L2 cannot start a CPU that nvmx does not give it", &["smp-parked"], Box::new(|o| uses(o[0], 1)));
}

/// It passed, and nvmx said that it gives L2 so many CPUs.
fn uses(outcome: &Outcome, cpus: u32) -> Result<(), String> {
    all_pass(&[outcome])?;
    let hello = outcome.transcript.first(Level::L1, Kind::Hello).ok_or("nvmx did not say hello")?;
    match hello.get("cpus") {
        Some(said) if said == cpus.to_string() => Ok(()),
        other => Err(format!("nvmx gives L2 {} CPUs, not {cpus}", other.unwrap_or("?"))),
    }
}
