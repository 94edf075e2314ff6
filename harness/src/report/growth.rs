//! How the cost of an event grows with the number of nvmx below the guest hypervisor.

use super::Event;
use crate::backend::Unit;
use crate::text::number;
use crate::transcript::stack::StackLevel;
use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent, presets};
use schemars::JsonSchema;
use serde::Serialize;

/// Costs by depth.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Growth {
    /// The boots, one nvmx first
    pub depths: Vec<Depth>,
    /// One for each event
    pub events: Vec<Grown>,
}

/// A boot under so many nvmx.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Depth {
    /// How many nvmx
    pub depth: u32,
    /// From L0 up
    pub stack: Vec<StackLevel>,
    /// How each nvmx serves the VMREAD and VMWRITE of its guest hypervisor, the outermost first
    pub strategies: Vec<String>,
    /// How long the boot took
    pub seconds: f64,
    /// Whether it ran to its end and passed
    pub passed: bool,
    /// Check records that were compared with those of the guest alone on the machine
    pub checks: usize,
    /// ... and differ
    pub checks_differ: usize,
}

/// What one event costs at each depth.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Grown {
    /// Its name
    pub event: String,
    /// Without a hypervisor
    pub native: Option<f64>,
    /// With the guest hypervisor alone
    pub one_level: Option<f64>,
    /// With one nvmx, two, ...
    pub nested: Vec<Option<f64>>,
    /// What each nvmx multiplies the cost by
    pub factor: Vec<Option<f64>>,
}

impl Growth {
    /// Puts the averages of each depth side by side.
    pub fn new(depths: Vec<Depth>, averages: &[Vec<Event>]) -> Self {
        let mut names: Vec<&str> = Vec::new();
        for event in averages.iter().flatten() {
            if !names.contains(&event.event.as_str()) {
                names.push(&event.event);
            }
        }
        Growth { depths, events: names.into_iter().map(|name| grown(name, averages)).collect() }
    }
}

fn grown(name: &str, averages: &[Vec<Event>]) -> Grown {
    let at: Vec<Option<&Event>> = averages.iter().map(|e| e.iter().find(|e| e.event == name)).collect();
    let first = |figure: fn(&Event) -> Option<f64>| at.iter().flatten().find_map(|e| figure(e));
    let (native, one_level) = (first(|e| e.native), first(|e| e.one_level));
    let nested: Vec<Option<f64>> = at.iter().map(|e| e.and_then(|e| e.nested)).collect();
    // An event of L2 itself has no guest hypervisor below it.
    let below = [one_level.or(native)].into_iter().chain(nested.iter().copied());
    let factor = below.zip(&nested).map(|(less, more)| ratio(less?, (*more)?)).collect();
    Grown { event: name.to_string(), native, one_level, nested, factor }
}

/// Two decimals; none where there is nothing to multiply.
fn ratio(less: f64, more: f64) -> Option<f64> {
    (less > 0.0).then(|| (more / less * 100.0).round() / 100.0)
}

/// The table.
pub fn render(growth: &Growth) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    use TableComponent::{BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections};
    for rule in [BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections] {
        table.set_style(rule, '─');
    }
    let mut head: Vec<String> = ["event", "native", "one\nlevel"].map(String::from).into();
    head.extend(growth.depths.iter().map(|d| format!("{} nvmx", d.depth)));
    head.extend(growth.depths.iter().map(|d| format!("times by\nnvmx {}", d.depth)));
    table.set_header(head);
    for e in &growth.events {
        let costs = [e.native, e.one_level].into_iter().chain(e.nested.iter().copied());
        let cells = costs.chain(e.factor.iter().copied()).map(number);
        table.add_row([e.event.clone()].into_iter().chain(cells).collect::<Vec<_>>());
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 0));
        if i >= 1 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// The line above the table.
pub fn title(unit: Unit) -> String {
    format!("How the cost of each event grows with every nvmx in the stack, in {} per event", unit.name())
}

/// What came of each boot.
pub fn footer(growth: &Growth) -> Vec<String> {
    let line = |d: &Depth| {
        let names: Vec<&str> = d.stack.iter().map(|l| l.name.as_str()).collect();
        let how = if d.passed { "passed" } else { "FAILED" };
        format!(
            "{}: {how} in {:.1} s; {} check records compared with those of the guest alone, {} differ; field access {}.",
            names.join(" > "),
            d.seconds,
            d.checks,
            d.checks_differ,
            d.strategies.join(", ")
        )
    };
    growth.depths.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, native: f64, one: Option<f64>, nested: f64) -> Event {
        Event { event: name.into(), native: Some(native), one_level: one, nested: Some(nested), ..Event::default() }
    }

    fn depth(depth: u32) -> Depth {
        Depth { depth, stack: vec![], strategies: vec![], seconds: 1.0, passed: true, checks: 2, checks_differ: 0 }
    }

    fn sample() -> Growth {
        let one = vec![event("cpuid", 2.0, Some(100.0), 1000.0), event("l2_cpuid", 4.0, None, 200.0)];
        let two = vec![event("cpuid", 2.0, Some(100.0), 50_000.0)];
        Growth::new(vec![depth(1), depth(2)], &[one, two])
    }

    #[test]
    fn every_nvmx_has_its_factor() {
        let growth = sample();
        assert_eq!(growth.events[0].nested, [Some(1000.0), Some(50_000.0)]);
        assert_eq!(growth.events[0].factor, [Some(10.0), Some(50.0)]);
        // Measured by one boot only.
        assert_eq!(growth.events[1].nested, [Some(200.0), None]);
        assert_eq!(growth.events[1].factor, [Some(50.0), None]);
        assert_eq!(ratio(0.0, 5.0), None);
    }

    #[test]
    fn costs_and_factors_stand_in_one_row() {
        let text = render(&sample());
        let row = text.lines().find(|l| l.trim_start().starts_with("cpuid")).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells, ["cpuid", "2", "100", "1,000", "50,000", "10", "50"]);
    }
}
