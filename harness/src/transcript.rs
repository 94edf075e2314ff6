//! The serial line of a boot: read while it grows, kept as records and text.

use crate::report::refusal::Refusal;
use crate::report::stack;
use l2_protocol::{Kind, Level, OwnedRecord, is_record};
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// One line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// A record
    Record(OwnedRecord),
    /// A line that claims to be a record and is none: what is wrong with it
    Broken(String, String),
    /// Text for people
    Text(String),
}

impl Line {
    /// Reads one line.
    pub fn parse(line: &str) -> Self {
        let line = of_domain(line).unwrap_or(line);
        if !is_record(line) {
            return Line::Text(line.to_string());
        }
        match OwnedRecord::parse(line) {
            Ok(record) => Line::Record(record),
            Err(error) => Line::Broken(line.to_string(), error.to_string()),
        }
    }

    /// As it came.
    pub fn raw(&self) -> String {
        match self {
            Line::Record(record) => record.to_string(),
            Line::Broken(line, _) | Line::Text(line) => line.clone(),
        }
    }
}

/// The record that a domain of Xen wrote to its debug port: on Xen's console `(d1) ` is before it.
fn of_domain(line: &str) -> Option<&str> {
    let (number, text) = line.strip_prefix("(d")?.split_once(") ")?;
    (number.bytes().all(|b| b.is_ascii_digit()) && is_record(text)).then_some(text)
}

/// All that a boot has said.
#[derive(Clone, Default, Debug)]
pub struct Transcript {
    /// In the order they came
    pub lines: Vec<Line>,
}

impl Transcript {
    /// The records.
    pub fn records(&self) -> impl DoubleEndedIterator<Item = &OwnedRecord> {
        self.lines.iter().filter_map(|line| if let Line::Record(record) = line { Some(record) } else { None })
    }

    /// The records of one kind.
    pub fn of_kind(&self, kind: Kind) -> impl DoubleEndedIterator<Item = &OwnedRecord> {
        self.records().filter(move |r| r.kind == kind)
    }

    /// The first record of a kind by a level.
    pub fn first(&self, level: Level, kind: Kind) -> Option<&OwnedRecord> {
        self.of_kind(kind).find(|r| r.level == level)
    }

    /// Whether the last word has been said: the guest's end, or an epitaph.
    pub fn is_over(&self) -> bool {
        self.records().any(|r| matches!(r.kind, Kind::End | Kind::Epitaph))
    }

    /// Lines that are not records.
    pub fn texts(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.lines.iter().filter_map(|line| if let Line::Text(text) = line { Some(text.as_str()) } else { None })
    }

    /// The last lines, as they came.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let from = self.lines.len().saturating_sub(count);
        self.lines[from..].iter().map(Line::raw).collect()
    }

    /// Whether some line, record or text, contains all of these.
    pub fn a_line_has(&self, texts: &[&str]) -> bool {
        self.lines.iter().map(Line::raw).any(|line| texts.iter().all(|t| line.contains(t)))
    }
}

/// Reads a file that another process writes.
pub struct Follower {
    path: PathBuf,
    at: u64,
    rest: Vec<u8>,
}

impl Follower {
    /// Follows a file that need not exist yet.
    pub fn new(path: &Path) -> Self {
        Follower { path: path.to_path_buf(), at: 0, rest: Vec::new() }
    }

    /// The complete lines since the last call; with `last` also an incomplete one.
    pub fn lines(&mut self, last: bool) -> Vec<String> {
        let mut fresh = Vec::new();
        if let Ok(mut file) = File::open(&self.path) {
            // A read that fails now is tried again with the next call.
            if file.seek(SeekFrom::Start(self.at)).is_ok() && file.read_to_end(&mut fresh).is_ok() {
                self.at += fresh.len() as u64;
                self.rest.extend_from_slice(&fresh);
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            lines.push(text(&line));
        }
        if last && !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            lines.push(text(&rest));
        }
        lines
    }
}

impl Follower {
    /// What was read of a line that is not complete.
    pub fn pending(&self) -> String {
        text(&self.rest)
    }
}

/// Without line end and control characters (a terminal must not be steered by a guest).
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches(['\r', '\n'])
        .replace(|c: char| c.is_control() && c != '\t', "\u{fffd}")
}

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

/// The level in the whole stack of one that a record names: there is one L1 hello for each nvmx, the outermost first, and every
/// guest takes the nvmx below it for the only one.
pub fn real_level(level: Level, depth: u32, met: u32) -> String {
    match level {
        Level::L1 => format!("L{met}"),
        Level::L2 => format!("L{}", depth + 1),
        Level::L3 => format!("L{}", depth + 2),
    }
}

/// The level and the text of a line that is to be shown.
fn shown(line: &Line, verbose: bool, show: Show) -> Option<(&'static str, String)> {
    if show == Show::Nothing {
        return None;
    }
    let shown = match line {
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

fn is_log(text: &str) -> bool {
    text.starts_with("[nvmx ")
}

/// Whether nvmx logs a warning or an error.
pub fn is_warning(text: &str) -> bool {
    is_log(text) && text.split(']').next().is_some_and(|head| head.contains("ERROR") || head.contains("WARN"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_arrive_whole_although_the_file_grows_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let mut follower = Follower::new(&path);
        assert!(follower.lines(false).is_empty());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\r\ntw").unwrap();
        assert_eq!(follower.lines(false), ["one"]);
        file.write_all(b"o\nthr\x1b[31mee").unwrap();
        assert_eq!(follower.lines(false), ["two"]);
        assert_eq!(follower.lines(true), ["thr\u{fffd}[31mee"]);
        assert!(follower.lines(true).is_empty());
    }

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
    fn what_a_domain_of_xen_says_is_a_record_of_its_own() {
        let Line::Record(record) = Line::parse("(d12) @L3 say text=x") else { panic!("no record") };
        assert_eq!((record.level, record.get("text")), (Level::L3, Some("x")));
        for text in ["(d1) Linux says", "(XEN) @L3 say text=x", "(dx) @L3 say text=x"] {
            assert_eq!(Line::parse(text), Line::Text(text.into()));
        }
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

    #[test]
    fn an_epitaph_or_an_end_is_the_last_word() {
        let of = |lines: &[&str]| Transcript { lines: lines.iter().map(|l| Line::parse(l)).collect() };
        assert!(!of(&["@L2 say text=x"]).is_over());
        assert!(of(&["@L2 end status=pass failed=0"]).is_over());
        assert!(of(&["@L1 epitaph who=L2 where=x why=y"]).is_over());
    }
}
