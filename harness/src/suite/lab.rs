//! The boot tests of the lab: each experiment's claim by its counts, and docs/lab.md equal to a run.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::backend::Recording;
use crate::backend::Spec;
use crate::boot::Outcome;
use crate::lab::figures::{Boot, Figures};
use crate::lab::stacks::{Stack, only_in};
use crate::lab::{EXPERIMENTS, Experiment, USUAL, Verdict, WITH_LINUX, pages, trace};
use crate::session::Session;
use crate::trace::record;
use anyhow::Result;
use std::path::Path;

fn boot_name(stack: Stack) -> String {
    format!("lab-{}", stack.name())
}

fn add_boots(suite: &mut Suite, session: &Session, stacks: &[Stack]) {
    for stack in stacks {
        let spec = stack.spec(session, &only_in(*stack, &[]), "").map_err(|e| format!("{e:#}"));
        suite.boots.insert(boot_name(*stack), spec);
    }
}

fn case(suite: &mut Suite, name: String, stacks: &[Stack], judge: Judge) {
    suite.cases.push(Case { name, boots: stacks.iter().map(|s| boot_name(*s)).collect(), judge });
}

/// An experiment's claim.
fn claim(suite: &mut Suite, e: &'static Experiment) {
    let judge: Judge = Box::new(|outcomes| {
        let judgement = (e.judge)(&figures(e.stacks, outcomes)?);
        let failed = judgement.asserted.iter().filter(|(_, holds)| !holds).map(|(what, _)| what.as_str());
        match judgement.verdict {
            Verdict::Contradicted => Err(failed.collect::<Vec<_>>().join("\n")),
            Verdict::NotMeasured => Err("a figure is missing".into()),
            _ => Ok(()),
        }
    });
    case(suite, format!("lab {}: its claim is borne out by counts", e.name), e.stacks, judge);
}

fn needs_linux(e: &&&'static Experiment) -> bool {
    e.stacks.iter().any(|stack| WITH_LINUX.contains(stack))
}

/// Adds the boots and cases that need no Linux.
pub fn add(suite: &mut Suite, session: &Session) {
    add_boots(suite, session, &USUAL);
    EXPERIMENTS.iter().filter(|e| !needs_linux(e)).for_each(|e| claim(suite, e));
    let same = || -> Judge { Box::new(|o| compare::agree(o[0], o[1])) };
    case(suite, "lab sees under nvmx what it sees bare".into(), &[Stack::One, Stack::Nested], same());
    case(suite, "lab sees under nvmx in nvmx what it sees bare".into(), &[Stack::One, Stack::Twice], same());
    let root = session.paths.root.clone();
    let judge: Judge = Box::new(move |o| as_told(&root, &USUAL, o));
    case(suite, "docs/lab.md tells what the lab measures".into(), &USUAL, judge);
    add_trace(suite, session);
}

/// `--trace` shows what the pages show. The folder of the log goes with the boots.
fn add_trace(suite: &mut Suite, session: &Session) {
    const NAME: &str = "lab-trace";
    let spec = trace::spec(session, &["price"]).and_then(|spec| {
        if session.dry {
            return Ok(spec);
        }
        let folder = record::folder(&session.paths)?;
        let record = Some(Recording::new(&folder, &session.images.nvmx));
        let _ = folder.keep();
        Ok(Spec { name: NAME.into(), record, ..spec })
    });
    suite.boots.insert(NAME.into(), spec.map_err(|e| format!("{e:#}")));
    let root = session.paths.root.clone();
    let judge: Judge = Box::new(move |o| {
        all_pass(o)?;
        let recorded = o[0].trace.as_ref().ok_or("no exit was recorded")?;
        let sample = trace::sample(&trace::rounds(&o[0].transcript, recorded, &["price"]));
        let told = pages::read(&root).map_err(|e| format!("{e:#}"))?.trace;
        match trace::shape(&sample) == trace::shape(&told) && !sample.is_empty() {
            true => Ok(()),
            false => Err(format!("{}\n./nvmx lab price --trace --bless writes it anew", sample.join("\n"))),
        }
    });
    let name = "lab --trace shows a CPUID and what it caused as docs/lab.md does".into();
    suite.cases.push(Case { name, boots: vec![NAME.into()], judge });
}

/// Adds those with a Linux: KVM in nvmx's place, and on nvmx.
///
/// # Errors
/// Never: all topics have this type.
pub fn add_with_linux(suite: &mut Suite, session: &Session) -> Result<()> {
    add_boots(suite, session, &WITH_LINUX);
    for stack in [Stack::One, Stack::Nested] {
        if !suite.boots.contains_key(&boot_name(stack)) {
            add_boots(suite, session, &[stack]);
        }
    }
    EXPERIMENTS.iter().filter(needs_linux).for_each(|e| claim(suite, e));
    let root = session.paths.root.clone();
    let judge: Judge = Box::new(move |o| as_told(&root, &WITH_LINUX, o));
    case(suite, "docs/lab.md tells what the lab measures with KVM".into(), &WITH_LINUX, judge);
    Ok(())
}

fn figures(stacks: &[Stack], outcomes: &[&Outcome]) -> Result<Figures, String> {
    all_pass(outcomes)?;
    let mut figures = Figures::new("the suite's".into(), "instructions");
    for (stack, outcome) in stacks.iter().zip(outcomes) {
        figures.boots.insert(stack.name().into(), Boot::read(&outcome.transcript, stack.depth()));
    }
    Ok(figures)
}

/// Exits exactly, instructions nearly.
fn as_told(root: &Path, stacks: &[Stack], outcomes: &[&Outcome]) -> Result<(), String> {
    let recorded = pages::read(root).map_err(|e| format!("{e:#}"))?;
    let run = figures(stacks, outcomes)?;
    let mut found = Vec::new();
    for (stack, boot) in &run.boots {
        match recorded.boots.get(stack) {
            Some(told) => {
                found.extend(pages::differences(told, boot).into_iter().map(|what| format!("{stack}: {what}")))
            }
            None => found.push(format!("{stack} is not in docs/lab-figures.json")),
        }
    }
    found.truncate(12);
    if found.is_empty() { Ok(()) } else { Err(format!("{}\n./nvmx lab --bless writes it anew", found.join("\n"))) }
}
