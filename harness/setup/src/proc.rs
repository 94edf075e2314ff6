//! Child processes: each in a process group of its own, none left behind, whatever ends the harness.

use crate::error::Stop;
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static GROUPS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Whether the user has pressed Ctrl-C (or the harness was told to end).
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error if the user has pressed Ctrl-C.
///
/// # Errors
/// [`Stop::Interrupted`].
pub fn check_interrupt() -> Result<()> {
    if interrupted() { Err(Stop::Interrupted.into()) } else { Ok(()) }
}

/// On SIGINT, SIGTERM and SIGHUP: ends all children; the harness then notices and cleans up. A second one ends at once.
///
/// # Errors
/// If the handler cannot be installed.
pub fn install_handler() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            signal_all(Signal::KILL);
            std::process::exit(130);
        }
        signal_all(Signal::TERM);
    })
    .context("cannot catch Ctrl-C")
}

/// The same command by `setpriv`, which asks the kernel to kill it when the harness dies, however that dies; `None` if there
/// is no `setpriv`, or no such program.
fn bound(command: &Command) -> Option<Command> {
    static SETPRIV: OnceLock<Option<PathBuf>> = OnceLock::new();
    let setpriv = SETPRIV.get_or_init(|| {
        let found = which::which("setpriv").ok()?;
        let works = Command::new(&found).args(["--pdeathsig", "KILL", "true"]).stderr(Stdio::null()).status();
        works.is_ok_and(|status| status.success()).then_some(found)
    });
    let there = command.get_program().to_string_lossy().contains('/') || which::which(command.get_program()).is_ok();
    let mut bound = Command::new(setpriv.as_ref().filter(|_| there)?);
    bound.args(["--pdeathsig", "KILL"]).arg(command.get_program()).args(command.get_args());
    command.get_current_dir().map(|folder| bound.current_dir(folder));
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(key, value),
            None => bound.env_remove(key),
        };
    }
    Some(bound)
}

fn signal_all(signal: Signal) {
    for &group in GROUPS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        signal_group(group, signal);
    }
}

fn signal_group(group: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(group) {
        // The group may be gone already: that is what is wanted.
        let _ = kill_process_group(pid, signal);
    }
}

/// A running child, the leader of its process group. Dropping it ends the whole group.
pub struct Child {
    child: std::process::Child,
    group: i32,
    over: Option<ExitStatus>,
}

impl Child {
    /// Starts the command in a new process group, without standard input. It does not outlive the harness, whatever ends that.
    ///
    /// # Errors
    /// If the program cannot be started, or after Ctrl-C.
    pub fn spawn(command: &mut Command, out: impl Into<Stdio>, err: impl Into<Stdio>) -> Result<Self> {
        check_interrupt()?;
        let name = command.get_program().to_string_lossy().into_owned();
        let mut bound = bound(command);
        let command = bound.as_mut().unwrap_or(command).stdout(out).stderr(err);
        // The lock is held over the start so that Ctrl-C sees either no child or a registered one.
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        let child =
            command.stdin(Stdio::null()).process_group(0).spawn().with_context(|| format!("cannot start {name}"))?;
        let group = i32::try_from(child.id()).context("process id out of range")?;
        groups.insert(group);
        Ok(Child { child, group, over: None })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status if the child has ended.
    ///
    /// # Errors
    /// If the operating system does not tell.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.over.is_none() {
            self.over = self.child.try_wait()?;
        }
        Ok(self.over)
    }

    /// Waits at most so long.
    ///
    /// # Errors
    /// If the operating system does not tell.
    pub fn wait_for(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.poll()? {
                return Ok(Some(status));
            }
            if start.elapsed() >= limit {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks the group to end by a signal.
    pub fn signal(&self, signal: Signal) {
        signal_group(self.group, signal);
    }

    /// Ends the group: politely first.
    pub fn end(&mut self) {
        if matches!(self.poll(), Ok(None)) {
            self.signal(Signal::TERM);
            if matches!(self.wait_for(Duration::from_secs(2)), Ok(None)) {
                self.signal(Signal::KILL);
                self.over = self.child.wait().ok();
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
        // Grandchildren that outlived their parent.
        self.signal(Signal::KILL);
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.group);
    }
}

/// What a command said.
pub struct Said {
    /// How it ended
    pub status: ExitStatus,
    /// stdout and stderr, in the order they came
    pub text: String,
}

impl Said {
    /// The last lines, for an error message.
    pub fn tail(&self, lines: usize) -> String {
        let all: Vec<&str> = self.text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Runs a command to its end; each line of stdout and stderr goes to `on_line` and to the file `log`.
///
/// # Errors
/// If it cannot be started, or after Ctrl-C. A non-zero exit is no error.
pub fn run(command: &mut Command, log: Option<&Path>, mut on_line: impl FnMut(&str)) -> Result<Said> {
    let mut log = log.map(File::create).transpose().context("cannot write a log file")?;
    let mut child = Child::spawn(command, Stdio::piped(), Stdio::piped())?;
    let (send, receive) = mpsc::channel();
    if let Some(out) = child.child.stdout.take() {
        forward(out, send.clone());
    }
    if let Some(err) = child.child.stderr.take() {
        forward(err, send);
    }
    let mut text = String::new();
    for line in receive {
        if let Some(log) = &mut log {
            writeln!(log, "{line}")?;
        }
        on_line(&line);
        text.push_str(&line);
        text.push('\n');
    }
    let status = loop {
        if let Some(status) = child.wait_for(Duration::from_secs(1))? {
            break status;
        }
        check_interrupt()?;
    };
    check_interrupt()?;
    Ok(Said { status, text })
}

fn forward(from: impl Read + Send + 'static, to: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            line.clear();
            if to.send(text).is_err() {
                return;
            }
        }
    });
}

/// Runs a short command and returns its stdout if it succeeds.
///
/// # Errors
/// If it cannot be started or fails.
pub fn stdout_of(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output()?;
    anyhow::ensure!(
        out.status.success(),
        "{} failed: {}",
        command.get_program().to_string_lossy(),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_outputs_of_a_command_are_collected() {
        let mut seen = Vec::new();
        let said =
            run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]), None, |l| seen.push(l.to_string()));
        let said = said.unwrap();
        seen.sort();
        assert_eq!(seen, ["err", "out"]);
        assert_eq!(said.status.code(), Some(3));
    }

    /// A shell stands for the harness: killed by SIGKILL, it cannot clean up after itself.
    #[test]
    fn what_is_started_dies_with_its_parent() {
        let Some(bound) = bound(Command::new("sleep").arg("1000")) else { return };
        let words = std::iter::once(bound.get_program()).chain(bound.get_args());
        let line = words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("{line} & echo $! > {}; sleep 0.3; kill -KILL $$", file.display());
        let status = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(!status.success());
        let pid: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        let start = Instant::now();
        while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(start.elapsed() < Duration::from_secs(10), "it lives on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn dropping_a_child_ends_its_grandchildren() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let child = Child::spawn(Command::new("sh").args(["-c", &script]), Stdio::inherit(), Stdio::inherit()).unwrap();
        let start = Instant::now();
        let pid = loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if let Ok(pid) = text.trim().parse::<i32>() {
                break pid;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "the child did not start");
            std::thread::sleep(Duration::from_millis(10));
        };
        drop(child);
        let gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        let start = Instant::now();
        while !gone() {
            assert!(start.elapsed() < Duration::from_secs(10), "the grandchild lives on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
