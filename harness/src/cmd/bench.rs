//! `bench`: the counts of a run against the limits and the ledger that are checked in, or against an earlier run.

use crate::backend::{Spec, Unit};
use crate::boot;
use crate::boot::tell_failure;
use crate::cli::{BenchArgs, Fields, L1};
use crate::cmd::bench_stack;
use crate::cmd::run::both;
use crate::image::Wanted;
use crate::report::json::{Bench, Document, Limit, Report};
use crate::report::ledger::{self, Booked, Difference, Which};
use crate::report::page::Format;
use crate::report::provenance::{Place, Provenance};
use crate::report::{self, Event, budget::Budget, table};
use crate::session::{Copies, LONG, Session, budget_file};
use crate::sweep::{self, Sweep};
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use serde_json::Value;
use std::path::Path;

/// What a guest measured.
struct Measured {
    /// Its name in the ledger
    guest: &'static str,
    /// For people
    title: &'static str,
    events: Vec<Event>,
}

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if a boot fails, a limit is broken or a figure differs, [`Stop::Usage`] if there is nothing to compare with.
pub fn run(ui: &Ui, args: &BenchArgs) -> Result<()> {
    if args.stack {
        return bench_stack::run(ui, args);
    }
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    let drawn = args.report.as_deref().map(Format::prepare).transpose()?;
    [&json, &drawn].into_iter().for_each(|output| ui.reserve_stdout(output.as_ref()));
    let earlier = args.compare.as_deref().map(Earlier::read).transpose()?;
    let session = Session::start_with(ui, &args.l0, &Wanted::All)?;
    let place = Place::of(&session);
    if let Some(earlier) = &earlier {
        earlier.must_be_of(&place)?;
    }
    let path = args.budget.clone().unwrap_or_else(|| budget_file(&session.paths.root));
    let mut budget = Budget::read(&path)?;
    let another = budget.is_for_another(&session.machine, &place.l0);
    if let (Some(why), true) = (&another, args.bless) {
        return Err(Stop::Usage(format!("--bless: {why}")).into());
    }
    let fields = if budget.machine.strategy == Fields::Trapped.option() { Fields::Trapped } else { Fields::ZeroCopy };
    let counted = session.backend.unit() == Unit::Instructions;
    if !counted {
        ui.note(&format!("limits are on counted instructions and exits, and {} times: none is looked at", place.l0));
    }
    let mut measured = measure(ui, &session, fields, args.growth || args.bless)?;
    let compiler = &place.compiler;
    let (mut limits, mut differences, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for Measured { guest, events, .. } in &measured {
        ui.line(&table::render(events));
        if counted {
            limits.extend(budget.apply(guest, events));
        }
        if args.bless {
            differences.extend(budget.audit(guest, compiler, events).differences);
            budget.book(guest, compiler, events);
        } else if let Some(earlier) = &earlier {
            differences.extend(earlier.differences(guest, events));
        } else if another.is_none() {
            let audit = budget.audit(guest, compiler, events);
            ui.line(&audit.told(guest, compiler));
            differences.extend(audit.differences);
        }
    }
    if let Some(why) = &another {
        ui.note(&format!("the ledger is not compared: {why}"));
    }
    if !differences.is_empty() {
        ui.line(&ledger::render(&differences));
    }
    for rule in &limits {
        let (mark, style) = if rule.kept { ("kept  ", Style::new().green()) } else { ("BROKEN", Style::new().red()) };
        ui.line(&format!("{} {}", ui.paint(mark, style), rule.text()));
    }
    let broken = limits.iter().filter(|rule| !rule.kept).count();
    if broken > 0 {
        failed.push(format!("{broken} limits are broken"));
    }
    if args.bless {
        Output::prepare(&path)?.write(&budget.text()?)?;
        ui.line(&format!("{} figures changed in {} for {compiler}", differences.len(), path.display()));
    } else if earlier.is_some() {
        ui.line(&format!("{} figures changed", differences.len()));
    } else if !differences.is_empty() {
        let text = "if they are meant, ./nvmx bench --bless books them";
        failed.push(format!("{} figures differ from the ledger: {text}", differences.len()));
    }
    // After the ledger was looked at, which has figures of nvmx alone.
    if args.l1 == L1::Kvm {
        beside_kvm(ui, &session, &mut measured)?;
    }
    if let Some(output) = &drawn {
        // The first is cascade, which is no sweep.
        let sweeps: Vec<_> = measured.iter().skip(1).map(|m| (m.title, m.events.as_slice())).collect();
        output.write(&sweep::page(&place, &sweeps))?;
    }
    if let Some(output) = &json {
        let limits = limits.iter().map(|rule| Limit { text: rule.text(), kept: rule.kept }).collect();
        let of = |name: &str| {
            let found = measured.iter().find(|m| m.guest == name);
            found.map(|m| m.events.clone()).unwrap_or_default()
        };
        let cpu_model = session.machine.model.clone();
        let [events, growth, cpus, depth] = ["cascade", "growth", "cpus", "depth"].map(of);
        let bench = Bench { cpu_model, events, growth, cpus, depth, limits, differences };
        Document::new(Provenance::of(&session.paths.root, Some(place)), Report::Bench(bench)).write(output)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("; ")).into()) }
}

