//! `run --report FILE`: one page for a browser that needs nothing else, or the same figures as Markdown or CSV.

mod charts;

use super::Event;
use super::json::Run;
use crate::backend::Unit;
use crate::text::{escape, grouped, number};
use crate::trace::file::Boot;
use crate::trace::stat::{Row, rows};
use crate::trace::tree::Builder;
use crate::trace::{stat, text};
use crate::transcript::stack::StackLevel;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use std::fmt::Write;
use std::path::Path;

/// How a report is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// For a browser
    Html,
    /// For people who read text
    Markdown,
    /// For spreadsheets: a line an event
    Csv,
}

impl Format {
    /// By the end of the file's name.
    ///
    /// # Errors
    /// [`Stop::Usage`] with the ends that are known.
    pub fn of(path: &Path) -> Result<Self, Stop> {
        let end = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match &*end {
            "html" | "htm" => Ok(Format::Html),
            "md" => Ok(Format::Markdown),
            "csv" => Ok(Format::Csv),
            _ => Err(Stop::Usage(format!("--report {}: the name must end in .html, .md or .csv", path.display()))),
        }
    }

    /// Looks at the place of a report that is a page for a browser and nothing else.
    ///
    /// # Errors
    /// [`Stop::Usage`] if the name is another's, or it cannot be written.
    pub fn prepare(path: &Path) -> anyhow::Result<Output> {
        let output = Output::prepare(path)?;
        if output.is_stdout() || matches!(Format::of(path), Ok(Format::Html)) {
            return Ok(output);
        }
        let text = format!("--report {}: it is a page for a browser, its name must end in .html", path.display());
        Err(Stop::Usage(text).into())
    }
}

/// What a report tells.
pub struct Page<'a> {
    /// What ran as L2
    pub l2: &'a str,
    /// Figures
    pub run: &'a Run,
    /// What ticks are
    pub unit: Unit,
    /// The exits under nvmx, if they were recorded
    pub trace: Option<&'a Boot>,
    /// Where the figures come from: names and values
    pub provenance: &'a [(String, String)],
}

/// The columns of the table and of the CSV.
type Column = (&'static str, &'static str, fn(&Event) -> Option<f64>);
const COLUMNS: [Column; 11] = [
    ("native", "native", |e| e.native),
    ("one level", "one_level", |e| e.one_level),
    ("under nvmx", "nested", |e| e.nested),
    ("hardware exits", "hw_exits", |e| e.hw_exits),
    ("inside nvmx", "l1_instructions", |e| e.l1_instructions),
    ("VMREAD", "l1_vmread", |e| e.l1_vmread),
    ("VMWRITE", "l1_vmwrite", |e| e.l1_vmwrite),
    ("VMPTRLD, VMCLEAR", "l1_vmptrld_vmclear", |e| plus(e.l1_vmptrld, e.l1_vmclear)),
    ("INVEPT, INVVPID", "l1_invept_invvpid", |e| plus(e.l1_invept, e.l1_invvpid)),
    ("trapped VMREAD", "trapped_vmread", |e| e.trapped_vmread),
    ("trapped VMWRITE", "trapped_vmwrite", |e| e.trapped_vmwrite),
];

fn plus(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a? + b?)
}

