//! The machine's package manager: asked for what is missing, used only with the right to, never in another way.

use crate::error::Stop;
use crate::need::{Need, program};
use crate::proc;
use crate::ui::{Step, Ui};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How packages can be installed here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Power {
    /// As root
    Root,
    /// By `sudo -n`
    Sudo,
    /// Only by the user, who must type a password
    Ask,
    /// No apt on this machine
    None,
}

impl Power {
    /// Looks at the machine.
    pub fn find() -> Self {
        if program("apt-get").is_none() {
            Power::None
        } else if rustix::process::geteuid().is_root() {
            Power::Root
        } else if proc::stdout_of(Command::new("sudo").args(["-n", "true"])).is_ok() {
            Power::Sudo
        } else {
            Power::Ask
        }
    }

    /// What `doctor` says about it.
    pub fn text(self) -> &'static str {
        match self {
            Power::Root => "apt-get as root",
            Power::Sudo => "apt-get by sudo -n",
            Power::Ask => "apt-get, but only with your password: commands to type will be printed",
            Power::None => "no apt-get on this machine: missing tools must be installed by hand",
        }
    }
}

/// The command that installs packages, as the user would type it.
pub fn command_line(packages: &[&str]) -> String {
    format!("sudo apt-get install --no-install-recommends {}", packages.join(" "))
}

/// The version of a package that apt would install.
pub fn candidate(package: &str) -> Option<String> {
    parse_candidate(&proc::stdout_of(Command::new("apt-cache").args(["policy", package])).ok()?)
}

/// Whether a package is installed.
pub fn installed(package: &str) -> bool {
    proc::stdout_of(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Abbrev}", package]))
        .is_ok_and(|status| status.starts_with("ii"))
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|l| l.trim().strip_prefix("Candidate:"))?.trim();
    (version != "(none)").then(|| version.to_string())
}

/// One apt at a time: what is made at the same time may lack packages at the same time.
fn held() -> Held {
    static BUSY: Mutex<()> = Mutex::new(());
    BUSY.lock().unwrap_or_else(PoisonError::into_inner)
}

type Held = MutexGuard<'static, ()>;

/// Whether [`update`] was called.
static UPDATED: AtomicBool = AtomicBool::new(false);

/// Brings apt's lists up to date, if that is in our power.
///
/// # Errors
/// After Ctrl-C. Lists that cannot be fetched are no error here: the install that follows tells.
pub fn update(ui: &Ui) -> Result<()> {
    fetch_lists(ui, &mut held())
}

fn fetch_lists(ui: &Ui, _: &mut Held) -> Result<()> {
    UPDATED.store(true, Ordering::Relaxed);
    let power = Power::find();
    if matches!(power, Power::Root | Power::Sudo) {
        let mut step = ui.step("updating apt's package lists");
        proc::run(apt_get(power).arg("update"), None, |line| step.at(line))?;
    }
    Ok(())
}

/// [`update`], unless that was done: what is in a cache folder for long must not come from lists that are older than the archive.
///
/// # Errors
/// As there.
pub fn refresh(ui: &Ui) -> Result<()> {
    if UPDATED.load(Ordering::Relaxed) { Ok(()) } else { update(ui) }
}

/// Something that could not be fetched: without a network that is the answer, else the last words of apt and what helps.
pub fn not_fetched(what: &str, said: &str, todo: &[&str]) -> Stop {
    const OFFLINE: [&str; 6] = [
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Network is unreachable",
        "Unable to connect",
        "connection timed out",
    ];
    if OFFLINE.iter().any(|text| said.contains(text)) {
        return Stop::environment(format!(
            "cannot fetch {what}: no network, or the package archive cannot be reached. Try again where it can; what is fetched \
             once is kept in the cache folder (./nvmx doctor names it), which may be copied from a machine that has it"
        ));
    }
    let lines: Vec<&str> = said.lines().collect();
    let tail = lines[lines.len().saturating_sub(6)..].join("\n");
    let todo = todo.iter().map(|line| line.to_string()).collect();
    Stop::Environment { what: format!("cannot fetch {what}:\n{tail}"), todo }
}

/// Fetches packages into the folder `work` and unpacks them there, without installing them; the tree of their files.
///
/// # Errors
/// [`Stop::Environment`] if a package cannot be had.
pub fn unpacked(step: &mut Step, packages: &[String], work: &Path) -> Result<PathBuf> {
    let mut download = Command::new("apt-get");
    download.args(["-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(work);
    let said = proc::run(download.env("LC_ALL", "C.UTF-8"), None, |line| step.at(line))?;
    if !said.status.success() {
        return Err(not_fetched(&packages.join(", "), &said.text, &["sudo apt-get update"]).into());
    }
    step.at("unpacking");
    let tree = work.join("tree");
    for entry in std::fs::read_dir(work)?.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "deb")) {
        let said = proc::run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&tree), None, |_| {})?;
        ensure!(said.status.success(), "{} cannot be unpacked:\n{}", entry.path().display(), said.tail(4));
    }
    Ok(tree)
}

