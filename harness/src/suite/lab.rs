//! The boot tests of the lab: each experiment's claim by its counts, and docs/lab.md equal to a run.

use super::{Case, Judge, Suite, all_pass, compare};
use crate::boot::Outcome;
use crate::lab::figures::{Boot, Figures};
use crate::lab::stacks::{Stack, only_in};
use crate::lab::{EXPERIMENTS, USUAL, Verdict, pages};
use crate::session::Session;
use std::path::Path;

/// Adds the boots and cases. What needs a Linux (`compare`) is left to `./nvmx lab compare`.
pub fn add(suite: &mut Suite, session: &Session) {
    let name = |stack: Stack| format!("lab-{}", stack.name());
    for stack in USUAL {
        let spec = stack.spec(session, &only_in(stack, &[]), "").map_err(|e| format!("{e:#}"));
        suite.boots.insert(name(stack), spec);
    }
    let mut case = |text: String, stacks: &[Stack], judge: Judge| {
        suite.cases.push(Case { name: text, boots: stacks.iter().map(|s| name(*s)).collect(), judge });
    };
    for e in EXPERIMENTS.iter().filter(|e| e.stacks.iter().all(|s| USUAL.contains(s))) {
        let stacks = e.stacks;
        let judge: Judge = Box::new(|outcomes| {
            let judgement = (e.judge)(&figures(e.stacks, outcomes)?);
            let failed = judgement.asserted.iter().filter(|(_, holds)| !holds).map(|(what, _)| what.as_str());
            match judgement.verdict {
                Verdict::Contradicted => Err(failed.collect::<Vec<_>>().join("\n")),
                Verdict::NotMeasured => Err("a figure is missing".into()),
                _ => Ok(()),
            }
        });
        case(format!("lab {}: its claim is borne out by counts", e.name), stacks, judge);
    }
    let same: Judge = Box::new(|o| compare::agree(o[0], o[1]));
    case("lab sees under nvmx what it sees bare".into(), &[Stack::One, Stack::Nested], same);
    let same: Judge = Box::new(|o| compare::agree(o[0], o[1]));
    case("lab sees under nvmx in nvmx what it sees bare".into(), &[Stack::One, Stack::Twice], same);
    let root = session.paths.root.clone();
    case("docs/lab.md tells what the lab measures".into(), &USUAL, Box::new(move |o| as_told(&root, o)));
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
fn as_told(root: &Path, outcomes: &[&Outcome]) -> Result<(), String> {
    let recorded = pages::read(root).map_err(|e| format!("{e:#}"))?;
    let run = figures(&USUAL, outcomes)?;
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