impl Page<'_> {
    /// The whole text.
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Html => self.html(),
            Format::Markdown => self.markdown(),
            Format::Csv => self.csv(),
        }
    }

    fn heading(&self) -> String {
        format!("{} as L2 of nvmx", self.l2)
    }

    /// The levels, with the innermost guest also where it does not introduce itself.
    fn stack(&self, rows: &[Row]) -> Vec<StackLevel> {
        let mut levels = self.run.stack.clone();
        let top = rows.iter().map(|row| row.level).max().map(usize::from);
        if let (Some(top), Some(below)) = (top.filter(|top| *top == levels.len()), levels.last()) {
            let name = format!("guest of {}", below.name);
            let (version, cpu, features) = (String::new(), String::new(), Vec::new());
            levels.push(StackLevel { level: format!("L{top}"), name, version, cpu, features });
        }
        levels
    }

    fn gist(&self) -> Vec<String> {
        super::table::footer(&self.run.events, self.unit)
    }

    fn html(&self) -> String {
        let unit = self.unit.name();
        let built = self.trace.map(Boot::build);
        let rows = built.as_ref().map(rows).unwrap_or_default();
        let mut sections: Vec<(&str, &str, String)> = vec![("stack", "Stack", charts::stack(&self.stack(&rows)))];
        if !self.run.events.is_empty() {
            sections.push(("table", "Costs per event", self.table()));
            let key = "<div class=\"key\"><span><i class=\"b3\"></i>L3 itself</span><span><i class=\"b2\"></i>L2, and L3 around \
                       the exit</span><span><i class=\"b1\"></i>nvmx</span></div>";
            let text = format!(
                "<p class=\"dim\">{} of one event of L3 under nvmx, by who executes them.</p>{key}",
                capital(unit)
            );
            sections.push(("stages", "One event by stage", text + &charts::stages(&self.run.events, unit)));
        }
        if !rows.is_empty() {
            let text = "<p class=\"dim\">Hardware exits of the boot under nvmx. Ten times as many are one step.</p>";
            sections.push(("reasons", "Exits by reason and level", text.to_string() + &charts::reasons(&rows)));
        }
        if let Some(text) = self.depth() {
            sections.push(("depth", "The cascade by depth", text));
        }
        if let (Some(built), Some(boot)) = (&built, self.trace) {
            sections.push(("spread", "Cost per exit", self.spread(built, &rows)));
            sections.push(("timeline", "In time", self.timelines(boot, built)));
        }
        sections.push(("provenance", "Where this is from", self.provenance()));
        let links: String = sections.iter().map(|(id, title, _)| format!("<a href=\"#{id}\">{title}</a>")).collect();
        let mut body = String::new();
        for (id, title, content) in &sections {
            let long = if ["table", "timeline"].contains(id) { " class=\"long\"" } else { "" };
            let _ =
                writeln!(body, "<section id=\"{id}\" tabindex=\"-1\"{long}>\n<h2>{title}</h2>\n{content}</section>");
        }
        let gist: String = self.gist().iter().map(|line| format!("<p>{}</p>", escape(line))).collect();
        let (style, script) = (include_str!("style.css"), include_str!("script.js"));
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,\
             initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\"><title>{0}</title>\n<style>\n{style}</style></head>\n\
             <body>\n<nav aria-label=\"Sections\"><b>nvmx</b>{links}<button id=\"theme\" type=\"button\">light / dark</button></nav>\n\
             <main>\n<h1>{0}</h1>\n{gist}\n{body}<footer class=\"controls\"><kbd>j</kbd> <kbd>k</kbd> next and previous section, \
             <kbd>1</kbd> to <kbd>9</kbd> a section, <kbd>/</kbd> search the table, <kbd>t</kbd> light or dark, <kbd>p</kbd> print\
             </footer>\n</main>\n<script>\n{script}</script>\n</body></html>\n",
            escape(&self.heading())
        )
    }

    fn table(&self) -> String {
        let head = |name: &str, class: &str| format!("<th{class}><button type=\"button\">{name}</button></th>");
        let mut out = String::from(
            "<p class=\"controls\"><input class=\"filter\" type=\"search\" placeholder=\"search events\" aria-label=\"search events\"></p>\
             <div class=\"scroll\"><table><thead><tr>",
        );
        out += &head("event", "");
        out += &head("handled by", " class=\"w\"");
        let columns = self.columns();
        columns.iter().for_each(|(name, _, _)| out += &head(name, ""));
        out += "</tr></thead><tbody>\n";
        for event in &self.run.events {
            let _ =
                write!(out, "<tr><td>{}</td><td class=\"w\">{}</td>", escape(&event.event), escape(&event.handled_by));
            for (_, _, figure) in &columns {
                let value = figure(event);
                let raw = value.map_or("-".into(), |v| v.to_string());
                let _ = write!(out, "<td data-v=\"{raw}\">{}</td>", number(value));
            }
            out += "</tr>\n";
        }
        let _ = write!(
            out,
            "</tbody></table></div><p class=\"dim\">{}</p>",
            escape(&super::table::title(self.unit).replace('`', ""))
        );
        out
    }

    fn columns(&self) -> Vec<Column> {
        let extra: [Column; 3] = [
            ("exits to KVM", "l0_exits", |e| e.l0_exits),
            ("KVM instead", "under_kvm", |e| e.under_kvm),
            ("its exits", "kvm_exits", |e| e.kvm_exits),
        ];
        let used = |column: &Column| self.run.events.iter().any(|e| (column.2)(e).is_some());
        COLUMNS.into_iter().chain(extra.into_iter().filter(used)).collect()
    }

    /// Each event without a hypervisor, with one, with nvmx, two nvmx, ...
    fn depth(&self) -> Option<String> {
        let mut names = vec!["without a hypervisor".to_string(), "one level".into(), "under nvmx".into()];
        let series: Vec<(String, Vec<Option<f64>>)> = match &self.run.growth {
            Some(growth) => {
                names.extend((2..=growth.depths.len()).map(|n| format!("under {n} nvmx")));
                let values =
                    |e: &super::growth::Grown| [e.native, e.one_level].into_iter().chain(e.nested.clone()).collect();
                growth.events.iter().map(|e| (e.event.clone(), values(e))).collect()
            }
            None => {
                let values = |e: &Event| vec![e.native, e.one_level, e.nested];
                self.run.events.iter().map(|e| (e.event.clone(), values(e))).collect()
            }
        };
        let more = |(_, values): &&(String, Vec<Option<f64>>)| values.iter().flatten().count() >= 3;
        let rises = |(_, values): &&(String, Vec<Option<f64>>)| values.iter().flatten().any(|v| *v > 50.0);
        let series: Vec<_> = series.iter().filter(more).filter(rises).take(12).cloned().collect();
        if series.is_empty() {
            return None;
        }
        let colours = [3, 2, 1, 4, 0];
        let key: String = (0..names.len())
            .map(|n| format!("<span><i class=\"b{}\"></i>{}</span>", colours[n.min(4)], escape(&names[n])))
            .collect();
        let chart = charts::depth(&series, &names, self.unit.name());
        Some(format!("<div class=\"key\">{key}</div>{chart}"))
    }

    fn spread(&self, built: &Builder, rows: &[Row]) -> String {
        let unit = self.unit.name();
        format!(
            "<p class=\"dim\">How often which cost occurred, in {unit} from the exit until its guest goes on; marks below are the \
             median and the 99th percentile.</p>{}<div class=\"scroll\">{}</div>",
            charts::spread(built, rows),
            stat_table(rows)
        )
    }

    /// The median tree of each reason, one of which is chosen.
    fn timelines(&self, boot: &Boot, built: &Builder) -> String {
        let trees: Vec<u32> = stat::medians(built).into_iter().take(24).collect();
        let mut options = String::new();
        let mut drawn = String::new();
        for (n, root) in trees.iter().enumerate() {
            let Some(exit) = built.exits.get(*root as usize) else { continue };
            let cost = grouped(exit.cost.unwrap_or(0));
            let name = format!("L{} {}, exit #{root}: {cost} {}", exit.level, exit.reason(), self.unit.name());
            let _ = write!(options, "<option>{}</option>", escape(&name));
            let hidden = if n == 0 { "" } else { " hidden" };
            let words = text::tree(boot, built, *root).join("\n");
            let chart = charts::timeline(built, *root);
            let _ = writeln!(
                drawn,
                "<div class=\"tree\"{hidden}><p><b>{}</b></p>{chart}<pre>{}</pre></div>",
                escape(&name),
                escape(&words)
            );
        }
        format!(
            "<p class=\"dim\">The median exit of each reason, from the exit until its guest goes on.</p>\
             <p class=\"controls\"><select class=\"trees\" aria-label=\"exit\">{options}</select></p>{drawn}"
        )
    }

    fn provenance(&self) -> String {
        let row = |(name, value): &(String, String)| {
            format!("<tr><td>{}</td><td class=\"w wrap\">{}</td></tr>", escape(name), escape(value))
        };
        let boot = |b: &super::json::Boot| {
            let how = b.reason.clone().unwrap_or_else(|| "passed".into());
            let count = b.instructions.map_or(String::new(), |n| format!(", {} instructions", grouped(n)));
            (format!("boot {}", b.name), format!("{how}, {:.1} s{count}", b.seconds))
        };
        let rows: String =
            self.provenance.iter().cloned().chain(self.run.boots.iter().map(boot)).map(|r| row(&r)).collect();
        format!("<table><tbody>{rows}</tbody></table>")
    }

    fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.heading());
        self.gist().iter().for_each(|line| out += &format!("{line}\n"));
        let bar = |text: &str| text.replace('|', "\\|");
        if !self.run.events.is_empty() {
            let columns = self.columns();
            let _ = writeln!(out, "\n## {}\n", super::table::title(self.unit).replace('`', ""));
            let heads: String = columns.iter().map(|(name, _, _)| format!(" {name} |")).collect();
            let _ = writeln!(out, "| event | handled by |{heads}\n|---|---|{}", "---:|".repeat(columns.len()));
            for e in &self.run.events {
                let cells: String = columns.iter().map(|(_, _, figure)| format!(" {} |", number(figure(e)))).collect();
                let _ = writeln!(out, "| {} | {} |{cells}", bar(&e.event), bar(&e.handled_by));
            }
        }
        if let Some(boot) = self.trace {
            let _ = writeln!(out, "\n## {}\n", stat::title(&boot.header.name, &boot.header.unit));
            out += "| level | reason | count | reflected | share | min | average | p50 | p99 | max |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";
            for r in rows(&boot.build()) {
                let [count, reflected, min, p50, p99, max] =
                    [r.count, r.reflected, r.min, r.p50, r.p99, r.max].map(grouped);
                let average = number(Some(r.average));
                let _ = writeln!(
                    out,
                    "| L{} | {} | {count} | {reflected} | {:.1} % | {min} | {average} | {p50} | {p99} | {max} |",
                    r.level, r.reason, r.share
                );
            }
        }
        out += "\n## Where this is from\n\n";
        for level in &self.run.stack {
            let _ = writeln!(out, "- {}: {}", level.level, crate::transcript::stack::banner_line(level, None));
        }
        self.provenance.iter().for_each(|(name, value)| out += &format!("- {name}: {value}\n"));
        out
    }

    fn csv(&self) -> String {
        let columns = self.columns();
        let heads: Vec<&str> = columns.iter().map(|(_, name, _)| *name).collect();
        let mut out = format!("event,handled_by,count,{}\n", heads.join(","));
        for e in &self.run.events {
            let cells: Vec<String> =
                columns.iter().map(|(_, _, figure)| figure(e).map_or(String::new(), |v| v.to_string())).collect();
            let _ = writeln!(out, "{},{},{},{}", e.event, e.handled_by, e.count, cells.join(","));
        }
        out
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().collect::<String>() + letters.as_str())
}

fn stat_table(rows: &[Row]) -> String {
    let heads = ["reason", "level", "count", "reflected", "share", "min", "average", "p50", "p99", "max"];
    let mut out = String::from("<table><thead><tr>");
    heads.iter().for_each(|head| out += &format!("<th><button type=\"button\">{head}</button></th>"));
    out += "</tr></thead><tbody>\n";
    for r in rows {
        let figures = [r.count, r.reflected].map(|v| (v as f64, grouped(v)));
        let rest = [r.min, r.p50, r.p99, r.max].map(|v| (v as f64, grouped(v)));
        let cells = [
            figures[0].clone(),
            figures[1].clone(),
            (r.share, format!("{:.1} %", r.share)),
            rest[0].clone(),
            (r.average, number(Some(r.average))),
            rest[1].clone(),
            rest[2].clone(),
            rest[3].clone(),
        ];
        let cells: String = cells.iter().map(|(raw, shown)| format!("<td data-v=\"{raw}\">{shown}</td>")).collect();
        let _ = writeln!(out, "<tr><td>{}</td><td>L{}</td>{cells}</tr>", escape(&r.reason), r.level);
    }
    out + "</tbody></table>"
}

#[cfg(test)]
mod tests;
