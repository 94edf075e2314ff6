//! Where figures are from, so that they can be had again, and what must be equal where two runs are compared.

use crate::session::Session;
use chrono::{DateTime, Utc};
use nvmx_setup::bochs;
use nvmx_setup::proc;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

/// Where a file of figures is from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Provenance {
    /// What was typed
    pub command: String,
    /// The commit of the checkout, if it is one
    pub revision: Option<String>,
    /// Whether files differed from that commit
    pub changed: Option<bool>,
    /// `2026-11-28T17:05:00Z`
    pub date: String,
    /// The machine, where one was booted
    pub machine: Option<Place>,
}

/// What counts depend on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Place {
    /// The compiler of the images
    pub compiler: String,
    /// The emulator or the hypervisor
    pub l0: String,
    /// The digest of the changes to the emulator and of its options, if it is our build
    pub emulator: Option<String>,
    /// CPU model of the emulator, or the host's processor
    pub cpu: String,
    /// MiB
    pub memory: u32,
    /// Processors
    pub cpus: u32,
}

impl Provenance {
    /// Of this command in this checkout.
    pub fn of(root: &Path, machine: Option<Place>) -> Self {
        // The words after the program's path, which is this machine's own.
        let words: Vec<String> = std::env::args().skip(1).collect();
        let git = |args: &[&str]| {
            let said = proc::stdout_of(Command::new("git").arg("-C").arg(root).args(args));
            said.ok().map(|text| text.trim().to_string())
        };
        Provenance {
            command: format!("./nvmx {}", words.join(" ")),
            revision: git(&["rev-parse", "HEAD"]),
            changed: git(&["status", "--porcelain", "--untracked-files=no"]).map(|changes| !changes.is_empty()),
            date: told(SystemTime::now().into()),
            machine,
        }
    }

    /// The revision, for people.
    pub fn told_revision(&self) -> String {
        match (&self.revision, self.changed) {
            (Some(hash), Some(false)) => format!("revision {}", &hash[..hash.len().min(12)]),
            (Some(hash), _) => format!("revision {} with changes", &hash[..hash.len().min(12)]),
            _ => "no revision known".into(),
        }
    }
}

impl Place {
    /// Where the session's boots run.
    pub fn of(session: &Session) -> Self {
        let machine = &session.machine;
        let own = session.bochs.is_none() && session.backend.records();
        Place {
            compiler: session.toolchain.version.clone(),
            l0: session.backend.name(),
            emulator: if own { bochs::digest(&session.paths).ok() } else { None },
            cpu: session.backend.cpu(machine),
            memory: machine.memory,
            cpus: machine.cpus,
        }
    }

    /// What differs so that counts of the two cannot be compared: "compiler: rustc 1.85.0 and rustc 1.96.0".
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let none = || "another build".to_string();
        let pairs = [
            ("compiler", self.compiler.clone(), other.compiler.clone()),
            ("L0", self.l0.clone(), other.l0.clone()),
            ("emulator", self.emulator.clone().unwrap_or_else(none), other.emulator.clone().unwrap_or_else(none)),
            ("CPU", self.cpu.clone(), other.cpu.clone()),
            ("memory", format!("{} MiB", self.memory), format!("{} MiB", other.memory)),
            ("CPUs", self.cpus.to_string(), other.cpus.to_string()),
        ];
        let unequal = pairs.into_iter().filter(|(_, a, b)| a != b);
        unequal.map(|(what, a, b)| format!("{what}: {a} and {b}")).collect()
    }
}

fn told(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine of the tests.
    pub fn place() -> Place {
        Place {
            compiler: "rustc 1.85.0, LLVM 19.1.7".into(),
            l0: "Bochs 3.0".into(),
            emulator: Some("00ff".into()),
            cpu: "tigerlake".into(),
            memory: 256,
            cpus: 1,
        }
    }

    #[test]
    fn days_are_dates() {
        let day = |days: i64| told(DateTime::from_timestamp(days * 86_400, 0).unwrap());
        assert_eq!(day(0), "1970-01-01T00:00:00Z");
        assert_eq!(day(11_016), "2000-02-29T00:00:00Z");
        assert_eq!(day(20_785), "2026-11-28T00:00:00Z");
    }

    #[test]
    fn what_keeps_two_runs_from_being_compared_is_named() {
        let (one, mut other) = (place(), place());
        assert!(one.differences(&other).is_empty());
        other.compiler = "rustc 1.96.0, LLVM 21.1.0".into();
        other.emulator = None;
        assert_eq!(
            one.differences(&other),
            ["compiler: rustc 1.85.0, LLVM 19.1.7 and rustc 1.96.0, LLVM 21.1.0", "emulator: 00ff and another build"]
        );
    }

    #[test]
    fn a_folder_without_a_repository_has_no_revision() {
        let folder = tempfile::tempdir().unwrap();
        let known = Provenance::of(folder.path(), None);
        assert_eq!((known.revision.clone(), known.told_revision().as_str()), (None, "no revision known"));
    }
}
