//! Boot tests of traces: what the emulator recorded is what nvmx and its guest counted themselves, and what nvmx recorded is
//! what the emulator did.

use super::{Case, Suite, all_pass};
use crate::backend::{Machine, Recording, Spec};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report;
use crate::session::Session;
use crate::trace::file::Boot;
use crate::trace::stat::rows;
use crate::trace::tree::{Builder, Exit, Next};
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
    ring(suite, session);
}

/// The same boot with nvmx's own trace, and one on several CPUs.
fn ring(suite: &mut Suite, session: &Session) {
    const BOOT: &str = "cascade-ring";
    const SMP: &str = "smp-ring";
    let record = Some(Recording::told(&session.images.nvmx));
    let traced = |name: &str, guest, args, cpus| -> Result<Spec, String> {
        let mut spec = session.nested(guest, args, Fields::ZeroCopy).map_err(|e| format!("{e:#}"))?;
        spec.kernel.args.push_str(&format!(" trace={KEEP}"));
        let machine = Machine { cpus, ..spec.machine };
        Ok(Spec { name: name.into(), record: record.clone(), machine, ..spec })
    };
    suite.boots.insert(BOOT.into(), traced(BOOT, "cascade", "events=50", 1));
    suite.boots.insert(SMP.into(), traced(SMP, "smp", "part=guests", 3));
    let name = "nvmx's own trace of cascade is the end of what the emulator records";
    let boots = vec!["cascade-traced".into(), BOOT.into()];
    suite.cases.push(Case { name: name.into(), boots, judge: Box::new(last) });
    let name = "nvmx's own trace of three CPUs has trees of each";
    suite.cases.push(Case { name: name.into(), boots: vec![SMP.into()], judge: Box::new(of_each) });
}

/// Exits that nvmx keeps in these boots: telling them takes the emulated serial line some time.
const KEEP: usize = 100;

fn last(outcomes: &[&Outcome]) -> Result<(), String> {
    all_pass(outcomes)?;
    let [emulator, nvmx] = outcomes else { return Err("there were no two boots".into()) };
    let built = |outcome: &Outcome| outcome.trace.as_ref().map(Boot::build).ok_or("no exits were recorded");
    let (emulator, nvmx) = (built(emulator)?, built(nvmx)?);
    // The last of nvmx is L2's word to the port that ends the machine: by it the trace is told, and only then.
    let Some((end, before)) = nvmx.exits.split_last() else { return Err("nvmx told no exits".into()) };
    if (end.level, end.reason()) != (2, ExitReason::exit(BasicReason::IO_INSTRUCTION)) || before.len() + 1 != KEEP {
        return Err(format!("the last of {} exits is {} of L{}", nvmx.exits.len(), end.reason(), end.level));
    }
    let told = |exit: &Exit| (exit.level, exit.facts.reason, exit.facts.rip, exit.facts.rax, exit.facts.qualification);
    let from = emulator.exits.len().checked_sub(before.len()).ok_or("the emulator recorded too few")?;
    for (number, (one, other)) in emulator.exits[from..].iter().zip(before).enumerate() {
        if told(one) != told(other) || (one.next, one.root) != (other.next, other.root) && number > 0 {
            return Err(format!("exit {number}: the emulator says {one:x?}, nvmx {other:x?}"));
        }
    }
    Ok(())
}

fn of_each(outcomes: &[&Outcome]) -> Result<(), String> {
    all_pass(outcomes)?;
    let boot = outcomes.first().and_then(|outcome| outcome.trace.as_ref()).ok_or("no exits were recorded")?;
    let built = boot.build();
    for cpu in 0..3 {
        let of_cpu = |exit: &&Exit| exit.cpu == cpu;
        let count = built.exits.iter().filter(of_cpu).count();
        let parents = built.exits.iter().filter(of_cpu).filter_map(|exit| built.exits.get(exit.parent? as usize));
        let strange = parents.filter(|parent| parent.cpu != cpu).count();
        let nested = built.exits.iter().filter(of_cpu).any(|exit| exit.level == 3);
        if count == 0 || strange > 0 || !nested {
            return Err(format!(
                "CPU {cpu} has {count} exits, {strange} of them in trees of others, L3 among them: {nested}"
            ));
        }
    }
    Ok(())
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
    let cost = built.exits.get(tree as usize).and_then(|exit| exit.cost).ok_or("the tree has no end")? as f64;
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
        .filter_map(|(root, e)| Some((e.cost?, root)))
        .collect();
    trees.sort_unstable();
    trees.get(trees.len() / 2).map(|(_, root)| *root)
}
