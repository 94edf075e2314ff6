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
const VMXTEST: &str = "skip=random,orderings,explained,nmis,traps,instructions,operands,modes";

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
    let many = session.bare("cascade", "").map(|spec| Spec {
        name: "cascade-16-bare".into(),
        machine: Machine { cpus: 16, ..spec.machine.clone() },
        ..spec
    });
    suite.boots.insert("cascade-16-bare".into(), many.map_err(|e| format!("{e:#}")));
    let name = "a guest hypervisor passes on one of 16 CPUs of the bare machine";
    suite.cases.push(Case { name: name.into(), boots: vec!["cascade-16-bare".into()], judge: Box::new(all_pass) });
}
