//! What exits cost, by level and reason: count, share, least, average, median, 99th percentile, most.

use super::tree::Builder;
use super::why::Asked;
use crate::text::{grouped, number};
use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent, presets};
use nvmx::vmx::exit::ExitReason;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;

/// Exits of one level for one reason. Ticks are from the exit until the guest goes on, with all that is in between.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Row {
    /// Level of the guest that was left
    pub level: u8,
    /// The exit reason by name
    pub reason: String,
    /// How many
    pub count: u64,
    /// How many of them another level than the root hypervisor got to see
    pub reflected: u64,
    /// Their ticks together
    pub ticks: u64,
    /// Their share of the ticks of all exits that are no part of another, in percent
    pub share: f64,
    /// The cheapest
    pub min: u64,
    /// The average
    pub average: f64,
    /// The median
    pub p50: u64,
    /// 99 of 100 cost no more
    pub p99: u64,
    /// The dearest
    pub max: u64,
}

/// The rows, the dearest first within each level, the highest level first. Exits whose guest never went on have no cost and
/// are only counted.
pub fn rows(built: &Builder) -> Vec<Row> {
    let mut groups: BTreeMap<(u8, u32), (u64, u64, Vec<u64>)> = BTreeMap::new();
    let mut whole = 0u64;
    for exit in &built.exits {
        let group = groups.entry((exit.level, exit.facts.reason)).or_default();
        group.0 += 1;
        group.1 += u64::from(exit.why.asked != Asked::Level(built.levels().root) && is_reflected(exit.next));
        if let Some(cost) = exit.cost {
            group.2.push(cost);
            whole += if exit.parent.is_none() { cost } else { 0 };
        }
    }
    let mut rows: Vec<Row> = groups.into_iter().map(|(key, group)| row(key, group, whole)).collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.level, row.ticks)));
    rows
}

fn is_reflected(next: super::tree::Next) -> bool {
    matches!(next, super::tree::Next::Reflected { .. })
}

fn row((level, reason): (u8, u32), (count, reflected, mut costs): (u64, u64, Vec<u64>), whole: u64) -> Row {
    costs.sort_unstable();
    let ticks: u64 = costs.iter().sum();
    let at = |percent: usize| costs.get((costs.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0);
    Row {
        level,
        reason: ExitReason(reason).to_string(),
        count,
        reflected,
        ticks,
        share: if whole == 0 { 0.0 } else { (ticks as f64 * 1000.0 / whole as f64).round() / 10.0 },
        min: costs.first().copied().unwrap_or(0),
        average: if costs.is_empty() { 0.0 } else { (ticks as f64 * 10.0 / costs.len() as f64).round() / 10.0 },
        p50: at(50),
        p99: at(99),
        max: costs.last().copied().unwrap_or(0),
    }
}

/// For each level and reason the tree in the middle by cost, the highest level and the most frequent reason first.
pub fn medians(built: &Builder) -> Vec<u32> {
    let mut groups: BTreeMap<(u8, u32), Vec<(u64, u32)>> = BTreeMap::new();
    for root in built.roots() {
        let Some(exit) = built.exits.get(root as usize) else { continue };
        if let Some(cost) = exit.cost {
            groups.entry((exit.level, exit.facts.reason)).or_default().push((cost, root));
        }
    }
    let mut groups: Vec<(u8, Vec<(u64, u32)>)> = groups.into_iter().map(|((level, _), list)| (level, list)).collect();
    groups.sort_by_key(|(level, list)| std::cmp::Reverse((*level, list.len())));
    let middle = |(_, mut list): (u8, Vec<(u64, u32)>)| {
        list.sort_unstable();
        list.get(list.len() / 2).map(|(_, root)| *root)
    };
    groups.into_iter().filter_map(middle).collect()
}

/// The table.
pub fn render(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    for rule in [TableComponent::HeaderLines, TableComponent::MiddleHeaderIntersections] {
        table.set_style(rule, '─');
    }
    table.set_header(["level", "reason", "count", "reflected", "share", "min", "average", "p50", "p99", "max"]);
    for r in rows {
        let share = format!("{:.1} %", r.share);
        let figures = [r.min, r.p50, r.p99, r.max].map(grouped);
        let [min, p50, p99, max] = figures;
        let (count, reflected) = (grouped(r.count), grouped(r.reflected));
        let average = number(Some(r.average));
        table.add_row([
            format!("L{}", r.level),
            r.reason.clone(),
            count,
            reflected,
            share,
            min,
            average,
            p50,
            p99,
            max,
        ]);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((1, 0));
        if i >= 2 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// The line above the table.
pub fn title(boot: &str, unit: &str) -> String {
    format!("Exits of {boot} by level and reason; cost in {unit} from the exit until its guest goes on")
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::boot;
    use super::*;

    #[test]
    fn each_level_and_reason_has_its_figures() {
        let rows = rows(&boot().build());
        let cpuid = rows.iter().find(|r| r.reason == "CPUID").unwrap();
        assert_eq!((cpuid.level, cpuid.count, cpuid.reflected, cpuid.min, cpuid.max), (3, 1, 1, 160, 160));
        // VMLAUNCH 10, CPUID 160, the violation 20: what is part of another is not counted twice.
        assert_eq!(cpuid.share, 84.2);
        assert_eq!(rows[0].reason, "CPUID");
        let text = render(&rows);
        let line = text.lines().find(|l| l.contains("CPUID")).unwrap();
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(cells, ["L3", "CPUID", "1", "1", "84.2", "%", "160", "160", "160", "160", "160"]);
    }

    #[test]
    fn percentiles_are_costs_that_occurred() {
        let row = row((3, 10), (100, 0, (1..=100).collect()), 5050);
        assert_eq!((row.min, row.p50, row.p99, row.max, row.average), (1, 50, 99, 100, 50.5));
        assert_eq!(row.share, 100.0);
        let none = super::row((3, 10), (1, 0, Vec::new()), 0);
        assert_eq!((none.count, none.p99, none.share), (1, 0, 0.0));
    }
}
