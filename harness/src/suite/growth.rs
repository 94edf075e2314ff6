//! The boot tests of sweeps: no cliff where L2 uses more VMCSs, EPTs, memory or processors, and each nvmx in nvmx costs what it did.

use super::{Case, Judge, Suite, all_pass, cases::kept};
use crate::cli::Fields;
use crate::report::budget::Budget;
use crate::session::Session;
use crate::sweep;
use std::sync::Arc;

/// Adds the boots and their cases.
pub fn add(suite: &mut Suite, session: &Session, budget: &Arc<Budget>) {
    let sweeps = sweep::sweeps(session, Fields::ZeroCopy).unwrap_or_else(|why| {
        // An image is missing: the case that has no boot says so.
        suite.boots.insert("growth".into(), Err(format!("{why:#}")));
        let judge: Judge = Box::new(all_pass);
        suite.cases.push(Case { name: "growth passes under nvmx".into(), boots: vec!["growth".into()], judge });
        Vec::new()
    });
    for sweep in sweeps {
        let boots: Vec<String> = sweep.boots.iter().map(|spec| spec.name.clone()).collect();
        suite.boots.extend(sweep.boots.into_iter().map(|spec| (spec.name.clone(), Ok(spec))));
        let (compiler, budget) = (session.toolchain.version.clone(), Arc::clone(budget));
        let (guest, figures) = (sweep.guest, sweep.figures);
        let costs: Judge = Box::new(move |outcomes| {
            all_pass(outcomes)?;
            kept(&budget, &compiler, guest, &figures(outcomes)?)
        });
        let name = format!("costs are those of benches/budget.json: {}", sweep.title);
        suite.cases.push(Case { name, boots, judge: costs });
    }
}
