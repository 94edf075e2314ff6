//! The boot test of `growth`: no cliff where L2 uses more VMCSs, EPTs or memory.

use super::{Case, Judge, Suite, all_pass, cases::kept};
use crate::cli::Fields;
use crate::report::{self, budget::Budget};
use crate::session::Session;
use std::sync::Arc;

/// Adds the boot and its cases.
pub fn add(suite: &mut Suite, session: &Session, budget: &Arc<Budget>) {
    const BOOT: &str = "growth";
    let spec = session.nested(BOOT, "", Fields::ZeroCopy).map_err(|e| format!("{e:#}"));
    suite.boots.insert(BOOT.into(), spec);
    let (compiler, budget) = (session.toolchain.version.clone(), Arc::clone(budget));
    let costs: Judge = Box::new(move |o| kept(&budget, &compiler, BOOT, &report::events(None, &o[0].transcript)));
    let judges: [(&str, Judge); 2] = [
        ("growth passes under nvmx", Box::new(all_pass)),
        ("costs grow with what L2 uses as benches/budget.json says", costs),
    ];
    for (name, judge) in judges {
        suite.cases.push(Case { name: name.into(), boots: vec![BOOT.into()], judge });
    }
}
