//! `benches/budget.json`: limits on what an event may cost, which hold with every compiler, and the ledger of what it costs,
//! exact, with each compiler that was booked.

use super::Event;
use super::ledger::{self, Booked, Difference, Page, Which};
use crate::backend::Machine;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;

/// The file's schema.
const SCHEMA: &str = "nvmx-budget/2";

/// The file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// `nvmx-budget/2`
    schema: String,
    /// The machine that it is for, under Bochs as we build it
    pub machine: Where,
    /// The limits
    pub limits: Vec<Rule>,
    /// The figures
    pub ledger: Vec<Page>,
}

/// A machine and how nvmx runs on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Where {
    /// The CPU model
    pub cpu_model: String,
    /// MiB
    pub memory: u32,
    /// Processors
    pub cpus: u32,
    /// The field-access strategy
    pub strategy: String,
}

/// One limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The guest
    pub guest: String,
    /// The event's name
    pub event: String,
    /// A figure, or several joined by `+`
    pub figure: String,
    /// The figure must be this
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exactly: Option<f64>,
    /// The figure must not be more
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
}

/// A rule applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// "cpuid: l1_vmread"
    pub what: String,
    /// "at most 25"
    pub limit: String,
    /// What was counted
    pub value: Option<f64>,
    /// Whether the rule is kept
    pub kept: bool,
}

/// What the ledger says about a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Audit {
    /// What differs
    pub differences: Vec<Difference>,
    /// Which figures were compared, if any were booked
    pub compared: Option<Which>,
}

impl Budget {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read or a rule makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let budget: Budget = serde_json::from_str(text)?;
        ensure!(budget.schema == SCHEMA, "unknown schema {}", budget.schema);
        for rule in &budget.limits {
            let name = format!("{}: {}", rule.event, rule.figure);
            ensure!(rule.exactly.is_some() != rule.at_most.is_some(), "{name}: needs `exactly` or `at_most`");
            let unknown = rule.figure.split('+').find(|f| !Event::FIGURES.contains(f));
            ensure!(unknown.is_none(), "{name}: there is no such figure");
        }
        for (page, booked) in budget.ledger.iter().flat_map(|page| page.events.iter().map(move |b| (page, b))) {
            let unknown = booked.figures.keys().find(|name| !Event::FIGURES.contains(&name.as_str()));
            ensure!(unknown.is_none(), "{}: {}: there is no figure {unknown:?}", page.guest, booked.event);
        }
        Ok(budget)
    }

    /// Why figures of this machine are not those of the file; `None` if they are.
    pub fn is_for_another(&self, machine: &Machine, l0: &str) -> Option<String> {
        let own = &self.machine;
        let said = |m: &str, memory, cpus| format!("CPU model {m}, {memory} MiB, CPUs: {cpus}");
        let there = (machine.model.as_str(), machine.memory, machine.cpus);
        let same = l0.starts_with("Bochs") && there == (own.cpu_model.as_str(), own.memory, own.cpus);
        let (is, wants) = (said(there.0, there.1, there.2), said(&own.cpu_model, own.memory, own.cpus));
        (!same).then(|| format!("the figures are for Bochs, {wants}; this is {l0}, {is}"))
    }

    /// Applies every rule for this guest. A figure that was not measured breaks its rule.
    pub fn apply(&self, guest: &str, events: &[Event]) -> Vec<Applied> {
        self.limits.iter().filter(|rule| rule.guest == guest).map(|rule| rule.apply(events)).collect()
    }

    /// Compares with the ledger: all figures if they are booked for this compiler, else those that no compiler changes.
    pub fn audit(&self, guest: &str, compiler: &str, events: &[Event]) -> Audit {
        let pages = || self.ledger.iter().filter(|page| page.guest == guest);
        let own = pages().find(|page| page.compiler == compiler).map(|page| (page, Which::All));
        let found = own.or_else(|| Some((pages().next()?, Which::WithoutInstructions)));
        let now: Vec<Booked> = events.iter().map(Booked::from).collect();
        let differences = found.map(|(page, which)| ledger::differences(guest, &page.events, &now, which));
        Audit { differences: differences.unwrap_or_default(), compared: found.map(|(_, which)| which) }
    }

    /// Books the figures of a guest with a compiler, in the place of those before.
    pub fn book(&mut self, guest: &str, compiler: &str, events: &[Event]) {
        let events = events.iter().map(Booked::from).collect();
        self.ledger.retain(|page| (page.guest.as_str(), page.compiler.as_str()) != (guest, compiler));
        self.ledger.push(Page { guest: guest.into(), compiler: compiler.into(), events });
        self.ledger.sort_by(|a, b| (&a.guest, &a.compiler).cmp(&(&b.guest, &b.compiler)));
    }

    /// The file's text: a limit and an event a line, so that changes of it read well.
    ///
    /// # Errors
    /// If a figure is no number.
    pub fn text(&self) -> Result<String> {
        let lines = |list: Vec<String>, indent: &str| format!("\n{indent}{}\n", list.join(&format!(",\n{indent}")));
        let limits = self.limits.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        let mut pages = Vec::new();
        for page in &self.ledger {
            let events = page.events.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
            let (guest, compiler) = (serde_json::to_string(&page.guest)?, serde_json::to_string(&page.compiler)?);
            let events = lines(events, "      ");
            pages.push(format!("{{ \"guest\": {guest}, \"compiler\": {compiler}, \"events\": [{events}    ] }}"));
        }
        let mut text = String::new();
        let (schema, machine) = (serde_json::to_string(&self.schema)?, serde_json::to_string(&self.machine)?);
        writeln!(text, "{{\n  \"schema\": {schema},\n  \"machine\": {machine},")?;
        writeln!(text, "  \"limits\": [{}  ],", lines(limits, "    "))?;
        writeln!(text, "  \"ledger\": [{}  ]\n}}", lines(pages, "    "))?;
        Ok(text)
    }
}

