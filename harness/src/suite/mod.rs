//! The boot tests: boots that run two at a time, and cases that judge what they said.

pub mod attacks;
pub mod bench;
pub mod cases;
pub mod compare;
pub mod drives;
pub mod firmware;
pub mod fixtures;
pub mod growth;
pub mod in_place;
pub mod kvm_waivers;
pub mod lab;
pub mod linux;
pub mod loaders;
pub mod messages;
pub mod models;
pub mod msrs;
pub mod native;
pub mod on_kvm;
pub mod select;
pub mod smp;
pub mod trace;
pub mod usual;
pub mod xen;

use crate::backend::{Backend, Recording, Spec};
use crate::boot::{self, Ended, Outcome};
use crate::clamp::{self, Known};
use crate::session::Session;
use crate::trace::file;
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::output::Output;
use nvmx_setup::proc;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a case sees: the outcomes of its boots, in the order it named them.
pub type Judge = Box<dyn Fn(&[&Outcome]) -> Result<(), String> + Send + Sync>;

/// One test: boots and a judgement.
pub struct Case {
    /// Named after the behaviour
    pub name: String,
    /// The names of its boots
    pub boots: Vec<String>,
    /// What must hold
    pub judge: Judge,
}

/// Boots and the cases that use them.
#[derive(Default)]
pub struct Suite {
    /// By name; an error is a boot that cannot even be described (its guest does not exist)
    pub boots: BTreeMap<String, Result<Spec, String>>,
    /// Boots that may use only what the guest of another boot sees: that one's name
    pub clamps: BTreeMap<String, String>,
    /// What runs a boot, where that is not the session's machine
    pub backends: BTreeMap<String, Arc<dyn Backend + Send>>,
    /// In the order of the report
    pub cases: Vec<Case>,
    /// Cases that run only if they are asked for, by name or all of them: they take longer than what they tell is worth each time
    pub long: BTreeSet<String>,
    /// Where the exits of each boot are recorded, if they are
    pub traces: Option<PathBuf>,
    /// Of cases by name: what is set up for them beside the machine and the images
    pub topics: BTreeMap<String, &'static str>,
}

/// A case's end.
pub struct Verdict<'a> {
    /// The case
    pub case: &'a Case,
    /// `Err` has the reason
    pub result: Result<(), String>,
    /// Where to look for more
    pub folders: Vec<String>,
    /// How long its boots took
    pub seconds: f64,
}

impl Suite {
    /// Boots in the order in which the cases need them, each after the one whose capabilities it waits for.
    fn order(&self) -> Vec<String> {
        let mut order: Vec<String> = Vec::new();
        for name in self.cases.iter().flat_map(|c| &c.boots) {
            for name in self.clamps.get(name).into_iter().chain([name]) {
                if !order.contains(name) {
                    order.push(name.clone());
                }
            }
        }
        order
    }

    fn boot(&self, session: &Session, known: &Known, name: &str) -> Result<Outcome, String> {
        let spec = match self.boots.get(name) {
            Some(spec) => spec.clone()?,
            None => return Err(format!("no boot is named {name}")),
        };
        let spec = match self.clamps.get(name) {
            Some(other) => clamp::clamped(spec, known.wait(other).as_deref()),
            None => spec,
        };
        let (view, backend) = (View::new(&session.ui, Show::Nothing), self.backend(session, name));
        // A boot that is recorded for its case is not recorded for the user as well.
        let traces = self.traces.as_ref().filter(|_| backend.records() && spec.record.is_none());
        let record = traces.map(|_| Recording::kept(&session.images.nvmx)).or(spec.record.clone());
        let outcome = boot::watched(&session.paths, backend, &Spec { record, ..spec }, |line| {
            view.show(line);
            known.look(name, line);
        });
        let mut outcome = outcome.map_err(|e| format!("{e:#}"))?;
        if let Some((folder, trace)) = traces.zip(outcome.trace.take_if(|_| traces.is_some())) {
            let place = folder.join(format!("{}.trace", name.replace('/', "-")));
            let written = Output::prepare(&place).and_then(|output| file::write(&[&trace], &output));
            written.map_err(|e| format!("{}: {e:#}", place.display()))?;
        }
        Ok(outcome)
    }

