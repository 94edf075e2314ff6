//! The boot tests on MSRs.

use super::{Case, Suite, all_pass, fixtures::inside_nvmx};
use crate::cli::Fields;
use crate::session::Session;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session) {
    let name = "vmxtest-msrs-outside";
    let args = format!("part=msrs outside={:#x}", inside_nvmx(session.machine.memory));
    let spec = session.nested("vmxtest", &args, Fields::Auto).map_err(|e| format!("{e:#}"));
    suite.boots.insert(name.into(), spec.map(|spec| crate::backend::Spec { name: name.into(), ..spec }));
    suite.cases.push(Case {
        name: "neither L2 nor L3 nor an MSR area moves the APIC over nvmx's memory".into(),
        boots: vec![name.into()],
        judge: Box::new(all_pass),
    });
}
