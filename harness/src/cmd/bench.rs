//! `bench`: the counts of a run against the limits that are checked in.

use crate::boot;
use crate::cli::{BenchArgs, Fields};
use crate::cmd::run::tell_failure;
use crate::error::Stop;
use crate::image::Wanted;
use crate::output::Output;
use crate::report::json::{Bench, Document, Limit, Report};
use crate::report::{self, budget::Budget, table};
use crate::session::{Session, budget_file};
use crate::transcript::{Show, View};
use crate::ui::Ui;
use anyhow::Result;
use owo_colors::Style;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if the boot fails or a limit is broken.
pub fn run(ui: &Ui, args: &BenchArgs) -> Result<()> {
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    ui.reserve_stdout(json.as_ref());
    let session = Session::start_with(ui, &args.l0, &Wanted::Guest("cascade".into()))?;
    let path = args.budget.clone().unwrap_or_else(|| budget_file(&session.paths.root));
    let budget = Budget::read(&path)?;
    if session.machine.model != budget.cpu_model {
        ui.note(&format!("the limits are for the CPU model {}, this is {}", budget.cpu_model, session.machine.model));
    }
    let fields = if budget.strategy == Fields::Trapped.option() { Fields::Trapped } else { Fields::ZeroCopy };
    let spec = session.nested("cascade", "", fields)?;
    let step = ui.step("cascade under nvmx");
    let outcome = boot::boot(&session.paths, session.backend.as_ref(), &spec, &View::new(ui, Show::Warnings))?;
    drop(step);
    if let Some(reason) = tell_failure(ui, &outcome) {
        return Err(Stop::Guest(reason).into());
    }
    let events = report::events(None, &outcome.transcript);
    ui.line(&table::render(&events));
    let applied = budget.apply(&events);
    for rule in &applied {
        let (mark, style) = if rule.kept { ("kept  ", Style::new().green()) } else { ("BROKEN", Style::new().red()) };
        ui.line(&format!("{} {}", ui.paint(mark, style), rule.text()));
    }
    if let Some(output) = &json {
        let limits = applied.iter().map(|rule| Limit { text: rule.text(), kept: rule.kept }).collect();
        let bench = Bench { cpu_model: session.machine.model.clone(), events: events.clone(), limits };
        Document::new(Report::Bench(bench)).write(output)?;
    }
    let broken = applied.iter().filter(|r| !r.kept).count();
    if broken == 0 { Ok(()) } else { Err(Stop::Guest(format!("{broken} limits are broken")).into()) }
}
