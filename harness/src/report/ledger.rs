//! The ledger: every figure of every event, exact, as it was booked with a compiler; and what differs from it.

use super::Event;
use crate::text::number;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Figures that depend on the compiler of the images. All others are of nvmx alone.
const IN_INSTRUCTIONS: [&str; 5] = ["native", "one_level", "nested", "l1_instructions", "under_kvm"];

/// The figures of a guest, as one compiler makes it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// The guest
    pub guest: String,
    /// "rustc 1.85.0, LLVM 19.1.7"
    pub compiler: String,
    /// Each event with its figures
    pub events: Vec<Booked>,
}

/// An event's figures; what is not there was not measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Booked {
    /// The event's name
    pub event: String,
    /// By the names of `docs/run-schema.md`
    #[serde(flatten)]
    pub figures: BTreeMap<String, f64>,
}

impl From<&Event> for Booked {
    fn from(event: &Event) -> Self {
        let figures = Event::FIGURES.iter().filter_map(|name| Some((name.to_string(), event.figure(name)?)));
        Booked { event: event.event.clone(), figures: figures.collect() }
    }
}

/// A figure that is not what it was.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Difference {
    /// The guest
    pub guest: String,
    /// The event
    pub event: String,
    /// The figure's name
    pub figure: String,
    /// What it was
    pub before: Option<f64>,
    /// What it is
    pub now: Option<f64>,
}

/// Which figures are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    /// All
    All,
    /// Those that are the same with every compiler
    WithoutInstructions,
}

impl Which {
    fn has(self, figure: &str) -> bool {
        self == Which::All || !IN_INSTRUCTIONS.contains(&figure)
    }
}

/// Every figure that differs, events of the old list first.
pub fn differences(guest: &str, before: &[Booked], now: &[Booked], which: Which) -> Vec<Difference> {
    let find = |list: &[Booked], event: &str| list.iter().find(|booked| booked.event == event).cloned();
    let new = now.iter().filter(|n| find(before, &n.event).is_none());
    let mut list = Vec::new();
    for event in before.iter().chain(new).map(|booked| &booked.event) {
        let figures = |list: &[Booked]| find(list, event).map(|booked| booked.figures).unwrap_or_default();
        let (old, new) = (figures(before), figures(now));
        for figure in Event::FIGURES.iter().filter(|figure| which.has(figure)) {
            let (before, now) = (old.get(*figure).copied(), new.get(*figure).copied());
            let equal = match (before, now) {
                (Some(a), Some(b)) => (a - b).abs() < 0.0005,
                (a, b) => a == b,
            };
            if !equal {
                let (guest, event, figure) = (guest.into(), event.clone(), figure.to_string());
                list.push(Difference { guest, event, figure, before, now });
            }
        }
    }
    list
}

/// The table of differences.
pub fn render(differences: &[Difference]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["guest", "event", "figure", "before", "now", "change"]);
    for d in differences {
        let change = d.before.zip(d.now).map_or(String::new(), |(before, now)| change(before, now));
        table.add_row([d.guest.clone(), d.event.clone(), d.figure.clone(), number(d.before), number(d.now), change]);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 0));
        if i >= 3 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// "+12 (+1.2 %)"
fn change(before: f64, now: f64) -> String {
    let sign = if now > before { "+" } else { "" };
    let by = number(Some(now - before));
    if before == 0.0 {
        return format!("{sign}{by}");
    }
    format!("{sign}{by} ({:+.1} %)", (now - before) / before * 100.0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    fn booked() -> Vec<Booked> {
        sample().iter().map(Booked::from).collect()
    }

    #[test]
    fn what_was_counted_again_does_not_differ() {
        assert!(differences("cascade", &booked(), &booked(), Which::All).is_empty());
    }

    #[test]
    fn a_figure_that_rose_or_fell_or_went_away_differs() {
        let (before, mut now) = (booked(), booked());
        now[0].figures.insert("nested".into(), 1201.0);
        now[0].figures.insert("hw_exits".into(), 1.0);
        now[1].figures.remove("hw_exits");
        let found = differences("cascade", &before, &now, Which::All);
        let names: Vec<_> = found.iter().map(|d| (d.event.as_str(), d.figure.as_str(), d.now)).collect();
        assert_eq!(
            names,
            [("cpuid", "nested", Some(1201.0)), ("cpuid", "hw_exits", Some(1.0)), ("l2_cpuid", "hw_exits", None)]
        );
        let text = render(&found);
        assert!(text.contains("+1 (+0.1 %)") && text.contains("-1 (-50.0 %)"), "{text}");
        // With another compiler only what does not depend on it counts.
        assert_eq!(differences("cascade", &before, &now, Which::WithoutInstructions).len(), 2);
    }

    #[test]
    fn events_that_came_and_went_differ() {
        let before = booked();
        let gone = differences("cascade", &before, &before[..1], Which::All);
        assert!(!gone.is_empty() && gone.iter().all(|d| d.event == "l2_cpuid" && d.now.is_none()));
        let came = differences("cascade", &before[..1], &before, Which::All);
        assert!(!came.is_empty() && came.iter().all(|d| d.event == "l2_cpuid" && d.before.is_none()));
    }

    #[test]
    fn every_figure_in_instructions_is_a_figure() {
        assert!(IN_INSTRUCTIONS.iter().all(|name| Event::FIGURES.contains(name)));
    }
}
