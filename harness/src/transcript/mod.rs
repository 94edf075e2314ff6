//! The serial line of a boot: read while it grows, kept as records and text. [`view`] shows it, [`stack`] knows the levels that it
//! tells of, [`refusal`] what VMX refused.

pub mod refusal;
pub mod stack;
pub mod view;

use l2_protocol::{Kind, Level, OwnedRecord, is_record};
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

/// The level in the whole stack of one that a record names: there is one L1 hello for each nvmx, the outermost first, and every
/// guest takes the nvmx below it for the only one.
pub fn real_level(level: Level, depth: u32, met: u32) -> String {
    match level {
        Level::L1 => format!("L{met}"),
        Level::L2 => format!("L{}", depth + 1),
        Level::L3 => format!("L{}", depth + 2),
    }
}

/// Whether nvmx wrote the line into its log.
pub fn is_log(text: &str) -> bool {
    text.starts_with("[nvmx ")
}

/// Whether nvmx logs a warning or an error.
pub fn is_warning(text: &str) -> bool {
    is_log(text) && text.split(']').next().is_some_and(|head| head.contains("ERROR") || head.contains("WARN"))
}

/// Whether a line may be the reason for an end: a warning of nvmx, or an error of the VMM.
pub fn tells_why(text: &str) -> bool {
    is_warning(text) || text.starts_with("[vmm ERROR]")
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
    fn what_a_domain_of_xen_says_is_a_record_of_its_own() {
        let Line::Record(record) = Line::parse("(d12) @L3 say text=x") else { panic!("no record") };
        assert_eq!((record.level, record.get("text")), (Level::L3, Some("x")));
        for text in ["(d1) Linux says", "(XEN) @L3 say text=x", "(dx) @L3 say text=x"] {
            assert_eq!(Line::parse(text), Line::Text(text.into()));
        }
    }

    #[test]
    fn an_epitaph_or_an_end_is_the_last_word() {
        let of = |lines: &[&str]| Transcript { lines: lines.iter().map(|l| Line::parse(l)).collect() };
        assert!(!of(&["@L2 say text=x"]).is_over());
        assert!(of(&["@L2 end status=pass failed=0"]).is_over());
        assert!(of(&["@L1 epitaph who=L2 where=x why=y"]).is_over());
    }
}