/// Boots the guests.
fn measure(ui: &Ui, session: &Session, fields: Fields, growth: bool) -> Result<Vec<Measured>> {
    let (bare, nested) = (session.bare("cascade", "")?, session.nested("cascade", "", fields)?);
    let (bare, nested) = both(session, [&bare, &nested], "cascade alone, and under nvmx")?;
    let mut failed: Vec<String> = [&bare, &nested].into_iter().filter_map(|boot| tell_failure(ui, boot)).collect();
    let events = report::events(Some(&bare.transcript), &nested.transcript);
    let mut measured = vec![Measured { guest: "cascade", title: "each event", events }];
    let sweeps = if growth { sweep::sweeps(session, fields)? } else { Vec::new() };
    let unseen = |sweep: &Sweep| sweep.of_record && !session.backend.records();
    for sweep in sweeps.iter().filter(|sweep| unseen(sweep)) {
        let name = session.backend.name();
        ui.note(&format!("{}: left out, because {name} does not record exits", sweep.title));
    }
    for sweep in sweeps.into_iter().filter(|sweep| !unseen(sweep)) {
        let _step = ui.step(sweep.title);
        let boot = |spec| boot::boot(&session.paths, session.backend.as_ref(), spec, &View::new(ui, Show::Warnings));
        let outcomes = sweep.boots.iter().map(boot).collect::<Result<Vec<_>>>()?;
        failed.extend(outcomes.iter().filter_map(|outcome| tell_failure(ui, outcome)));
        match (sweep.figures)(&outcomes.iter().collect::<Vec<_>>()) {
            Ok(events) => measured.push(Measured { guest: sweep.guest, title: sweep.title, events }),
            Err(why) => failed.push(why),
        }
    }
    if failed.is_empty() { Ok(measured) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

/// Guest `growth` with KVM in nvmx's place, as a column of its own.
fn beside_kvm(ui: &Ui, session: &Session, measured: &mut [Measured]) -> Result<()> {
    let kvm = session.kvm_in_place(Copies::ByBytes)?;
    let step = ui.step(&format!("growth under {}", kvm.name()));
    let spec = Spec { name: "growth-kvm".into(), timeout: LONG, ..session.bare("growth", "")? };
    let peer = boot::boot(&session.paths, kvm.as_ref(), &spec, &View::new(ui, Show::Warnings))?;
    drop(step);
    if let Some(why) = tell_failure(ui, &peer) {
        return Err(Stop::Guest(why).into());
    }
    for Measured { events, .. } in measured.iter_mut().filter(|m| m.guest == "growth") {
        report::add_peer(events, &peer.transcript);
        ui.line(&table::render(events));
    }
    Ok(())
}

/// A file of figures that was written before.
struct Earlier {
    name: String,
    place: Place,
    document: Value,
}

impl Earlier {
    fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let usage = |why: String| Stop::Usage(format!("--compare {name}: {why}"));
        let text = std::fs::read_to_string(path).map_err(|error| usage(error.to_string()))?;
        let document: Value = serde_json::from_str(&text).map_err(|error| usage(format!("it is no JSON: {error}")))?;
        let from = document["provenance"].clone();
        let from: Provenance = serde_json::from_value(from)
            .map_err(|_| usage("it does not say where it is from: nvmx wrote no such file, or an older one".into()))?;
        let place = from.machine.ok_or_else(|| usage("it does not say on which machine it was counted".into()))?;
        if document["events"].as_array().is_none_or(Vec::is_empty) {
            return Err(usage("it has no events: --json of `run` and of `bench` write some".into()).into());
        }
        Ok(Earlier { name, place, document })
    }

    fn must_be_of(&self, place: &Place) -> Result<(), Stop> {
        match self.place.differences(place).as_slice() {
            [] => Ok(()),
            list => Err(Stop::Usage(format!(
                "--compare {}: its figures cannot be compared with those of this machine: {}",
                self.name,
                list.join("; ")
            ))),
        }
    }

    fn differences(&self, guest: &str, events: &[Event]) -> Vec<Difference> {
        let key = if guest == "cascade" { "events" } else { guest };
        let list = self.document[key].as_array().map(Vec::as_slice).unwrap_or_default();
        let before: Vec<Booked> = list.iter().filter_map(booked).collect();
        let now: Vec<Booked> = events.iter().map(Booked::from).collect();
        if before.is_empty() { Vec::new() } else { ledger::differences(guest, &before, &now, Which::All) }
    }
}

/// An event of a file.
fn booked(event: &Value) -> Option<Booked> {
    let figures = Event::FIGURES.iter().filter_map(|name| Some((name.to_string(), event[*name].as_f64()?)));
    Some(Booked { event: event["event"].as_str()?.into(), figures: figures.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::provenance::tests::place;

    fn file(text: &str) -> Result<Earlier> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("old.json");
        std::fs::write(&path, text)?;
        Earlier::read(&path)
    }

    fn document(place: &Place) -> String {
        let from = Provenance {
            command: "x".into(),
            revision: None,
            changed: None,
            date: "y".into(),
            machine: Some(place.clone()),
        };
        let events = serde_json::json!([{ "event": "cpuid", "nested": 1000.0, "hw_exits": 2.0 }]);
        serde_json::json!({ "provenance": from, "events": events }).to_string()
    }

    #[test]
    fn what_changed_since_an_earlier_run_is_told() {
        let old = file(&document(&place())).unwrap();
        assert!(old.must_be_of(&place()).is_ok());
        let now = [Event { event: "cpuid".into(), nested: Some(990.0), hw_exits: Some(2.0), ..Event::default() }];
        let found = old.differences("cascade", &now);
        assert_eq!((found.len(), found[0].figure.as_str(), found[0].now), (1, "nested", Some(990.0)));
        // Nothing to compare with is no change.
        assert!(old.differences("growth", &now).is_empty());
    }

    #[test]
    fn what_cannot_be_compared_is_refused_by_name() {
        let other = Place { compiler: "rustc 1.96.0, LLVM 21.1.0".into(), ..place() };
        let error = file(&document(&other)).unwrap().must_be_of(&place()).unwrap_err();
        assert_eq!(error.code(), 2);
        assert!(error.to_string().contains("compiler: rustc 1.96.0"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_run_is_refused() {
        for text in ["", "{}", "[1]", "{\"provenance\":{}}"] {
            let error = file(text).err().unwrap();
            assert_eq!(error.downcast_ref::<Stop>().map(Stop::code), Some(2), "{text}: {error:#}");
        }
    }
}
