//! How costs grow: with what L2 uses, with the processors that it has started, with nvmx in nvmx. A sweep is some boots and
//! the rows that their outcomes give; each row is an event of the ledger.

use crate::backend::{Machine, Recording, Spec};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report::plot::{Plot, STYLE};
use crate::report::provenance::Place;
use crate::report::{self, Event};
use crate::session::Session;
use crate::text::{escape, number};
use crate::trace::tree::{Builder, Exit};
use anyhow::Result;
use nvmx::vmx::exit::{BasicReason, ExitReason};

/// Processors of the machines.
const CPUS: [u32; 4] = [1, 2, 4, 8];
/// The most nvmx in a stack.
const DEEPEST: u32 = 4;
/// Exits of L3 at the end of a boot that are looked at: those before fill what nvmx keeps.
const STEADY: usize = 1000;

/// Boots that differ in one thing.
pub struct Sweep {
    /// The guest's name in the ledger
    pub guest: &'static str,
    /// For people
    pub title: &'static str,
    /// What is booted
    pub boots: Vec<Spec>,
    /// The rows are of what L0 records of each exit
    pub of_record: bool,
    /// The rows, by the outcomes of the boots
    pub figures: fn(&[&Outcome]) -> Result<Vec<Event>, String>,
}

/// All sweeps, with this access of L2 to fields.
///
/// # Errors
/// If an image is missing.
pub fn sweeps(session: &Session, fields: Fields) -> Result<Vec<Sweep>> {
    let uses = session.nested("growth", "", fields)?;
    let with_cpus = |cpus| -> Result<Spec> {
        let spec = session.nested("growth", "part=cpus", fields)?;
        let machine = Machine { cpus, ..spec.machine };
        let record = Some(Recording::kept(&session.images.nvmx));
        Ok(Spec { name: format!("growth-cpus{cpus}"), machine, record, ..spec })
    };
    let nested = |depth| session.stacked("cascade", &fewer_events("cascade", "", depth), fields, depth);
    Ok(vec![
        Sweep {
            guest: "growth",
            title: "what L2 uses",
            boots: vec![Spec { name: "growth".into(), ..uses }],
            of_record: false,
            figures: |outcomes| Ok(outcomes.iter().flat_map(|o| report::events(None, &o.transcript)).collect()),
        },
        Sweep {
            guest: "cpus",
            title: "a reflected exit, by the processors that L2 has started",
            boots: CPUS.into_iter().map(with_cpus).collect::<Result<_>>()?,
            of_record: true,
            figures: by_cpus,
        },
        Sweep {
            guest: "depth",
            title: "a reflected CPUID, by the nvmx in the stack",
            boots: (1..=DEEPEST).map(nested).collect::<Result<_>>()?,
            of_record: false,
            figures: by_depth,
        },
    ])
}

/// Each nvmx multiplies costs by ten or more: deep stacks measure fewer events, which give the same averages.
pub fn fewer_events(guest: &str, args: &str, depth: u32) -> String {
    let few = match depth {
        _ if guest != "cascade" || args.contains("events=") => return args.to_string(),
        ..=2 => return args.to_string(),
        3 => 100,
        _ => 10,
    };
    format!("{args} events={few}").trim_start().to_string()
}

/// The TSC of an emulated machine with several CPUs is an average of what they execute: the emulator's own record counts.
fn by_cpus(outcomes: &[&Outcome]) -> Result<Vec<Event>, String> {
    let rows = outcomes.iter().zip(CPUS).map(|(outcome, cpus)| {
        let boot = outcome.trace.as_ref().ok_or_else(|| format!("{}: no exits were recorded", outcome.name))?;
        let event = steady(&boot.build()).ok_or_else(|| format!("{}: L3 made too few calls", outcome.name))?;
        Ok(Event { event: format!("cpus_{cpus}"), ..event })
    });
    rows.collect()
}

/// The averages of the last calls of L3 on the first CPU.
fn steady(built: &Builder) -> Option<Event> {
    let call = |exit: &Exit| {
        let vmcall = exit.reason() == ExitReason::exit(BasicReason::VMCALL);
        exit.cpu == 0 && exit.level == 3 && vmcall && exit.cost.is_some()
    };
    let calls: Vec<u32> = built.roots().filter(|root| built.exits.get(*root as usize).is_some_and(call)).collect();
    let last = calls.get(calls.len().checked_sub(STEADY)?..)?;
    let totals = || last.iter().map(|root| built.totals(*root));
    let average = |sum: u64| Some((sum as f64 * 1000.0 / last.len() as f64).round() / 1000.0);
    let cost = last.iter().filter_map(|root| built.exits.get(*root as usize)?.cost).sum();
    Some(Event {
        handled_by: "L2".into(),
        count: last.len() as u64,
        nested: average(cost),
        hw_exits: average(totals().map(|t| u64::from(t.exits)).sum()),
        l1_instructions: average(totals().map(|t| t.root_ticks).sum()),
        l1_vmread: average(totals().map(|t| u64::from(t.root.vmread)).sum()),
        l1_vmwrite: average(totals().map(|t| u64::from(t.root.vmwrite)).sum()),
        ..Event::default()
    })
}