impl Rule {
    fn apply(&self, events: &[Event]) -> Applied {
        let event = events.iter().find(|e| e.event == self.event);
        let value = event.and_then(|e| self.figure.split('+').map(|f| e.figure(f)).sum::<Option<f64>>());
        let (limit, kept) = match (self.exactly, self.at_most) {
            (Some(exact), _) => (format!("exactly {exact}"), value.is_some_and(|v| (v - exact).abs() < 0.005)),
            (None, most) => {
                let most = most.unwrap_or(f64::NEG_INFINITY);
                (format!("at most {most}"), value.is_some_and(|v| v <= most))
            }
        };
        Applied { what: format!("{}: {}", self.event, self.figure), limit, value, kept }
    }
}

impl Applied {
    /// For people.
    pub fn text(&self) -> String {
        let value = self.value.map_or("not measured".to_string(), |v| v.to_string());
        format!("{}: {value}, {} allowed", self.what, self.limit)
    }
}

impl Audit {
    /// What was compared, for people.
    pub fn told(&self, guest: &str, compiler: &str) -> String {
        let found = self.differences.len();
        match self.compared {
            Some(Which::All) => format!("{guest}: {found} figures differ from the ledger of {compiler}"),
            Some(Which::WithoutInstructions) => format!(
                "{guest}: {found} figures differ from the ledger; instructions were not compared, since none are booked for {compiler}"
            ),
            None => format!("{guest}: the ledger has no figures"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    const HEAD: &str = "{\"schema\":\"nvmx-budget/2\",\
        \"machine\":{\"cpu_model\":\"x\",\"memory\":256,\"cpus\":1,\"strategy\":\"y\"},\"ledger\":[],\"limits\":[";

    fn budget(limit: &str) -> Result<Budget> {
        Budget::parse(&format!("{HEAD}{limit}]}}"))
    }

    fn kept(figure: &str, limit: &str) -> bool {
        let rule = format!("{{\"guest\":\"cascade\",\"event\":\"cpuid\",\"figure\":\"{figure}\",{limit}}}");
        budget(&rule).unwrap().apply("cascade", &sample())[0].kept
    }

    #[test]
    fn a_figure_over_its_limit_breaks_the_rule() {
        assert!(kept("l1_vmread", "\"at_most\":19"));
        assert!(!kept("l1_vmread", "\"at_most\":18.9"));
        assert!(kept("hw_exits", "\"exactly\":2"));
        assert!(!kept("hw_exits", "\"exactly\":1"));
        assert!(kept("hw_exits+l1_vmread", "\"exactly\":21"));
        assert!(!kept("l1_vmwrite", "\"at_most\":100"), "what was not measured must not pass");
    }

    #[test]
    fn the_checked_in_file_is_understood_and_as_it_is_written() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/budget.json"));
        let budget = Budget::read(path).unwrap();
        for guest in ["cascade", "growth", "cpus", "depth"] {
            assert!(budget.limits.iter().any(|rule| rule.guest == guest), "{guest}");
            assert!(budget.ledger.iter().any(|page| page.guest == guest), "{guest}");
        }
        assert!(budget.text().unwrap() == std::fs::read_to_string(path).unwrap(), "./nvmx bench --bless writes it");
    }

    #[test]
    fn a_rule_without_limit_or_with_an_unknown_figure_is_refused() {
        let rule = |figure: &str, limit: &str| {
            budget(&format!("{{\"guest\":\"g\",\"event\":\"e\",\"figure\":\"{figure}\"{limit}}}"))
        };
        assert!(rule("nested", "").is_err());
        assert!(rule("speed", ",\"exactly\":1").is_err());
        assert!(rule("nested", ",\"exactly\":1").is_ok());
    }

    #[test]
    fn figures_are_compared_with_those_of_the_same_compiler() {
        let mut budget = budget("").unwrap();
        let mut events = sample();
        assert_eq!(budget.audit("cascade", "one", &events).compared, None);
        budget.book("cascade", "one", &events);
        events[0].nested = Some(1300.0);
        let one = budget.audit("cascade", "one", &events);
        assert_eq!((one.compared, one.differences.len()), (Some(Which::All), 1));
        let two = budget.audit("cascade", "two", &events);
        assert_eq!((two.compared, two.differences.len()), (Some(Which::WithoutInstructions), 0));
        assert!(two.told("cascade", "two").contains("none are booked for two"));
        // What is booked anew takes the place of what was.
        budget.book("cascade", "one", &events);
        assert_eq!((budget.ledger.len(), budget.audit("cascade", "one", &events).differences.len()), (1, 0));
        assert_eq!(Budget::parse(&budget.text().unwrap()).unwrap().ledger, budget.ledger);
    }

    #[test]
    fn another_machine_is_told() {
        let budget = budget("").unwrap();
        let machine = |model: &str| Machine { memory: 256, cpus: 1, model: model.into() };
        assert_eq!(budget.is_for_another(&machine("x"), "Bochs 3.0"), None);
        assert!(budget.is_for_another(&machine("z"), "Bochs 3.0").unwrap().contains("CPU model z"));
        assert!(budget.is_for_another(&machine("x"), "KVM").is_some());
    }
}
