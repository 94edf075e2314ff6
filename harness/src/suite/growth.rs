//! The boot test of `growth`: no cliff where L2 uses more VMCSs, EPTs or memory.

use super::{Case, Judge, Suite, all_pass, cases::kept};
use crate::cli::Fields;
use crate::report::budget::Budget;
use crate::session::Session;
use anyhow::Result;

/// Adds the boot and its cases.
///
/// # Errors
/// If the file of limits is not one.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    const BOOT: &str = "growth";
    let limits = Budget::read(&session.paths.root.join("benches/growth.json"))?;
    let spec = session.nested(BOOT, "", Fields::ZeroCopy).map_err(|e| format!("{e:#}"));
    suite.boots.insert(BOOT.into(), spec);
    let judges: [(&str, Judge); 2] = [
        ("growth passes under nvmx", Box::new(all_pass)),
        ("costs grow with what L2 uses as benches/growth.json says", Box::new(move |o| kept(&limits, o))),
    ];
    for (name, judge) in judges {
        suite.cases.push(Case { name: name.into(), boots: vec![BOOT.into()], judge });
    }
    Ok(())
}
