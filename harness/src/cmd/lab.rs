//! `lab`: every step of the story of the VM exit, run and measured.

use crate::backend::host::L0;
use crate::backend::{Spec, Unit};
use crate::boot::Outcome;
use crate::boot::tell_failure;
use crate::cli::LabArgs;
use crate::lab::figures::Figures;
use crate::lab::stacks::{self, COMPARED, Stack};
use crate::lab::{self, EXPERIMENTS, Experiment, Verdict, pages, text, trace};
use crate::report::page::Format;
use crate::session::Session;
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use serde_json::json;
use std::collections::BTreeSet;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] for a name that does not exist or a file that cannot be written, [`Stop::Guest`] if a boot fails or a count
/// contradicts its claim.
pub fn run(ui: &Ui, args: &LabArgs) -> Result<()> {
    let found: Result<Vec<&Experiment>, String> = args.names.iter().map(|name| lab::find(name)).collect();
    let named = found.map_err(Stop::Usage)?;
    if args.list {
        EXPERIMENTS.iter().for_each(|e| ui.line(&format!("{:12} {}", e.name, e.claim)));
        return Ok(());
    }
    if args.model {
        ui.line(&text::constants());
        return Ok(());
    }
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    let report = args.report.as_deref().map(Format::prepare).transpose()?;
    if json.as_ref().zip(report.as_ref()).is_some_and(|(json, report)| json.is_stdout() && report.is_stdout()) {
        return Err(Stop::Usage("--json and --report cannot both go to standard output".into()).into());
    }
    [&json, &report].into_iter().for_each(|output| ui.reserve_stdout(output.as_ref()));
    let session = Session::start(ui, &args.l0)?.recording(args.trace, None)?;
    let plan = Plan::new(&named, session.backend.unit() == Unit::Instructions && args.l0.l0 != L0::KvmInBochs)?;
    if args.trace {
        let lines = trace::run(&session, &plan.only)?;
        return if args.bless { bless_sample(ui, &session, trace::sample(&lines)) } else { Ok(()) };
    }
    let specs = plan.specs(&session, named.is_empty())?;
    let step = ui.step(&format!("{} boots of the lab", specs.len()));
    let outcomes = stacks::boot_all(&session, &specs);
    drop(step);
    let outcomes = outcomes?;
    let mut figures = stacks::figures(&session, &outcomes.iter().map(|(s, o)| (*s, o)).collect::<Vec<_>>());
    // Where nvmx cannot run, what it says is all there is to be said.
    let lacking = |outcome: &Outcome| outcome.transcript.texts().any(|line| stacks::needed(line).is_some());
    let told = |(_, outcome): &(Stack, Outcome)| if lacking(outcome) { None } else { tell_failure(ui, outcome) };
    let mut failed: Vec<String> = outcomes.iter().filter_map(told).collect();
    if add_recorded(&session.paths, &mut figures, &plan) {
        ui.line(
            "compare: the boots with KVM are those of docs/lab-figures.json, made by `./nvmx lab compare --bless`.",
        );
    }
    show(ui, &figures, &plan, named.is_empty());
    if let Some(output) = &json {
        output.write(&(serde_json::to_string_pretty(&as_json(&figures, &plan.wanted))? + "\n"))?;
    }
    if let (Some(output), Some(path)) = (&report, &args.report) {
        output.write(&lab::html(&figures, &plan.wanted))?;
        ui.note(&format!("the report is {}", path.display()));
    }
    if args.bless {
        bless(ui, &session.paths, figures.clone(), &plan)?;
    }
    let contradicted = |e: &&&Experiment| (e.judge)(&figures).verdict == Verdict::Contradicted;
    let fallen = plan.wanted.iter().filter(contradicted).map(|e| format!("{}: a count contradicts the claim", e.name));
    failed.extend(fallen);
    if failed.is_empty() && !figures.needs.is_empty() {
        return Err(Stop::environment(format!("nvmx needs what this CPU lacks: {}", figures.needs.join("; "))).into());
    }
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

/// What is booted for what is wanted.
struct Plan {
    wanted: Vec<&'static Experiment>,
    stacks: Vec<Stack>,
    /// The guest's experiments; none: all
    only: Vec<&'static str>,
}

impl Plan {
    /// `linux`: whether the machine is one on which a Linux with KVM can be booted.
    fn new(named: &[&'static Experiment], linux: bool) -> Result<Self, Stop> {
        let mut wanted: Vec<&'static Experiment> = if named.is_empty() { EXPERIMENTS.to_vec() } else { named.to_vec() };
        let mut seen = BTreeSet::new();
        wanted.retain(|e| seen.insert(e.name));
        let needs = |stack: &Stack| wanted.iter().any(|e| e.stacks.contains(stack));
        let mut stacks: Vec<Stack> = lab::WITH_LINUX.into_iter().chain(lab::USUAL).filter(needs).collect();
        if !linux && named.iter().any(|e| e.name == "compare") {
            return Err(Stop::Usage("`compare` needs --l0 bochs: KVM then runs on the emulated machine".into()));
        }
        stacks.retain(|stack| linux || !lab::WITH_LINUX.contains(stack));
        let mut only: Vec<&'static str> = Vec::new();
        for name in named.iter().flat_map(|e| if e.name == "compare" { COMPARED.to_vec() } else { vec![e.name] }) {
            if !only.contains(&name) {
                only.push(name);
            }
        }
        Ok(Plan { wanted, stacks, only })
    }

    /// The boots. If all experiments are wanted and no Linux can be had, the boots that need one are left out.
    fn specs(&self, session: &Session, all: bool) -> Result<Vec<(Stack, Spec)>> {
        let mut specs = Vec::new();
        for stack in &self.stacks {
            match stack.spec(session, &stacks::only_in(*stack, &self.only), "") {
                Ok(spec) => specs.push((*stack, spec)),
                Err(why) if all && lab::WITH_LINUX.contains(stack) => {
                    session.ui.note(&format!("{} is not booted: {why:#}", stack.name()));
                }
                Err(why) => return Err(why),
            }
        }
        Ok(specs)
    }
}

/// Boots with Linux that were not made come from the recorded figures, if those are of the same machine. Whether any did.
fn add_recorded(paths: &Paths, figures: &mut Figures, plan: &Plan) -> bool {
    let Ok(recorded) = pages::read(&paths.root) else { return false };
    if recorded.machine != figures.machine || recorded.unit != figures.unit {
        return false;
    }
    let needed = |stack: &Stack| plan.wanted.iter().any(|e| e.stacks.contains(stack));
    let mut any = false;
    for stack in lab::WITH_LINUX.into_iter().filter(needed).map(Stack::name) {
        if let (false, Some(boot)) = (figures.boots.contains_key(stack), recorded.boots.get(stack)) {
            figures.boots.insert(stack.into(), boot.clone());
            any = true;
        }
    }
    any
}

fn show(ui: &Ui, figures: &Figures, plan: &Plan, overview: bool) {
    if overview {
        ui.line(&ui.paint("The story of the VM exit, measured", Style::new().bold()));
        ui.line(&text::overview(figures, &plan.wanted));
        ui.line(&format!("Measured on {}. {}", figures.machine, text::cycles_note(figures)));
        for e in &plan.wanted {
            e.lacks(figures).iter().for_each(|what| ui.line(text::wrapped(&format!("{}: {what}", e.name)).trim_end()));
        }
    } else {
        plan.wanted.iter().for_each(|e| ui.line(&text::explained(figures, e)));
    }
}

fn as_json(figures: &Figures, wanted: &[&Experiment]) -> serde_json::Value {
    let experiments: Vec<_> = wanted
        .iter()
        .map(|e| {
            json!({
                "name": e.name, "title": e.title, "claim": e.claim, "condition": e.condition, "sources": e.sources,
                "judgement": (e.judge)(figures), "table": (e.table)(figures), "missing": figures.missing(e.name), "lacks": e.lacks(figures),
            })
        })
        .collect();
    json!({ "schema": "nvmx-lab/1", "machine": figures.machine, "unit": figures.unit, "experiments": experiments, "boots": figures.boots })
}

/// Records what this run measured; boots of all experiments take the place of those that are there, others only add to them.
fn bless(ui: &Ui, paths: &Paths, run: Figures, plan: &Plan) -> Result<()> {
    let mut figures = pages::read(&paths.root).unwrap_or_else(|_| Figures::new(run.machine.clone(), &run.unit));
    if figures.machine != run.machine {
        return Err(
            Stop::Usage(format!("docs/lab-figures.json is of {}, this is {}", figures.machine, run.machine)).into()
        );
    }
    for (name, boot) in run.boots {
        let there = figures.boots.entry(name).or_default();
        if plan.only.is_empty() {
            *there = boot;
        } else {
            there.rows.extend(boot.rows);
            there.missing.extend(boot.missing);
        }
    }
    pages::bless(&paths.root, &figures)?;
    ui.line("docs/lab-figures.json, docs/lab.md, docs/lab.zh.md and docs/lab/*.svg are written");
    Ok(())
}

/// Records the tree that the pages show.
fn bless_sample(ui: &Ui, session: &Session, sample: Vec<String>) -> Result<()> {
    if sample.is_empty() {
        return Err(
            Stop::Usage("--trace --bless needs the experiment `price`, of which the pages show a row".into()).into()
        );
    }
    let mut figures = pages::read(&session.paths.root)?;
    figures.trace = sample;
    pages::bless(&session.paths.root, &figures)?;
    ui.line("docs/lab-figures.json, docs/lab.md and docs/lab.zh.md have the new tree");
    Ok(())
}
