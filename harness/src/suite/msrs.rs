//! The boot tests on MSRs.

use super::{Case, Judge, Suite, all_pass, compare, fixtures::inside_nvmx};
use crate::backend::{Machine, Spec};
use crate::cli::Fields;
use crate::session::Session;
use anyhow::Result;

/// A CPU whose MSRs are those of servers of today.
const SERVER: &str = "sapphire_rapids";

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let mut boot = |name: &str, spec: Result<Spec>| {
        let spec = spec.map(|spec| Spec { name: name.into(), ..spec }).map_err(|e| format!("{e:#}"));
        suite.boots.insert(name.into(), spec);
    };
    let outside = format!("part=msrs outside={:#x}", inside_nvmx(session.machine.memory));
    boot("vmxtest-msrs-outside", session.nested("vmxtest", &outside, Fields::Auto));
    let names = ["vmxtest-msrs-server-bare", "vmxtest-msrs-server"];
    let on = |spec: Spec| Spec { machine: Machine { model: SERVER.into(), ..spec.machine.clone() }, ..spec };
    boot(names[0], session.bare("vmxtest", "part=msrs").map(on));
    boot(names[1], session.nested("vmxtest", "part=msrs", Fields::Auto).map(on));
    suite.clamps.insert(names[0].into(), names[1].into());

    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    let name = "neither L2 nor L3 nor an MSR area moves the APIC over nvmx's memory";
    case(name, &["vmxtest-msrs-outside"], Box::new(all_pass));
    let judge: Judge = Box::new(|o| all_pass(&o[1..]).and_then(|()| compare::agree(o[0], o[1])));
    case("each MSR of a server's CPU is under nvmx what the policy says, and else what it is bare", &names, judge);
}
