//! Limits on what an event may cost: a checked-in file of rules, one figure each.

use super::Event;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::path::Path;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// `nvmx-budget/1`
    schema: String,
    /// The CPU model that the limits are for
    pub cpu_model: String,
    /// The field-access strategy that the limits are for
    pub strategy: String,
    /// The limits
    pub rules: Vec<Rule>,
}

/// One limit.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The event's name
    pub event: String,
    /// A figure, or several joined by `+`
    pub figure: String,
    /// The figure must be this
    pub exactly: Option<f64>,
    /// The figure must not be more
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
        ensure!(budget.schema == "nvmx-budget/1", "unknown schema {}", budget.schema);
        for rule in &budget.rules {
            let name = format!("{}: {}", rule.event, rule.figure);
            ensure!(rule.exactly.is_some() != rule.at_most.is_some(), "{name}: needs `exactly` or `at_most`");
            let unknown = rule.figure.split('+').find(|f| !Event::FIGURES.contains(f));
            ensure!(unknown.is_none(), "{name}: there is no such figure");
        }
        Ok(budget)
    }

    /// Applies every rule. A figure that was not measured breaks its rule.
    pub fn apply(&self, events: &[Event]) -> Vec<Applied> {
        self.rules.iter().map(|rule| rule.apply(events)).collect()
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

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    fn kept(figure: &str, limit: &str) -> bool {
        let text = format!(
            "{{\"schema\":\"nvmx-budget/1\",\"cpu_model\":\"x\",\"strategy\":\"y\",\
             \"rules\":[{{\"event\":\"cpuid\",\"figure\":\"{figure}\",{limit}}}]}}"
        );
        Budget::parse(&text).unwrap().apply(&sample())[0].kept
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
    fn the_checked_in_file_is_understood() {
        let budget = Budget::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/budget.json"))).unwrap();
        assert!(!budget.rules.is_empty());
    }

    #[test]
    fn a_rule_without_limit_or_with_an_unknown_figure_is_refused() {
        let head = "{\"schema\":\"nvmx-budget/1\",\"cpu_model\":\"x\",\"strategy\":\"y\",\"rules\":[";
        assert!(Budget::parse(&format!("{head}{{\"event\":\"e\",\"figure\":\"nested\"}}]}}")).is_err());
        assert!(Budget::parse(&format!("{head}{{\"event\":\"e\",\"figure\":\"speed\",\"exactly\":1}}]}}")).is_err());
    }
}
