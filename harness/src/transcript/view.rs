//! What people see of a boot while it runs.

use super::refusal::Refusal;
use super::{Line, is_log, is_warning, real_level, stack};
use l2_protocol::{Kind, Level};
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Shows a guest's lines as they come.
pub struct View {
    ui: Ui,
    show: Show,
    /// How many nvmx are below the guest
    depth: u32,
    /// How many of them have introduced themselves
    met: Cell<u32>,
    /// What names L2's addresses
    l2: Option<PathBuf>,
}

/// How much of a boot is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Show {
    /// What is for people
    All,
    /// All text of a guest that need not know of records
    Guest,
    /// Only warnings: the other boot of a comparison
    Warnings,
    /// Nothing: tests tell their outcome only
    Nothing,
}

impl View {
    /// A view on the terminal.
    pub fn new(ui: &Ui, show: Show) -> Self {
        View { ui: ui.clone(), show, depth: 1, met: Cell::new(0), l2: None }
    }

    /// A view that shows the real levels of a stack of so many nvmx.
    pub fn of_stack(ui: &Ui, show: Show, depth: u32) -> Self {
        View { depth, ..View::new(ui, show) }
    }

    /// ... in which this image names L2's addresses.
    pub fn naming(self, l2: &Path) -> Self {
        View { l2: Some(l2.to_path_buf()), ..self }
    }

    /// Shows a line, if people should see it.
    pub fn show(&self, line: &Line) {
        if let (Line::Record(record), Show::All | Show::Guest) = (line, self.show) {
            if let Some(refusal) = Refusal::of(record, self.l2.as_deref()) {
                return self.refused(line, &refusal);
            }
        }
        if let Some((who, text)) = shown(line, self.ui.verbose, self.show) {
            let style = match who {
                "L1" => Style::new().magenta(),
                "L2" => Style::new().cyan(),
                "L3" => Style::new().green(),
                _ => Style::new().dimmed(),
            };
            let who = self.real_level(line, who);
            self.ui.line(&format!("{} {text}", self.ui.paint(&format!("{who} |"), style)));
        }
    }

    fn refused(&self, line: &Line, refusal: &Refusal) {
        if self.ui.json_refusals {
            if let Ok(text) = serde_json::to_string(refusal) {
                self.ui.line(&text);
            }
            return;
        }
        let who = self.ui.paint(&format!("{} |", self.real_level(line, "L1")), Style::new().red());
        refusal.lines().iter().for_each(|text| self.ui.line(&format!("{who} {text}")));
    }

    fn real_level(&self, line: &Line, who: &'static str) -> String {
        match line {
            Line::Record(r) => {
                if r.level == Level::L1 && r.kind == Kind::Hello {
                    // After a reset they come once more.
                    self.met.set(self.met.get() % self.depth + 1);
                }
                match (r.level, r.kind) {
                    // Which nvmx it is cannot be told.
                    (Level::L1, kind) if kind != Kind::Hello && self.depth > 1 => "nvmx".into(),
                    _ => real_level(r.level, self.depth, self.met.get().max(1)),
                }
            }
            _ if who == "L1" && self.depth > 1 => "nvmx".into(),
            _ => who.into(),
        }
    }
}

/// The level and the text of a line that is to be shown.
fn shown(line: &Line, verbose: bool, show: Show) -> Option<(&'static str, String)> {
    if show == Show::Nothing {
        return None;
    }
    let shown = match line {
        // It is for programs.
        Line::Record(r) if r.kind == Kind::Trace => return None,
        Line::Record(r) if r.kind == Kind::Hello && !verbose => {
            (r.level.word(), stack::banner_line(&stack::of_hello(r), stack::access(r).as_deref()))
        }
        Line::Record(r) if r.kind == Kind::Say => (r.level.word(), r.get("text").unwrap_or_default().to_string()),
        Line::Record(r) if r.kind == Kind::Epitaph => (r.level.word(), r.to_string()),
        Line::Record(r) if verbose => (r.level.word(), r.to_string()),
        Line::Record(r) if show == Show::Guest && r.kind != Kind::End => (r.level.word(), r.to_string()),
        Line::Record(_) => return None,
        Line::Broken(line, _) if show == Show::Guest => ("L2", line.clone()),
        Line::Broken(line, error) => return Some(("??", format!("{line}   <- {error}"))),
        Line::Text(text) if is_warning(text) => return Some(("L1", text.clone())),
        Line::Text(text) if show == Show::Guest && !is_log(text) && !text.is_empty() => ("L2", text.clone()),
        Line::Text(text) if verbose && !text.is_empty() => (if is_log(text) { "L1" } else { "  " }, text.clone()),
        Line::Text(_) => return None,
    };
    matches!(show, Show::All | Show::Guest).then_some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_greetings_and_warnings_and_with_verbose_everything() {
        let say = Line::parse("@L3 say text=\"hello from L3\"");
        assert_eq!(shown(&say, false, Show::All), Some(("L3", "hello from L3".into())));
        assert_eq!(shown(&say, false, Show::Warnings), None);
        let event = Line::parse("@L2 event name=cpuid count=1");
        assert_eq!(shown(&event, false, Show::All), None);
        assert!(shown(&event, true, Show::All).is_some());
        let info = Line::parse("[nvmx INFO ] x");
        assert_eq!(shown(&info, false, Show::All), None);
        assert_eq!(shown(&info, true, Show::All), Some(("L1", "[nvmx INFO ] x".into())));
        assert!(shown(&Line::parse("[nvmx ERROR] no VMX"), false, Show::Warnings).is_some());
        assert_eq!(shown(&Line::parse("[nvmx ERROR] no VMX"), true, Show::Nothing), None);
        assert!(shown(&Line::parse("@L2 evnt"), false, Show::Warnings).unwrap().1.contains("evnt"));
    }

    #[test]
    fn each_nvmx_of_a_stack_has_its_own_level() {
        let view = View::of_stack(&Ui::new(false), Show::Nothing, 2);
        let lines =
            ["@L1 hello version=1", "@L1 hello version=1", "@L2 say text=x", "@L3 say text=x", "[nvmx WARN ] x"];
        let levels = lines.map(|l| view.real_level(&Line::parse(l), "L1"));
        assert_eq!(levels, ["L1", "L2", "L3", "L4", "nvmx"]);
        assert_eq!(lines[..2].iter().map(|l| view.real_level(&Line::parse(l), "L1")).collect::<Vec<_>>(), ["L1", "L2"]);
        let view = View::new(&Ui::new(false), Show::Nothing);
        assert_eq!(lines.map(|l| view.real_level(&Line::parse(l), "L1")), ["L1", "L1", "L2", "L3", "L1"]);
    }
}
