//! `run --depth N`: nvmx in nvmx in ..., then the guest. One boot for each depth, so that the growth can be seen.

use crate::backend::Spec;
use crate::boot::tell_failure;
use crate::boot::{self, Outcome};
use crate::cli::RunArgs;
use crate::cmd::files::Files;
use crate::image::Wanted;
use crate::report::growth::{self, Depth, Growth};
use crate::report::json::Run;
use crate::report::{self, table};
use crate::session::{LONG, Session};
use crate::suite::compare;
use crate::sweep::fewer_events;
use crate::transcript::stack;
use crate::transcript::stack::StackLevel;
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use owo_colors::Style;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if one of the boots fails.
pub fn run(ui: &Ui, args: &RunArgs) -> Result<()> {
    let files = Files::prepare(ui, args)?;
    let session = Session::start_with(ui, &args.l0, &Wanted::Guest(args.l2.clone()))?.of_run(args)?;
    let limit = args.l0.timeout.unwrap_or(LONG);
    let guest_args = fewer_events(&args.l2, &args.l2_args, args.depth);
    let mut specs = vec![session.bare(&args.l2, &guest_args)?];
    for depth in 1..=args.depth {
        specs.push(session.stacked(&args.l2, &guest_args, args.fields, depth)?);
    }
    specs.iter_mut().for_each(|spec| spec.timeout = limit);
    banner(ui, args, &session.l0());
    let step = ui.step(&format!("{} alone, and under up to {} nvmx", args.l2, args.depth));
    let outcomes = boots(ui, &session, &specs, args.depth);
    drop(step);
    let outcomes = outcomes?;
    let failed: Vec<String> = outcomes.iter().filter_map(|outcome| tell_failure(ui, outcome)).collect();
    let [bare, nested @ ..] = outcomes.as_slice() else { anyhow::bail!("nothing has run") };
    let averages: Vec<_> = nested.iter().map(|o| report::events(Some(&bare.transcript), &o.transcript)).collect();
    let depths = (1..).zip(nested).map(|(depth, outcome)| describe(depth, &session, bare, outcome)).collect();
    let growth = Growth::new(depths, &averages);
    let unit = session.backend.unit();
    let heading = |text: &str| ui.paint(text, Style::new().bold());
    // Counters are those of the innermost nvmx: with one it is the machine itself that it counts.
    let events = averages.into_iter().next().unwrap_or_default();
    ui.line("");
    ui.line(&heading(&format!("With one nvmx, where {} is L2. {}", args.l2, table::title(unit))));
    ui.line(&table::render(&events));
    table::footer(&events, unit).iter().for_each(|line| ui.line(line));
    ui.line("");
    ui.line(&heading(&growth::title(unit)));
    ui.line(&growth::render(&growth));
    growth::footer(&growth).iter().for_each(|line| ui.line(line));
    let differ = growth.depths.iter().any(|d| d.passed && d.checks_differ > 0);
    if let Some(one) = nested.first() {
        let levels = stack::stack(session.l0(), &one.transcript);
        let boots: Vec<&Outcome> = outcomes.iter().collect();
        let run = Run::new(levels, stack::strategy(&one.transcript), unit, events, &boots);
        files.write(ui, &session, args, Run { growth: Some(growth), ..run }, one, &boots)?;
    }
    match failed.as_slice() {
        [] if differ => Err(Stop::Guest("check records differ from those of the guest alone".into()).into()),
        [] => Ok(()),
        failed => Err(Stop::Guest(failed.join("\n")).into()),
    }
}

fn banner(ui: &Ui, args: &RunArgs, l0: &StackLevel) {
    ui.line(&ui.paint(&format!("L0 | {}", stack::banner_line(l0, None)), Style::new().bold()));
    let (depth, guest) = (args.depth, &args.l2);
    ui.line(&format!(
        "{depth} nvmx, each in the one before it: L1 to L{depth}; {guest} is L{}, its guest L{}. Each nvmx takes itself for L1, \
         so {guest}'s records say L2 and L3.",
        depth + 1,
        depth + 2
    ));
}

/// The deepest boot with its lines on the screen; beside it the others, one after the other.
fn boots(ui: &Ui, session: &Session, specs: &[Spec], depth: u32) -> Result<Vec<Outcome>> {
    let Some((deepest, others)) = specs.split_last() else { return Ok(Vec::new()) };
    let boot = |spec: &Spec, view: &View| boot::boot(&session.paths, session.backend.as_ref(), spec, view);
    let (others, deepest) = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let quiet = View::new(ui, Show::Warnings);
            others.iter().map(|spec| boot(spec, &quiet)).collect::<Result<Vec<_>>>()
        });
        let deepest = boot(deepest, &View::of_stack(ui, Show::All, depth));
        (others.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a boot panicked"))), deepest)
    });
    let mut outcomes = others?;
    outcomes.push(deepest?);
    Ok(outcomes)
}

fn describe(depth: u32, session: &Session, bare: &Outcome, outcome: &Outcome) -> Depth {
    let compared = compare::compare(&bare.transcript, &outcome.transcript);
    Depth {
        depth,
        stack: stack::stack(session.l0(), &outcome.transcript),
        strategies: stack::strategies(&outcome.transcript),
        seconds: (outcome.took.as_secs_f64() * 10.0).round() / 10.0,
        passed: outcome.verdict().is_ok(),
        checks: compared.compared,
        checks_differ: compared.differ.len(),
    }
}
