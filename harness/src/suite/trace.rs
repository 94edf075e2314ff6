//! Boot tests of traces: what the emulator recorded is what nvmx and its guest counted themselves.

use super::{Case, Suite, all_pass};
use crate::backend::Recording;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report;
use crate::session::Session;
use crate::trace::stat::rows;
use crate::trace::tree::{Builder, Next};
use nvmx::vmx::exit::{BasicReason, ExitReason};

/// Adds the boot and its case.
pub fn add(suite: &mut Suite, session: &Session) {
    const BOOT: &str = "cascade-traced";
    let record = Some(Recording::kept(&session.images.nvmx));
    let spec = session.nested("cascade", "events=50", Fields::ZeroCopy).map_err(|e| format!("{e:#}"));
    let named = |spec| crate::backend::Spec { name: BOOT.into(), record: record.clone(), ..spec };
    suite.boots.insert(BOOT.into(), spec.map(named));
    let name = "a trace of cascade has the exits, VMX instructions and costs that nvmx counts";
    suite.cases.push(Case { name: name.into(), boots: vec![BOOT.into()], judge: Box::new(same) });
}

fn same(outcomes: &[&Outcome]) -> Result<(), String> {
    all_pass(outcomes)?;
    let outcome = outcomes.first().ok_or("there was no boot")?;
    let boot = outcome.trace.as_ref().ok_or("no exits were recorded")?;
    let built = boot.build();
    let events = report::events(None, &outcome.transcript);
    let cpuid = events.iter().find(|event| event.event == "cpuid").ok_or("cascade measured no CPUID")?;
    let tree = steady(&built, BasicReason::CPUID).ok_or("there is no tree of a CPUID of L3")?;
    let totals = built.totals(tree);
    let root = totals.root;
    let pairs = [
        ("hardware exits", cpuid.hw_exits, u64::from(totals.exits)),
        ("VMREAD", cpuid.l1_vmread, root.vmread.into()),
        ("VMWRITE", cpuid.l1_vmwrite, root.vmwrite.into()),
        ("VMPTRLD", cpuid.l1_vmptrld, root.vmptrld.into()),
        ("VMCLEAR", cpuid.l1_vmclear, root.vmclear.into()),
    ];
    for (what, counted, traced) in pairs {
        if counted != Some(traced as f64) {
            return Err(format!("{what} of a CPUID of L3: nvmx counts {counted:?}, the trace has {traced}"));
        }
    }
    // The loop of L3 around the instruction is no part of the exit.
    let cost = built.exits.get(tree as usize).and_then(|exit| exit.cost()).ok_or("the tree has no end")? as f64;
    let nested = cpuid.nested.unwrap_or(0.0);
    if cost > nested || nested - cost > 20.0 {
        return Err(format!("a CPUID of L3 costs {nested} by L3's clock and {cost} in the trace"));
    }
    let at = built.exits.get(tree as usize).map(|exit| boot.name(exit.level, exit.facts.rip)).unwrap_or_default();
    if !at.contains("cpuid") {
        return Err(format!("a CPUID of L3 is at `{at}`, which is not its function"));
    }
    let fills = built.exits.iter().filter(|exit| exit.fill().is_some()).count();
    let kinds = rows(&built);
    let both = |level: u8| kinds.iter().any(|row| row.level == level && row.count > 0);
    if fills == 0 || !both(2) || !both(3) {
        return Err(format!("{fills} entries of ept02 were filled, and there are {} rows", kinds.len()));
    }
    Ok(())
}

/// The median tree of an exit of L3 that L2 saw.
fn steady(built: &Builder, reason: BasicReason) -> Option<u32> {
    let exit = |number: u32| built.exits.get(number as usize);
    let mut trees: Vec<(u64, u32)> = built
        .roots()
        .filter_map(|root| Some((root, exit(root)?)))
        .filter(|(_, e)| e.level == 3 && e.reason() == ExitReason::exit(reason))
        .filter(|(_, e)| matches!(e.next, Next::Reflected { .. }))
        .filter_map(|(root, e)| Some((e.cost()?, root)))
        .collect();
    trees.sort_unstable();
    trees.get(trees.len() / 2).map(|(_, root)| *root)
}