/// What the innermost nvmx counts is not the machine's: the ticks alone are compared.
fn by_depth(outcomes: &[&Outcome]) -> Result<Vec<Event>, String> {
    let row = |(outcome, depth): (&&Outcome, u32)| {
        let events = report::events(None, &outcome.transcript);
        let cpuid = events.into_iter().find(|event| event.event == "cpuid");
        let Event { handled_by, count, nested, .. } = cpuid.ok_or_else(|| format!("{}: no CPUID", outcome.name))?;
        Ok(Event { event: format!("depth_{depth}"), handled_by, count, nested, ..Event::default() })
    };
    outcomes.iter().zip(1..).map(row).collect()
}

/// One drawing for all rows of a kind, which is the first word of their names: `ept_1` to `ept_64`.
pub fn plots(title: &str, events: &[Event]) -> Vec<Plot> {
    let with_kvm = events.iter().any(|event| event.under_kvm.is_some());
    let series: &[&str] = if with_kvm { &["nvmx", "KVM in its place"] } else { &["nvmx"] };
    let mut plots: Vec<(&str, Plot)> = Vec::new();
    for event in events.iter().filter(|event| event.nested.is_some()) {
        let (kind, name) = event.event.split_once('_').unwrap_or((&event.event, ""));
        let at = plots.iter().position(|(known, _)| *known == kind).unwrap_or_else(|| {
            plots.push((kind, Plot::new(&format!("{title}: {kind}"), true, series)));
            plots.len() - 1
        });
        let values = [event.nested, event.under_kvm];
        plots[at].1.group(name, values.into_iter().take(series.len()));
    }
    plots.into_iter().map(|(_, plot)| plot).collect()
}

/// A page for a browser that needs nothing else: for each sweep its drawings, and its rows as a table.
pub fn page(place: &Place, sweeps: &[(&str, &[Event])]) -> String {
    let section = |(title, events): &(&str, &[Event])| {
        let drawn: Vec<String> = plots(title, events).iter().map(Plot::svg).collect();
        let cells = |cells: [String; 5], tag| cells.map(|cell| format!("<{tag}>{cell}</{tag}>")).concat();
        let figures = |e: &Event| [e.nested, e.hw_exits, e.l1_instructions, e.under_kvm].map(number);
        let row = |e: &Event| {
            let [nested, exits, inside, kvm] = figures(e);
            format!("<tr>{}</tr>\n", cells([escape(&e.event), nested, exits, inside, kvm], "td"))
        };
        let head = ["event", "instructions", "hardware exits", "of nvmx", "KVM in its place"].map(String::from);
        let rows: Vec<String> = events.iter().map(row).collect();
        format!(
            "<section><h2>{}</h2>\n{}<div class=\"wide\"><table><tr>{}</tr>\n{}</table></div></section>\n",
            escape(title),
            drawn.concat(),
            cells(head, "th"),
            rows.concat()
        )
    };
    let from = format!("{}, {}, {} MiB, images by {}", place.l0, place.cpu, place.memory, place.compiler);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>nvmx: how costs grow</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\">\n\
         <style>\n{STYLE}</style></head><body>\n<h1>How costs grow</h1>\n<p>Instructions per event. {}</p>\n{}</body></html>\n",
        escape(&from),
        sweeps.iter().map(section).collect::<String>()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::provenance::tests::place;

    #[test]
    fn rows_of_one_kind_are_drawn_together() {
        let row = |name: &str, nested, under_kvm| Event { event: name.into(), nested, under_kvm, ..Event::default() };
        let rows = [
            row("ept_1", Some(100.0), Some(1000.0)),
            row("ept_64", Some(110.0), None),
            row("invept_nothing", Some(2000.0), None),
            row("invept_2m_by_4k", Some(3000.0), None),
            row("lost", None, None),
        ];
        let plots = plots("growth", &rows);
        let titles: Vec<&str> = plots.iter().map(|plot| plot.title.as_str()).collect();
        assert_eq!(titles, ["growth: ept", "growth: invept"]);
        assert_eq!(plots[0].groups[0], ("1".into(), vec![Some(100.0), Some(1000.0)]));
        assert_eq!(plots[0].groups.len(), 2);
        let page = page(&place(), &[("what <L2> uses", &rows[..])]);
        assert_eq!((page.matches("<svg").count(), page.matches("<tr>").count()), (2, 6));
        assert!(page.contains("what &lt;L2&gt; uses") && !page.contains("src="));
    }

    #[test]
    fn deep_stacks_measure_fewer_events_unless_the_user_says_how_many() {
        assert_eq!(fewer_events("cascade", "", 2), "");
        assert_eq!(fewer_events("cascade", "", 3), "events=100");
        assert_eq!(fewer_events("cascade", "x", 5), "x events=10");
        assert_eq!(fewer_events("cascade", "events=50", 5), "events=50");
        assert_eq!(fewer_events("vmxtest", "part=modes", 5), "part=modes");
    }
}
