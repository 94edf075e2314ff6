//! One boot from start to verdict.

use crate::backend::{Backend, DEBUG_PORT, SERIAL, Spec, memory};
use crate::clock::{Clock, Over, Time};
use crate::image;
use crate::trace::file::Boot as Trace;
use crate::trace::record;
use crate::transcript::view::View;
use crate::transcript::{Follower, Line, Transcript};
use anyhow::Result;
use l2_protocol::{Kind, Level};
use nvmx_setup::paths::Paths;
use nvmx_setup::proc;
use nvmx_setup::ui::Ui;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How a boot ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The machine ended itself
    Itself,
    /// The guest had said its last word, but the machine went on and was ended
    Lingered,
    /// A line had the text that the user waits for
    Text,
    /// Its only processor is halted with interrupts off
    Halted,
    /// The limit
    Timeout(Over),
}

/// What came of a boot.
#[derive(Debug)]
pub struct Outcome {
    /// The boot's name
    pub name: String,
    /// What it said
    pub transcript: Transcript,
    /// How it ended
    pub ended: Ended,
    /// What L0 says about it
    pub machine: Vec<String>,
    /// How long it took by the clock on the wall
    pub took: Duration,
    /// What it used up, as its limit counts
    pub used: Option<Time>,
    /// The exit code of the emulator, if it ended itself
    pub status: Option<i32>,
    /// The image that is L2, where it is known
    pub l2: Option<PathBuf>,
    /// Its files
    pub folder: PathBuf,
    /// Its exits, if they were recorded
    pub trace: Option<Trace>,
}

/// How long a machine may take to end itself after its last word.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(30);

/// Boots and waits for the end, showing lines as they come.
///
/// # Errors
/// If L0 cannot be started, or after Ctrl-C.
pub fn boot(paths: &Paths, backend: &dyn Backend, spec: &Spec, view: &View) -> Result<Outcome> {
    watched(paths, backend, spec, |line| view.show(line))
}

/// [`boot`] with a look at each line as it comes.
///
/// # Errors
/// As there.
pub fn watched(paths: &Paths, backend: &dyn Backend, spec: &Spec, mut look: impl FnMut(&Line)) -> Result<Outcome> {
    let folder = tempfile::Builder::new().prefix(&format!("{}-", spec.name)).tempdir_in(paths.boots()?)?;
    let start = Instant::now();
    let mut child = backend.start(spec, folder.path())?;
    let mut clock = Clock::start(child.id(), folder.path());
    let logs = if spec.debug_port { &[SERIAL, DEBUG_PORT][..] } else { &[SERIAL] };
    let mut followers: Vec<Follower> = logs.iter().map(|log| Follower::new(&folder.path().join(log))).collect();
    let mut transcript = Transcript::default();
    let mut last_word: Option<(Instant, Duration)> = None;
    let take = |followers: &mut Vec<Follower>, transcript: &mut Transcript, look: &mut dyn FnMut(&Line), last: bool| {
        for line in followers.iter_mut().flat_map(|follower| follower.lines(last)) {
            let line = Line::parse(&line);
            look(&line);
            transcript.lines.push(line);
        }
    };
    let (mut code, mut seen) = (None, 0);
    let (ended, mut machine) = loop {
        let status = child.poll()?;
        take(&mut followers, &mut transcript, &mut look, false);
        proc::check_interrupt()?;
        if spec.stop.text.as_ref().is_some_and(|text| transcript.a_line_has(&[text]) || waits(&followers, text)) {
            finish(backend, spec, &mut child, folder.path());
            break (Ended::Text, Vec::new());
        }
        if let Some(status) = status {
            code = status.code();
            break (Ended::Itself, Vec::new());
        }
        if spec.stop.halt && clock.halted() {
            finish(backend, spec, &mut child, folder.path());
            break (Ended::Halted, Vec::new());
        }
        // nvmx writes its trace after the last word.
        let tells = transcript.lines.last().is_some_and(is_trace) && transcript.lines.len() > seen;
        seen = transcript.lines.len();
        if transcript.is_over() && (last_word.is_none() || tells) {
            last_word = Some((Instant::now(), used(&mut clock)));
        }
        if last_word.is_some_and(|since| lingers(since, used(&mut clock))) {
            finish(backend, spec, &mut child, folder.path());
            break (Ended::Lingered, Vec::new());
        }
        if let Some(over) = clock.over(spec.timeout) {
            // Held while it is looked at.
            child.signal(Signal::STOP);
            let mut machine = memory::last_exits(child.id());
            child.signal(Signal::CONT);
            machine.extend(backend.stop(&mut child, folder.path()));
            break (Ended::Timeout(over), machine);
        }
        std::thread::sleep(POLL);
    };
    drop(child);
    take(&mut followers, &mut transcript, &mut look, true);
    machine.extend(backend.last_words(folder.path()));
    name_addresses(&mut machine, spec);
    let took = start.elapsed();
    // Kept for a look: a later `run` or `test` clears what is old.
    let folder = folder.keep();
    let _ = std::fs::remove_file(folder.join("boot.iso"));
    let used = clock.read();
    let trace = record::read(spec, backend, &folder, transcript.records())?;
    transcript.lines.retain(|line| !is_trace(line));
    Ok(Outcome {
        name: spec.name.clone(),
        transcript,
        ended,
        machine,
        took,
        used,
        status: code,
        l2: spec.l2(),
        folder,
        trace,
    })
}

