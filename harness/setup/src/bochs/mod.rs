//! Bochs: version 3.0 built from Debian's source package with a [`series`] of fixes, or what is installed.
//!
//! Our build records every VM exit for whoever sets `NVMX_EXIT_LOG`: `trace/log.rs` of the harness reads the format.

mod build;
pub mod series;
mod source;

pub use build::{patch, patch_of};
pub use source::download;

use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::release::Release;
use crate::ui::Ui;
use crate::{Need, program, require};
use anyhow::{Context, Result};
use build::{Build, build};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An emulator that can be started.
#[derive(Clone, Debug)]
pub struct Bochs {
    /// The program
    pub path: PathBuf,
    /// "3.0"
    pub version: String,
    /// How it is built
    pub flavour: Flavour,
    /// What is lost against our own build
    pub lost: Option<String>,
}

/// Builds differ in their display and in whether the debugger waits for a command first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// No display, no debugger: ours
    Plain,
    /// A distribution's: display by rfb, starts in the debugger
    Debugger,
}

/// The upstream version that the fixes are written for.
const UPSTREAM: &str = "3.0";

/// The BIOS.
pub const BIOS: Need =
    Need::file(&["/usr/share/bochs/BIOS-bochs-latest", "/usr/local/share/bochs/BIOS-bochs-latest"], "bochsbios");
/// The VGA BIOS.
pub const VGA_BIOS: Need = Need::file(
    &[
        "/usr/share/vgabios/vgabios.stdvga.bin",
        "/usr/share/vgabios/vgabios-stdvga.bin",
        "/usr/share/bochs/VGABIOS-lgpl-latest",
        "/usr/share/bochs/VGABIOS-lgpl-latest.bin",
        "/usr/local/share/bochs/VGABIOS-lgpl-latest.bin",
        "/usr/share/vgabios/vgabios.bin",
    ],
    "vgabios",
);
/// What building takes.
pub const BUILD_NEEDS: [Need; 4] = [
    Need::program("g++", "g++"),
    Need::program("make", "make"),
    Need::program("xz", "xz-utils"),
    Need::program("pkg-config", "pkg-config"),
];

/// Where our build is or will be: the folder's name follows from the fixes and the options.
///
/// # Errors
/// As [`series::Series::read`].
pub fn built(paths: &Paths) -> Result<PathBuf> {
    Ok(Build::plain(&paths.root)?.folder(paths).join("bochs"))
}

/// The digest of the fixes and the options of our build, by which two builds are told apart.
///
/// # Errors
/// As [`series::Series::read`].
pub fn digest(paths: &Paths) -> Result<String> {
    Ok(Build::plain(&paths.root)?.digest())
}

/// Finds or builds the Bochs that serves gdb: with one CPU, and a tenth of the speed.
///
/// # Errors
/// [`Stop::Environment`] with what to type.
pub fn set_up_gdb(ui: &Ui, paths: &Paths) -> Result<Bochs> {
    let wanted = Build::with_gdb(&paths.root)?;
    let path = wanted.folder(paths).join("bochs");
    if !path.exists() {
        build(ui, paths, &wanted)?;
    }
    require(ui, &[BIOS, VGA_BIOS], "Bochs")?;
    Ok(Bochs { path, version: UPSTREAM.into(), flavour: Flavour::Plain, lost: None })
}

/// Finds or builds Bochs.
///
/// # Errors
/// [`Stop::Environment`] with what to type.
pub fn set_up(ui: &Ui, paths: &Paths, given: Option<&Path>) -> Result<Bochs> {
    if let Some(path) = given {
        require(ui, &[BIOS, VGA_BIOS], "Bochs")?;
        return look_at(path).map_err(|e| Stop::Usage(format!("--bochs {}: {e}", path.display())).into());
    }
    if let Some(path) = Release::find().map(|release| release.bochs()).filter(|path| path.exists()) {
        require(ui, &[BIOS, VGA_BIOS], "Bochs")?;
        return Ok(Bochs { path, version: UPSTREAM.into(), flavour: Flavour::Plain, lost: None });
    }
    let wanted = Build::plain(&paths.root)?;
    let own = wanted.folder(paths).join("bochs");
    if !own.exists() {
        if let Err(error) = build(ui, paths, &wanted) {
            proc::check_interrupt()?;
            let Some(installed) = program("bochs") else { return Err(error) };
            ui.note(&format!("Bochs 3.0 cannot be built here ({error}); using {}", installed.display()));
            require(ui, &[BIOS, VGA_BIOS], "Bochs")?;
            return look_at(&installed);
        }
    }
    require(ui, &[BIOS, VGA_BIOS], "Bochs")?;
    Ok(Bochs { path: own, version: UPSTREAM.into(), flavour: Flavour::Plain, lost: None })
}

/// Asks a Bochs that we did not build what it is.
///
/// # Errors
/// If it is no Bochs.
pub fn look_at(path: &Path) -> Result<Bochs> {
    let text = ask(path, &["--help"]).context("cannot be started")?;
    let version = version_of(&text).context("does not say that it is a Bochs x86 emulator")?;
    let flavour = flavour_of(&text);
    let lost = lost(&version, flavour);
    Ok(Bochs { path: path.to_path_buf(), version, flavour, lost: Some(lost) })
}

/// What it prints; its help goes to stderr.
fn ask(path: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new(path).args(args).stdin(std::process::Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

/// The CPU models that a Bochs offers.
pub fn models(path: &Path) -> Vec<String> {
    ask(path, &["--help", "cpu"]).map(|text| models_of(&text)).unwrap_or_default()
}

fn models_of(help: &str) -> Vec<String> {
    let after = help.split_once("Supported CPU models:").map_or("", |(_, after)| after);
    let lines = after.lines().map(str::trim).skip_while(|l| l.is_empty());
    lines.take_while(|l| !l.is_empty()).map(str::to_string).collect()
}

fn version_of(help: &str) -> Option<String> {
    Some(help.split_once("Bochs x86 Emulator ")?.1.split_whitespace().next()?.to_string())
}

/// Only a build with the debugger offers `-rc`.
fn flavour_of(help: &str) -> Flavour {
    if help.lines().any(|l| l.trim_start().starts_with("-rc ")) { Flavour::Debugger } else { Flavour::Plain }
}

fn lost(version: &str, flavour: Flavour) -> String {
    let mut lost = vec![
        "without nvmx's fixes an L3 guest that has interrupts off may not be left on an interrupt, posted and virtual \
         interrupts depart from the architecture, and Linux on several CPUs may sleep too long or die",
    ];
    if flavour == Flavour::Debugger {
        lost.push("about a third of the speed");
    }
    if version.starts_with("2.") {
        lost.push("some VMX features (the monitor trap flag, parts of APIC virtualization)");
    }
    lost.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_build_is_known_by_its_debugger_option() {
        let head = "  Bochs x86 Emulator 2.7\n  -f configfile    specify configuration file\n";
        assert_eq!(flavour_of(head), Flavour::Plain);
        assert_eq!(flavour_of(&format!("{head}  -rc filename     execute debugger commands\n")), Flavour::Debugger);
        assert_eq!(version_of(head).as_deref(), Some("2.7"));
        assert!(lost("2.7", Flavour::Debugger).contains("speed"));
    }

    #[test]
    fn the_cpu_models_are_read_from_the_help() {
        let help = "=== \nSupported CPU models:\n\ni386\ntigerlake\n\n000i[SIM   ] quit_sim\n";
        assert_eq!(models_of(help), ["i386", "tigerlake"]);
    }
}
