//! Bochs: version 3.0 built from Debian's source package with a [`series`] of fixes, or what is installed.
//!
//! Our build records every VM exit for whoever sets `NVMX_EXIT_LOG`: `trace/log.rs` of the harness reads the format.

pub mod series;

use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::release::Release;
use crate::ui::Ui;
use crate::{Need, apt, program, require, sources};
use anyhow::{Context, Result, ensure};
use series::Series;
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

/// All that its models of processors have; `--enable-all-optimizations` alone leaves alignment checks out.
const CONFIGURE: [&str; 17] = [
    "--with-nogui",
    "--enable-all-optimizations",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    "--enable-cet",
    "--enable-uintr",
    "--enable-protection-keys",
    "--enable-amx",
    "--enable-memtype",
    "--enable-perfmon",
    "--enable-alignment-check",
    "--enable-pci",
    "--enable-smp",
    "--disable-docbook",
];

/// The stub looks at each instruction, so that no chain of them runs at once.
const WITH_GDB: [&str; 2] = ["--enable-gdb-stub", "--disable-handlers-chaining"];

/// One build of ours.
struct Build {
    series: Series,
    options: Vec<&'static str>,
    name: &'static str,
}

impl Build {
    /// The one that boots.
    fn plain(root: &Path) -> Result<Self> {
        Ok(Build { series: Series::read(root)?, options: CONFIGURE.to_vec(), name: "Bochs 3.0" })
    }

    /// The one that serves gdb.
    fn with_gdb(root: &Path) -> Result<Self> {
        let options = CONFIGURE.into_iter().chain(WITH_GDB).collect();
        Ok(Build { series: Series::read_with_gdb(root)?, options, name: "Bochs 3.0 with a gdb stub" })
    }

    fn digest(&self) -> String {
        format!("{:016x}", self.series.digest(&self.options))
    }

    fn folder(&self, paths: &Paths) -> PathBuf {
        paths.cache.join(format!("bochs-{UPSTREAM}-{}", self.digest()))
    }
}

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
/// As [`Series::read`].
pub fn built(paths: &Paths) -> Result<PathBuf> {
    Ok(Build::plain(&paths.root)?.folder(paths).join("bochs"))
}

/// The digest of the fixes and the options of our build, by which two builds are told apart.
///
/// # Errors
/// As [`Series::read`].
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

/// All fixes as one patch against the unpacked source.
///
/// # Errors
/// If the source cannot be fetched, or a fix does not go in.
pub fn patch(ui: &Ui, paths: &Paths, series: &Series) -> Result<String> {
    require(ui, &BUILD_NEEDS, "unpacking the source of Bochs 3.0")?;
    let work = tempfile::Builder::new().prefix("bochs-").tempdir_in(&paths.cache)?;
    patch_of(work.path(), &download(ui, work.path())?, series)
}

/// All fixes as one patch against the source in this archive, which is unpacked in `work`.
///
/// # Errors
/// If a fix does not go in.
pub fn patch_of(work: &Path, tarball: &Path, series: &Series) -> Result<String> {
    series.patch(&unpacked(work, tarball)?)
}

/// Fetches and unpacks the source, as it is, into a folder of `work`.
fn unpack(ui: &Ui, work: &Path) -> Result<PathBuf> {
    unpacked(work, &download(ui, work)?)
}

fn unpacked(work: &Path, tarball: &Path) -> Result<PathBuf> {
    let source = work.join("source");
    std::fs::create_dir(&source)?;
    let mut tar = Command::new("tar");
    tar.args(["--strip-components=1", "-xf"]).arg(tarball).arg("-C").arg(&source);
    must(&proc::run(&mut tar, None, |_| {})?, "unpacking Bochs")?;
    Ok(source)
}

fn build(ui: &Ui, paths: &Paths, wanted: &Build) -> Result<()> {
    let what = format!("building {}", wanted.name);
    require(ui, &BUILD_NEEDS, &what)?;
    let work = tempfile::Builder::new().prefix("bochs-").tempdir_in(&paths.cache)?;
    let source = unpack(ui, work.path())?;
    let mut step = ui.step(&what);
    wanted.series.apply(&source)?;
    // The folder is a temporary one: make sure that no file of it looks newer than what was made from it.
    let mut configure = Command::new("./configure");
    configure.args(&wanted.options).current_dir(&source);
    must(&proc::run(&mut configure, None, |line| step.at(line))?, "configuring Bochs")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new("make");
    make.arg(format!("-j{jobs}")).current_dir(&source);
    must(&proc::run(&mut make, None, |line| step.at(&short(line)))?, "building Bochs")?;
    let output = work.path().join("output");
    std::fs::create_dir(&output)?;
    std::fs::copy(source.join("bochs"), output.join("bochs")).context("the build left no bochs")?;
    let found = look_at(&output.join("bochs"))?;
    ensure!(found.version == UPSTREAM, "the built Bochs says it is {}", found.version);
    let folder = wanted.folder(paths);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::rename(&output, &folder)?;
    step.done(&format!("{} is built", wanted.name));
    Ok(())
}