/// Whether a line is of nvmx's own trace.
fn is_trace(line: &Line) -> bool {
    matches!(line, Line::Record(record) if record.kind == Kind::Trace)
}

/// Ends the machine; one whose exits are recorded gets the time to write them.
fn finish(backend: &dyn Backend, spec: &Spec, child: &mut proc::Child, folder: &Path) {
    if spec.record.is_some() {
        backend.stop(child, folder);
    }
    child.end();
}

/// Whether a line that is not complete yet (a prompt) has the text.
fn waits(followers: &[Follower], text: &str) -> bool {
    followers.iter().any(|follower| follower.pending().contains(text))
}

fn used(clock: &mut Clock) -> Duration {
    clock.read().map_or(Duration::ZERO, Time::as_limit)
}

/// Whether a machine whose last word came then goes on for too long. One that is halted uses up nothing.
fn lingers((word, used_then): (Instant, Duration), used: Duration) -> bool {
    let (wall, machine) = (word.elapsed(), used.saturating_sub(used_then));
    wall > GRACE && (machine > GRACE || wall > GRACE * 12)
}

/// Adds the function's name to what L0 says about RIP.
fn name_addresses(machine: &mut [String], spec: &Spec) {
    for line in machine {
        let Some((_, after)) = line.split_once("RIP=") else { continue };
        let digits: String = after.chars().filter(|c| *c != '_').take_while(char::is_ascii_hexdigit).collect();
        let Ok(address) = u64::from_str_radix(&digits, 16) else { continue };
        let images = std::iter::once(&spec.kernel).chain(&spec.modules);
        let names: Vec<String> = images
            .filter_map(|p| Some(format!("{}: {}", p.path.file_name()?.to_str()?, image::symbol(&p.path, address)?)))
            .collect();
        if !names.is_empty() {
            line.push_str(&format!("   [{}]", names.join("; ")));
        }
    }
}

impl Outcome {
    /// `Ok` if the guest ran to its end and passed; else the reason in one line.
    ///
    /// # Errors
    /// The reason.
    pub fn verdict(&self) -> Result<(), String> {
        if let Ended::Timeout(over) = self.ended {
            return Err(over.to_string());
        }
        let t = &self.transcript;
        if let Some(epitaph) = t.of_kind(Kind::Epitaph).next() {
            let get = |key| epitaph.get(key).unwrap_or("?");
            return Err(format!("{} died: {} ({})", get("who"), get("why"), get("where")));
        }
        if let Some(Line::Broken(line, error)) = t.lines.iter().find(|l| matches!(l, Line::Broken(..))) {
            return Err(format!("a record cannot be read: {line} ({error})"));
        }
        let end = t.of_kind(Kind::End).next_back();
        match end.and_then(|r| r.get("status")) {
            Some("pass") => Ok(()),
            Some(_) => {
                let failed = end.and_then(|r| r.get("failed")).unwrap_or("?");
                Err(format!("the guest says that it failed ({failed} failures)"))
            }
            None => {
                let text = t.texts().rfind(|l| crate::transcript::tells_why(l));
                let said = text.map(str::to_string).or_else(|| self.machine.last().cloned());
                Err(format!(
                    "the machine ended before the guest did{}",
                    said.map_or(String::new(), |s| format!(": {s}"))
                ))
            }
        }
    }

    /// Whether the emulator's exit code is what the guest wrote to an exit port: QEMU's is odd, that of Bochs is always 1.
    pub fn status_is_the_guests(&self) -> bool {
        self.used.is_none_or(|used| matches!(used, Time::Cpu(_))) && self.status.is_some_and(|code| code > 1)
    }

