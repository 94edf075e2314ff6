//! Another VMM, such as QEMU: a program whose output goes to the console, line by line. To each record of
//! a measurement it adds what KVM and nvmx have counted since the record before.

use crate::console::Console;
use crate::counters::Counters;
use crate::machine::End;
use crate::plan::{Ending, Item};
use crate::stats::NAMES;
use crate::{ending, init};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

const EVENT: &[u8] = b"@L3 event ";

/// Runs it to its end, or kills it after so many milliseconds, or ends the machine when its guest has said that it works. Its
/// arguments are separated by blanks; one with a blank in it is quoted by `"`.
///
/// # Errors
/// If it does not start.
pub fn run(program: &Item, kill: Option<u64>, mut end: Option<Ending>, console: &mut Console) -> Result<End> {
    init::mount_debugfs();
    let mut meter = Meter::now();
    let mut child = Command::new(&program.path)
        .args(arguments(&program.args))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.path))?;
    let killer = kill.map(|after| kill_later(child.id(), Duration::from_millis(after)));
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            console.write(line);
            if line.starts_with(EVENT) {
                console.write(meter.advance().as_bytes());
            }
            console.write(b"\n");
            if line.starts_with(EVENT) {
                end.take().map_or(Ok(()), |how| ending::end(how, console))?;
            }
        }
    }
    // Before the child is waited for: until then its number is its own.
    let killed = killer.map(|killer| killer.join().is_ok());
    let status = child.wait().with_context(|| format!("{} is lost", program.path))?;
    if let Some(killed) = killed {
        // A program that ended before was not killed, which is what was to be tried.
        let killed = killed && status.signal() == Some(libc::SIGKILL);
        return Ok(if killed {
            End::Itself
        } else {
            End::Broken(format!("{} was not killed: {status}", program.path))
        });
    }
    Ok(if status.success() { End::Itself } else { End::Broken(format!("{}: {status}", program.path)) })
}

/// Kills a child of this process, which nobody waits for before the thread has ended or the child's output has.
fn kill_later(child: u32, after: Duration) -> JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(after);
        // SAFETY: a signal has no memory arguments.
        unsafe { libc::kill(child as libc::pid_t, libc::SIGKILL) };
    })
}

/// The counters at one moment.
struct Meter {
    kvm: [Option<u64>; NAMES.len()],
    nvmx: Option<Counters>,
}

impl Meter {
    fn now() -> Self {
        let read =
            |name: &str| std::fs::read_to_string(format!("/sys/kernel/debug/kvm/{name}")).ok()?.trim().parse().ok();
        Meter { kvm: NAMES.map(|(name, _)| read(name)), nvmx: Counters::read() }
    }

    /// What was counted since the moment, as fields of a record; the next call counts from now.
    fn advance(&mut self) -> String {
        let before = std::mem::replace(self, Meter::now());
        let mut text = String::new();
        for ((from, to), (_, name)) in before.kvm.iter().zip(&self.kvm).zip(NAMES) {
            if let (Some(from), Some(to)) = (from, to) {
                text.push_str(&format!(" {name}={}", to.saturating_sub(*from)));
            }
        }
        let nvmx = before.nvmx.as_ref().zip(self.nvmx.as_ref()).map(|(from, to)| from.fields(to));
        text + &nvmx.unwrap_or_default()
    }
}

/// The words of a command line; `"` keeps blanks in one.
pub fn arguments(text: &str) -> Vec<String> {
    let mut list = Vec::new();
    for (n, part) in text.split('"').enumerate() {
        match n % 2 {
            0 => list.extend(part.split_whitespace().map(str::to_string)),
            _ => list.push(part.to_string()),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_keep_an_argument_together() {
        assert_eq!(arguments("-m 256 -append \"a b\" -x"), ["-m", "256", "-append", "a b", "-x"]);
    }
}
