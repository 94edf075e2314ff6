//! QEMU for a Linux that has nothing else: the distribution's packages, unpacked into the cache and never installed, and of
//! them only the program, the libraries that it asks for, and the firmware of one machine.

use super::{apt, linux::NEEDS, require};
use crate::backend::initramfs::Archive;
use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::ui::Ui;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is made from the packages; the number changes with what this file does to them.
const FORMAT: &str = "nvmx1";
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
/// Where the ABI says that a program finds its loader.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// Where packages have libraries.
const LIBRARIES: [&str; 3] =
    ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];
/// Firmware of the machine `pc`, wherever a package has it.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];

/// QEMU and what it needs.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// `qemu`, `lib64/`, `lib/` and `rom/`
    pub folder: PathBuf,
}

impl Qemu {
    /// Puts all of it into an initial file system.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add_to(&self, archive: &mut Archive) -> Result<()> {
        for folder in ["lib", "lib64", "rom"] {
            archive.add_folder(folder)?;
            let mut files: Vec<PathBuf> =
                std::fs::read_dir(self.folder.join(folder))?.flatten().map(|e| e.path()).collect();
            files.sort();
            for path in files {
                let name = path.file_name().and_then(|n| n.to_str()).context("a file has a strange name")?;
                archive.add_file(&format!("{folder}/{name}"), &path)?;
            }
        }
        archive.add_file("qemu", &self.folder.join("qemu"))
    }

    /// How it is called there to boot a Linux whose programs speak at the debug port.
    pub fn command_line(cpus: u32, memory: u32, kernel: &str, initramfs: &str, line: &str) -> String {
        format!(
            "/qemu -M pc -accel kvm -cpu host -smp {cpus} -m {memory} -nodefaults -no-user-config -display none -vga none -serial null \
             -debugcon stdio -no-reboot -L /rom -kernel /{kernel} -initrd /{initramfs} -append \"{line}\""
        )
    }
}

/// QEMU out of the cache, or fetched now.
///
/// # Errors
/// [`Stop::Environment`] if the packages cannot be had or are not what they should be.
pub fn set_up(ui: &Ui, paths: &Paths) -> Result<Qemu> {
    require(ui, &NEEDS, "QEMU on the emulated machine")?;
    if apt::Power::find() == apt::Power::None {
        let text = "QEMU for the emulated machine comes from Debian packages, and there is no apt here";
        return Err(Stop::environment(text).into());
    }
    let folder = || {
        let version = apt::candidate(PACKAGE)?.replace([':', '/'], "-");
        Some(paths.cache.join(format!("qemu-{FORMAT}-{version}")))
    };
    if let Some(folder) = folder().filter(|folder| folder.exists()) {
        return Ok(Qemu { folder });
    }
    apt::refresh(ui)?;
    let folder = folder().ok_or_else(|| Stop::environment(format!("the package archive has no {PACKAGE}")))?;
    if !folder.exists() {
        fetch(ui, paths, &folder)?;
    }
    Ok(Qemu { folder })
}

fn fetch(ui: &Ui, paths: &Paths, folder: &Path) -> Result<()> {
    let mut step = ui.step("fetching QEMU and its libraries");
    // Everything happens beside the final place, which appears whole or not at all.
    let work = tempfile::Builder::new().prefix(".qemu-").tempdir_in(&paths.cache)?;
    let tree = apt::unpacked(&mut step, &with_dependencies()?, work.path())?;
    let output = work.path().join("output");
    collect(&tree, &output)?;
    std::fs::rename(&output, folder)?;
    step.done("QEMU is ready");
    Ok(())
}

/// The package and all that it depends on, as far as they are packages.
fn with_dependencies() -> Result<Vec<String>> {
    let mut command = Command::new("apt-cache");
    command.args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
    command.args(["--no-replaces", "--no-enhances", PACKAGE]);
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

/// Takes the program, its libraries and the firmware out of the unpacked packages.
fn collect(tree: &Path, output: &Path) -> Result<()> {
    for folder in ["lib", "lib64", "rom"] {
        std::fs::create_dir_all(output.join(folder))?;
    }
    let copy = |from: &Path, to: &str| -> Result<()> {
        std::fs::copy(from, output.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    // A link in the packages would lead out of the tree.
    let name = Path::new(LOADER).file_name().unwrap_or_default();
    let places = LIBRARIES.map(|l| tree.join(l).join(name));
    let loader = places.into_iter().find(|p| p.is_file()).context("the packages have no loader for programs")?;
    copy(&tree.join(PROGRAM), "qemu")?;
    copy(&loader, LOADER)?;
    let path = LIBRARIES.map(|l| tree.join(l).display().to_string()).join(":");
    // The loader itself says what the program will ask for.
    let mut list = Command::new(&loader);
    let said = proc::stdout_of(list.args(["--library-path", &path, "--list"]).arg(tree.join(PROGRAM)))?;
    for line in said.lines() {
        // A name with a folder is the loader's own, which is there.
        let Some((name, place)) = line.trim().split_once(" => ").filter(|(name, _)| !name.contains('/')) else {
            continue;
        };
        let place = place.split(" (").next().unwrap_or_default();
        ensure!(place.starts_with('/'), "QEMU asks for {name}, which no package brought");
        copy(Path::new(place), &format!("lib/{name}"))?;
    }
    for name in FIRMWARE {
        let places = ["usr/share/seabios", "usr/share/qemu"].map(|p| tree.join(p).join(name));
        let found = places.iter().find(|p| p.exists()).with_context(|| format!("QEMU's firmware {name} is missing"))?;
        copy(found, &format!("rom/{name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_packages_are_told_from_relations() {
        let text = "qemu-system-x86\n  Depends: libaio1\n |Depends: x\n    libaio1:i386\nlibaio1\n<virtual>\nlibaio1\n";
        let policy =
            "libc6:\n  Installed: 1\n  Candidate: 2\n  Version table:\n *** 1 100\nvirtual:\n  Candidate: (none)\n";
        assert_eq!(real_packages(policy), ["libc6"]);
        assert_eq!(package_names(text).into_iter().collect::<Vec<_>>(), ["libaio1", "qemu-system-x86"]);
    }

    #[test]
    fn the_kernels_command_line_stays_one_argument() {
        let line = Qemu::command_line(2, 64, "k", "i", "a b=c");
        assert!(
            line.starts_with("/qemu ") && line.contains(" -smp 2 ") && line.ends_with(" -append \"a b=c\""),
            "{line}"
        );
    }
}