    /// Where each level stopped, for people.
    pub fn post_mortem(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for level in [Level::L1, Level::L2, Level::L3] {
            if let Some(record) = self.transcript.records().rfind(|r| r.level == level) {
                lines.push(format!("{level} last said: {record}"));
            }
        }
        let records = self.transcript.records();
        let exits = records.rev().find_map(|r| Some((r.get("last_l2")?.to_string(), r.get("last_l3")?.to_string())));
        if let Some((l2, l3)) = exits {
            lines.push(format!("last exit of L2: {l2}"));
            lines.push(format!("last exit of L3: {l3}"));
        }
        lines.push("the last lines on the serial port:".into());
        let tail = self.transcript.tail(10);
        if tail.is_empty() {
            lines.push("  (none)".into());
        }
        lines.extend(tail.into_iter().map(|l| format!("  {l}")));
        if !self.machine.is_empty() {
            lines.push("the machine:".into());
            lines.extend(self.machine.iter().map(|l| format!("  {l}")));
        }
        if let Some(used) = self.used {
            lines.push(format!("it used {used}, {:.1} s by the clock on the wall", self.took.as_secs_f64()));
        }
        lines.push(format!("its files: {}", self.folder.display()));
        lines
    }
}

/// Clears the files of earlier boots.
pub fn clear_old(paths: &Paths) {
    const OLD: Duration = Duration::from_secs(3600);
    let Ok(folder) = paths.boots() else { return };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > OLD) {
            // What cannot be removed does no harm.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Tells where each level stopped if the boot failed.
pub fn tell_failure(ui: &Ui, outcome: &Outcome) -> Option<String> {
    let reason = outcome.verdict().err()?;
    ui.note(&format!("--- {}", outcome.name));
    for line in outcome.post_mortem() {
        ui.note(&line);
    }
    Some(format!("{}: {reason}", outcome.name))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A boot that ended by itself and said these lines.
    pub fn outcome(name: &str, lines: &[&str]) -> Outcome {
        Outcome {
            name: name.into(),
            transcript: Transcript { lines: lines.iter().map(|l| Line::parse(l)).collect() },
            ended: Ended::Itself,
            machine: Vec::new(),
            took: Duration::ZERO,
            used: None,
            status: None,
            l2: None,
            folder: "/".into(),
            trace: None,
        }
    }

    const LATE: Ended = Ended::Timeout(Over::Limit(Time::Cpu(Duration::from_secs(7))));

    fn ended(ended: Ended, lines: &[&str]) -> Outcome {
        let (machine, took) = (vec!["3rd exception".into()], Duration::from_secs(7));
        Outcome { ended, machine, took, ..outcome("x", lines) }
    }

    #[test]
    fn the_verdict_needs_the_guests_own_word() {
        assert_eq!(ended(Ended::Itself, &["@L2 end status=pass failed=0"]).verdict(), Ok(()));
        let failed = ended(Ended::Itself, &["@L2 end status=fail failed=3"]).verdict().unwrap_err();
        assert!(failed.contains("3 failures"), "{failed}");
        let silent = ended(Ended::Itself, &["[nvmx ERROR] no module"]).verdict().unwrap_err();
        assert_eq!(silent, "the machine ended before the guest did: [nvmx ERROR] no module");
        let below = ended(Ended::Itself, &["[vmm ERROR] no VMX", "[vmm INFO ] x"]).verdict().unwrap_err();
        assert_eq!(below, "the machine ended before the guest did: [vmm ERROR] no VMX");
        let dead = ended(Ended::Itself, &[]).verdict().unwrap_err();
        assert_eq!(dead, "the machine ended before the guest did: 3rd exception");
        let late = ended(LATE, &["@L2 end status=pass failed=0"]).verdict().unwrap_err();
        assert_eq!(late, "it did not end within 7 s of CPU time");
        let dead = ended(Ended::Itself, &["@L1 epitaph who=L2 where=0x10 why=\"triple fault\""]).verdict();
        assert_eq!(dead, Err("L2 died: triple fault (0x10)".into()));
        assert!(ended(Ended::Itself, &["@L2 x", "@L2 end status=pass failed=0"]).verdict().is_err());
    }

    #[test]
    fn a_post_mortem_names_the_last_word_of_each_level() {
        let lines = ["@L2 say text=a", "@L3 say text=b", "@L1 epitaph who=L2 last_l2=cpuid last_l3=hlt", "end of log"];
        let text = ended(LATE, &lines).post_mortem().join("\n");
        assert!(text.contains("L3 last said: @L3 say text=b"), "{text}");
        assert!(text.contains("last exit of L3: hlt"));
        assert!(text.contains("  end of log"));
        assert!(text.contains("3rd exception"));
    }
}