fn must(said: &proc::Said, what: &str) -> Result<()> {
    if said.status.success() {
        Ok(())
    } else {
        Err(Stop::environment(format!("{what} failed:\n{}", said.tail(15))).into())
    }
}

/// The file that a long compiler line is about.
fn short(line: &str) -> String {
    let source = |w: &&str| w.ends_with(".cc") || w.ends_with(".a") || w.ends_with(".o");
    line.split_whitespace().rev().find(source).unwrap_or("").to_string()
}

/// Fetches the source into a folder of `work` by apt, from the archive that the machine uses anyway: apt checks signature, size and digest.
///
/// # Errors
/// [`Stop::Environment`] if it cannot be had.
pub fn download(ui: &Ui, work: &Path) -> Result<PathBuf> {
    if apt::Power::find() == apt::Power::None {
        return Err(
            Stop::environment("Bochs 3.0 is built from Debian's source package, and there is no apt here").into()
        );
    }
    let (id, codename) = sources::distribution()?;
    let entries = sources::of_machine(Path::new("/etc/apt"));
    let archive = sources::main_archive(&entries, &codename)
        .ok_or_else(|| Stop::environment("apt has no archive with the component main"))?;
    let mut step = ui.step("fetching the source of Bochs 3.0");
    let mut last = String::new();
    for (suite, component) in suites(&id) {
        let tree = work.join(format!("apt-{suite}"));
        for folder in ["lists/partial", "cache/archives/partial", "sources.list.d", "download"] {
            std::fs::create_dir_all(tree.join(folder))?;
        }
        let paragraph = sources::source_paragraph(archive, suite, component);
        std::fs::write(tree.join("sources.list.d/nvmx.sources"), paragraph)?;
        let apt = |args: &[&str]| {
            let mut command = Command::new("apt-get");
            for (key, value) in
                [("Dir::State::lists", "lists"), ("Dir::Cache", "cache"), ("Dir::Etc::sourceparts", "sources.list.d")]
            {
                command.arg("-o").arg(format!("{key}={}", tree.join(value).display()));
            }
            // Without this apt, when root, drops to a user who may not enter the cache folder.
            command.args(["-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::sourcelist=/dev/null"]);
            command.args(args).current_dir(tree.join("download")).env("LC_ALL", "C.UTF-8");
            command
        };
        let updated = proc::run(&mut apt(&["update"]), None, |line| step.at(line))?;
        let mut fetch = apt(&["source", "--download-only", "--tar-only", "bochs"]);
        let fetched = proc::run(&mut fetch, None, |line| step.at(line))?;
        if let Some(tarball) = tarball_in(&tree.join("download")) {
            if fetched.status.success() {
                drop(step);
                return Ok(tarball);
            }
        }
        last = format!("{}\n{}", updated.text, fetched.text);
    }
    Err(apt::not_fetched("the source of Bochs 3.0", last.trim(), &[]).into())
}

/// Releases whose archive has Bochs 3.0.
fn suites(id: &str) -> &'static [(&'static str, &'static str)] {
    if id == "ubuntu" { &[("questing", "universe"), ("resolute", "universe")] } else { &[("trixie", "main")] }
}

fn tarball_in(folder: &Path) -> Option<PathBuf> {
    let is_it = |name: &str| name.starts_with("bochs_3.0") && name.contains(".orig.tar.") && !name.ends_with(".asc");
    let files = std::fs::read_dir(folder).ok()?.flatten();
    files.map(|e| e.path()).find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(is_it))
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

    #[test]
    fn the_live_line_shows_the_file_that_is_compiled() {
        assert_eq!(short("g++ -c -I.. -O3 cpu/vmx.cc -o cpu/vmx.o"), "cpu/vmx.o");
        assert_eq!(short("make[1]: Entering directory"), "");
    }
}
