//! `lab`: every step of the story of the VM exit, run and measured.

use crate::backend::Unit;
use crate::cli::LabArgs;
use crate::cmd::run::tell_failure;
use crate::error::Stop;
use crate::lab::figures::Figures;
use crate::lab::stacks::{self, Stack};
use crate::lab::{self, EXPERIMENTS, Experiment, Verdict, pages, text};
use crate::output::Output;
use crate::paths::Paths;
use crate::session::Session;
use crate::transcript::{Line, Transcript};
use crate::ui::Ui;
use anyhow::Result;
use l2_protocol::Kind;
use nvmx::vmx::exit::BasicReason;
use owo_colors::Style;
use serde_json::json;

/// What `compare` takes its rows from.
const COMPARED: [&str; 5] = ["price", "syscall", "msr_bitmap", "paging", "cow"];

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] for a name that does not exist, [`Stop::Guest`] if a boot fails or a count contradicts its claim.
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
    let session = Session::start(ui, &args.l0)?;
    let plan = Plan::new(&named, args, session.backend.unit())?;
    let step = ui.step(&format!("{} boots of the lab", plan.stacks.len()));
    let outcomes = stacks::boot_all(&session, &plan.stacks, &plan.only, if args.trace { "trace" } else { "" });
    drop(step);
    let outcomes = outcomes?;
    let failed: Vec<String> = outcomes.iter().filter_map(|(_, outcome)| tell_failure(ui, outcome)).collect();
    if args.trace {
        let traced = outcomes.first().map(|(_, outcome)| &outcome.transcript);
        traced.into_iter().flat_map(|t| trace(t, &plan.wanted)).for_each(|line| ui.line(&line));
        return if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) };
    }
    let mut figures = stacks::figures(&session, &outcomes.iter().map(|(s, o)| (*s, o)).collect::<Vec<_>>());
    let recorded = add_recorded(&session.paths, &mut figures);
    show(ui, &figures, &plan, named.is_empty());
    if recorded && plan.wanted.iter().any(|e| e.name == "compare") && !plan.stacks.contains(&Stack::Kvm) {
        ui.line(
            "compare: the boots with KVM are those of docs/lab-figures.json, made by `./nvmx lab compare --bless`.",
        );
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&as_json(&figures, &plan.wanted))? + "\n";
        Output::prepare(path)?.write(&text)?;
    }
    if let Some(path) = &args.report {
        Output::prepare(path)?.write(&lab::html(&figures, &plan.wanted))?;
        ui.line(&format!("the report is {}", path.display()));
    }
    if args.bless {
        bless(ui, &session.paths, figures.clone(), &plan)?;
    }
    let contradicted = |e: &&&Experiment| (e.judge)(&figures).verdict == Verdict::Contradicted;
    let fallen = plan.wanted.iter().filter(contradicted).map(|e| format!("{}: a count contradicts the claim", e.name));
    let failed: Vec<String> = failed.into_iter().chain(fallen).collect();
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
    fn new(named: &[&'static Experiment], args: &LabArgs, unit: Unit) -> Result<Self, Stop> {
        let wanted: Vec<&'static Experiment> = if named.is_empty() { EXPERIMENTS.to_vec() } else { named.to_vec() };
        let needs = |stack: &Stack| wanted.iter().any(|e| e.stacks.contains(stack));
        // The longest first. The boots with Linux only if they are asked for.
        let all =
            lab::USUAL.into_iter().chain([Stack::Kvm, Stack::KvmOnNvmx].into_iter().filter(|_| !named.is_empty()));
        let mut stacks: Vec<Stack> = all.filter(needs).collect();
        let heavy = stacks.iter().any(|s| matches!(s, Stack::Kvm | Stack::KvmOnNvmx));
        if heavy && unit == Unit::Cycles {
            return Err(Stop::Usage("`compare` needs --l0 bochs: KVM then runs on the emulated machine".into()));
        }
        if args.trace {
            stacks = vec![Stack::Nested];
        }
        let mut only: Vec<&'static str> = Vec::new();
        for name in named.iter().flat_map(|e| if e.name == "compare" { COMPARED.to_vec() } else { vec![e.name] }) {
            if !only.contains(&name) {
                only.push(name);
            }
        }
        Ok(Plan { wanted, stacks, only })
    }
}

/// Boots that were not made come from the recorded figures, if those are of the same machine.
fn add_recorded(paths: &Paths, figures: &mut Figures) -> bool {
    let Ok(recorded) = pages::read(&paths.root) else { return false };
    if recorded.machine != figures.machine || recorded.unit != figures.unit {
        return false;
    }
    for stack in [Stack::Kvm, Stack::KvmOnNvmx].map(Stack::name) {
        if let (false, Some(boot)) = (figures.boots.contains_key(stack), recorded.boots.get(stack)) {
            figures.boots.insert(stack.into(), boot.clone());
        }
    }
    true
}

fn show(ui: &Ui, figures: &Figures, plan: &Plan, overview: bool) {
    if overview {
        ui.line(&ui.paint("The story of the VM exit, measured", Style::new().bold()));
        ui.line(&text::overview(figures, &plan.wanted));
        ui.line(&format!("Measured on {}. {}", figures.machine, text::cycles_note(figures)));
        for e in &plan.wanted {
            figures
                .missing(e.name)
                .iter()
                .for_each(|what| ui.line(&format!("{}: this machine has no {what}. {}", e.name, e.lacking)));
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
                "judgement": (e.judge)(figures), "table": (e.table)(figures), "missing": figures.missing(e.name),
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

/// The first exits of each row, as the guest's own hypervisor saw them under nvmx.
fn trace(transcript: &Transcript, wanted: &[&Experiment]) -> Vec<String> {
    let (mut lines, mut exits) = (Vec::new(), Vec::new());
    for line in &transcript.lines {
        match line {
            Line::Text(text) => exits.extend(text.strip_prefix("[L2] exit ").map(traced)),
            Line::Record(record) if record.kind == Kind::Event => {
                let experiment = record.get("experiment").unwrap_or_default();
                if wanted.iter().any(|e| e.name == experiment) && record.get("scope") == Some("l3") {
                    lines.push(format!(
                        "{experiment}, {}: exits of L3 that L2 saw, in order",
                        record.get("name").unwrap_or("?")
                    ));
                    let none = if exits.is_empty() { vec!["  none".to_string()] } else { Vec::new() };
                    lines.extend(none.into_iter().chain(std::mem::take(&mut exits)));
                }
                exits.clear();
            }
            _ => {}
        }
    }
    lines
}

/// "10 qualification 0x0 rip 0x1000" with the reason's name.
fn traced(text: &str) -> String {
    let (number, rest) = text.split_once(' ').unwrap_or((text, ""));
    let name = number.parse().map(|n| format!("{}", BasicReason(n))).unwrap_or_else(|_| number.to_string());
    format!("  {name:24} {rest}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn a_trace_lists_the_exits_of_each_row() {
        let said = transcript(&[
            "[L2] exit 10 qualification 0x0 rip 0x1000",
            "@L2 event experiment=price name=cpuid scope=l3 count=1 ticks=1 exits=1",
            "@L2 event experiment=price name=rdtsc_passed scope=l3 count=1 ticks=1 exits=0",
        ]);
        let text = trace(&said, &[lab::find("price").unwrap()]).join("\n");
        assert!(text.contains("CPUID") && text.contains("rip 0x1000") && text.contains("none"), "{text}");
        assert!(trace(&said, &[lab::find("mmio").unwrap()]).is_empty());
    }
}