/// Packages and all that they depend on, as far as those are packages.
///
/// # Errors
/// If apt does not know them.
pub fn with_dependencies(packages: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("apt-cache");
    command.args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
    command.args(["--no-replaces", "--no-enhances"]).args(packages);
    let names = package_names(&proc::stdout_of(&mut command)?);
    let policy = proc::stdout_of(Command::new("apt-cache").arg("policy").args(&names).env("LC_ALL", "C.UTF-8"))?;
    Ok(real_packages(&policy))
}

/// Those that have a version to install.
fn real_packages(policy: &str) -> Vec<String> {
    let mut name = "";
    let mut found = Vec::new();
    for line in policy.lines() {
        match line.trim().strip_prefix("Candidate: ") {
            Some("(none)") => {}
            Some(_) => found.push(name.to_string()),
            None if !line.starts_with(' ') => name = line.trim_end_matches(':'),
            None => {}
        }
    }
    found
}

/// Names at the start of a line; those in angle brackets have no package of their own.
fn package_names(depends: &str) -> BTreeSet<String> {
    let is_name = |l: &&str| l.starts_with(|c: char| c.is_ascii_alphanumeric()) && !l.contains(':');
    depends.lines().filter(is_name).map(str::to_string).collect()
}

/// Installs packages, or says which command does.
///
/// # Errors
/// [`Stop::Environment`] with the command to type if it is not in our power or apt fails.
pub fn install(ui: &Ui, packages: &[&str], why: &str) -> Result<()> {
    let mut held = held();
    let names = packages.join(" ");
    let ask = |what: String| Stop::Environment { what, todo: vec![command_line(packages)] };
    let power = Power::find();
    match power {
        Power::Root | Power::Sudo => {}
        Power::Ask => return Err(ask(format!("{why} needs the packages {names}")).into()),
        Power::None => {
            let text = format!("{why} needs what Debian calls {names}: please install it by your system's means");
            return Err(Stop::environment(text).into());
        }
    }
    if packages.iter().any(|p| candidate(p).is_none()) {
        fetch_lists(ui, &mut held)?;
    }
    for attempt in 1..=2 {
        let mut step = ui.step(&format!("installing {names}"));
        let mut command = apt_get(power);
        command.args(["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]).args(packages);
        let said = proc::run(&mut command, None, |line| step.at(line))?;
        if said.status.success() {
            step.done(&format!("installed {names}"));
            return Ok(());
        }
        drop(step);
        if attempt == 2 {
            return Err(ask(format!("{why} needs the packages {names}, and apt-get failed:\n{}", said.tail(8))).into());
        }
        // Old lists name versions that are gone from the archive.
        fetch_lists(ui, &mut held)?;
    }
    Ok(())
}

fn apt_get(power: Power) -> Command {
    let mut command = if power == Power::Sudo {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        sudo
    } else {
        Command::new("apt-get")
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    command
}

/// Installs what is missing among `needs`.
///
/// # Errors
/// As [`install`].
pub fn require(ui: &Ui, needs: &[Need], why: &str) -> Result<()> {
    let missing: Vec<&str> = needs.iter().filter(|n| n.find().is_none()).map(|n| n.package).collect();
    if missing.is_empty() { Ok(()) } else { install(ui, &missing, why) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_network_the_message_says_so_and_what_to_do() {
        let said = "Err:1 http://x trixie InRelease\n  Temporary failure resolving 'x'";
        let text = not_fetched("linux-image", said, &["sudo apt-get update"]).to_string();
        assert!(text.contains("cannot fetch linux-image: no network") && text.contains("doctor"), "{text}");
        assert!(!text.contains("apt-get update"), "{text}");
        let other = not_fetched("linux-image", "E: no such package", &["sudo apt-get update"]).to_string();
        assert!(other.contains("E: no such package") && other.contains("sudo apt-get update"), "{other}");
    }

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "rustc:\n  Installed: (none)\n  Candidate: 1.85.0+dfsg3-1\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("1.85.0+dfsg3-1"));
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn names_of_packages_are_told_from_relations() {
        let text = "qemu-system-x86\n  Depends: libaio1\n |Depends: x\n    libaio1:i386\nlibaio1\n<virtual>\nlibaio1\n";
        let policy =
            "libc6:\n  Installed: 1\n  Candidate: 2\n  Version table:\n *** 1 100\nvirtual:\n  Candidate: (none)\n";
        assert_eq!(real_packages(policy), ["libc6"]);
        assert_eq!(package_names(text).into_iter().collect::<Vec<_>>(), ["libaio1", "qemu-system-x86"]);
    }
}