    fn backend<'a>(&'a self, session: &'a Session, boot: &str) -> &'a dyn Backend {
        match self.backends.get(boot) {
            Some(backend) => backend.as_ref(),
            None => session.backend.as_ref(),
        }
    }

    /// Runs all boots, `jobs` at a time; `told` hears of each case when its last boot is over.
    ///
    /// # Errors
    /// If L0 does not start, or after Ctrl-C.
    pub fn run(&self, session: &Session, jobs: usize, told: impl Fn(&Verdict<'_>) + Sync) -> Result<()> {
        let done: Mutex<BTreeMap<&str, Result<Outcome, String>>> = Mutex::new(BTreeMap::new());
        let told_of: Mutex<Vec<&str>> = Mutex::new(Vec::new());
        let order = self.order();
        let known = Known::default();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                scope.spawn(|| {
                    while let Some(name) = order.get(next.fetch_add(1, Ordering::SeqCst)) {
                        if proc::interrupted() {
                            return;
                        }
                        let result = self.boot(session, &known, name);
                        known.over(name);
                        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                        done.insert(name, result);
                        let mut told_of = told_of.lock().unwrap_or_else(PoisonError::into_inner);
                        for case in &self.cases {
                            let ready = case.boots.iter().all(|b| done.contains_key(b.as_str()));
                            if ready && !told_of.contains(&case.name.as_str()) && !proc::interrupted() {
                                told_of.push(&case.name);
                                told(&judge(case, &done));
                            }
                        }
                    }
                });
            }
        });
        proc::check_interrupt()
    }
}

fn judge<'a>(case: &'a Case, done: &BTreeMap<&str, Result<Outcome, String>>) -> Verdict<'a> {
    let mut outcomes = Vec::new();
    let mut problem = None;
    for name in &case.boots {
        match done.get(name.as_str()) {
            Some(Ok(outcome)) => outcomes.push(outcome),
            Some(Err(error)) => problem = Some(error.clone()),
            None => problem = Some(format!("{name} did not run")),
        }
    }
    Verdict {
        case,
        result: problem
            .or_else(|| outcomes.iter().find_map(|outcome| shallow(outcome)))
            .map_or_else(|| (case.judge)(&outcomes), Err),
        folders: outcomes.iter().map(|o| o.folder.display().to_string()).collect(),
        seconds: outcomes.iter().fold(0.0, |sum, o| sum + o.took.as_secs_f64()),
    }
}

/// Every boot ran to its end and passed.
pub fn all_pass(outcomes: &[&Outcome]) -> Result<(), String> {
    for outcome in outcomes {
        outcome.verdict().map_err(|e| format!("{}: {e}", outcome.name))?;
    }
    Ok(())
}

/// Whether the start of nvmx went so deep into its stack that another compiler might overflow it.
fn shallow(outcome: &Outcome) -> Option<String> {
    outcome
        .transcript
        .a_line_has(messages::LITTLE_STACK)
        .then(|| format!("{}: nvmx had next to no stack left", outcome.name))
}

/// The machine ended by itself, nothing passed, and one of the lines has all of these texts.
pub fn refused(outcome: &Outcome, texts: &[&str]) -> Result<(), String> {
    if let Ended::Timeout(over) = outcome.ended {
        return Err(format!("it hung instead of ending: {over}"));
    }
    if outcome.verdict().is_ok() {
        return Err("it passed, although it should have been refused".into());
    }
    if !outcome.transcript.a_line_has(texts) {
        let said = outcome.transcript.tail(3).join(" / ");
        return Err(format!("no line says `{}`; the last lines: {said}", texts.join("` and `")));
    }
    Ok(())
}
