//! The lab on a terminal.

use super::experiment::{Experiment, Table, Verdict};
use super::figures::Figures;
use crate::report::model::{self, Range};
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid, TableComponent, presets};

pub use crate::text::number;

/// Columns under a rule; all but the first `left` to the right.
fn grid(head: &[String], rows: &[Vec<String>], left: usize, width: Option<u16>) -> String {
    let mut grid = Grid::new();
    grid.load_preset(presets::NOTHING);
    match width {
        Some(width) => grid.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => grid.set_content_arrangement(ContentArrangement::Disabled),
    };
    use TableComponent::{BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections};
    for rule in [BottomBorder, BottomBorderIntersections, HeaderLines, MiddleHeaderIntersections] {
        grid.set_style(rule, '─');
    }
    grid.set_header(head.to_vec());
    rows.iter().for_each(|row| {
        grid.add_row(row.clone());
    });
    for (i, column) in grid.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if i >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    grid.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

/// The table of an experiment.
pub fn table(table: &Table) -> String {
    grid(&table.head, &table.rows, 1, None)
}

/// One table of all experiments.
pub fn overview(figures: &Figures, wanted: &[&Experiment]) -> String {
    let [one, nested, twice] = super::experiment::levels(figures).map(|(_, name)| name);
    let head = ["experiment", "claim", one, nested, twice, "verdict"].map(String::from);
    let rows: Vec<Vec<String>> = wanted
        .iter()
        .map(|e| {
            let judgement = (e.judge)(figures);
            let [one, nested, twice] = judgement.levels;
            vec![e.name.into(), e.claim.into(), one, nested, twice, judgement.verdict.word().into()]
        })
        .collect();
    grid(&head, &rows, 6, Some(150))
}

/// An experiment with its explanation.
pub fn explained(figures: &Figures, experiment: &Experiment) -> String {
    let e = experiment;
    let mut text = format!("{}. {}\n\nClaim: {}\nCondition: {}\n", e.number, e.title, e.claim, e.condition);
    text.push_str(&format!("Mechanism: {}\nExperiment: {}\n\n{}", e.mechanism, e.method, measured(figures, e)));
    text.push_str("\nSources:\n");
    e.sources.iter().for_each(|source| text.push_str(&format!("  {source}\n")));
    wrapped(&text)
}

/// What was measured, as docs/lab.md prints it: table, notes, how much of what is asserted is so, verdict.
pub fn measured(figures: &Figures, experiment: &Experiment) -> String {
    let (judgement, made) = ((experiment.judge)(figures), (experiment.table)(figures));
    let mut text = format!("Measured on {}:\n{}\n", figures.machine, table(&made));
    made.notes.iter().for_each(|note| text.push_str(&format!("{note}\n")));
    let measured = judgement.verdict != Verdict::NotMeasured;
    let (kept, all) = (judgement.asserted.iter().filter(|(_, holds)| *holds).count(), judgement.asserted.len());
    if measured {
        text.push_str(&format!("Asserted by counts: {kept} of {all} hold.\n"));
    } else {
        text.push_str("A figure is missing, so that nothing is asserted.\n");
    }
    for (what, _) in judgement.asserted.iter().filter(|(_, holds)| measured && !holds) {
        text.push_str(&format!("  NOT SO: {what}\n"));
    }
    experiment.lacks(figures).iter().for_each(|what| text.push_str(&format!("{what}\n")));
    let why = if measured { judgement.why.as_str() } else { "" };
    text.push_str(format!("Verdict: {}. {why}", judgement.verdict.word()).trim_end());
    text.push('\n');
    wrapped(&text)
}

/// Long lines of prose broken; tables stay as they are.
pub fn wrapped(text: &str) -> String {
    const WIDTH: usize = 118;
    let mut lines = Vec::new();
    for line in text.lines() {
        let prose = line.chars().count() > WIDTH && !line.contains("   ") && !line.contains('─');
        if !prose {
            lines.push(line.to_string());
            continue;
        }
        let indent = if line.starts_with("  ") { "      " } else { "  " };
        let mut now = line.chars().take_while(|c| *c == ' ').collect::<String>();
        for word in line.split_whitespace() {
            if now.trim().is_empty() {
                now.push_str(word);
            } else if now.chars().count() + 1 + word.chars().count() > WIDTH {
                lines.push(std::mem::replace(&mut now, format!("{indent}{word}")));
            } else {
                now.push(' ');
                now.push_str(word);
            }
        }
        lines.push(now);
    }
    lines.join("\n") + "\n"
}

/// A range of cycles: "1,234 (1,000 to 2,000)"; measured ones have no range.
pub fn cycles(range: Option<Range>) -> String {
    match range {
        None => "-".into(),
        Some(r) if r.low == r.high => number(Some(r.mid)),
        Some(r) => format!("{} ({} to {})", whole(r.mid), whole(r.low), whole(r.high)),
    }
}

fn whole(value: f64) -> String {
    number(Some(value.round()))
}

/// What cycles are here.
pub fn cycles_note(figures: &Figures) -> String {
    if figures.counted() && figures.below {
        "Cycles are not modelled: a KVM is below, whose own exits are not counted.".into()
    } else if figures.counted() {
        "Cycles are modelled: middle (low to high), from the counts and published costs; `./nvmx lab --model` lists them.".into()
    } else {
        "Cycles are measured by the TSC of this processor.".into()
    }
}

/// The heading of a column of cycles.
pub fn cycles_word(figures: &Figures) -> &'static str {
    if figures.counted() { "cycles (model)" } else { "cycles (measured)" }
}

/// The constants of the model, as a table.
pub fn constants_table() -> Table {
    let mut table = Table::new(&["what", "low", "middle", "high", "source"]);
    for c in model::CONSTANTS {
        let Range { low, mid, high } = c.cycles;
        table.rows.push(vec![c.what.into(), whole(low), whole(mid), whole(high), c.source.into()]);
    }
    table
}

/// The constants of the model.
pub fn constants() -> String {
    let Table { head, rows, .. } = constants_table();
    format!("The model of cycles: instructions + the sum of these costs\n{}", grid(&head, &rows, 5, Some(150)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_broken_and_tables_are_not() {
        let long = "word ".repeat(40);
        assert!(wrapped(&long).lines().all(|l| l.chars().count() <= 118));
        let row = format!("a   {}", "b".repeat(150));
        assert_eq!(wrapped(&row), row + "\n");
    }

    #[test]
    fn a_modelled_figure_is_a_range_and_a_measured_one_is_not() {
        assert_eq!(cycles(Some(Range::new(784.0, 1000.0, 1500.0))), "1,000 (784 to 1,500)");
        assert_eq!(cycles(Some(Range::exact(25.0))), "25");
    }
}
