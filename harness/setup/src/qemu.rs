//! QEMU for a Linux that has nothing else: the distribution's packages, unpacked into the cache and never installed, and of
//! them only the program, the libraries that it asks for, and the firmware of one machine.

use crate::error::Stop;
use crate::initramfs::Archive;
use crate::paths::Paths;
use crate::ui::Ui;
use crate::{apt, linux::NEEDS, programs, require};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// What is made from the packages; the number changes with what this file does to them.
const FORMAT: &str = "nvmx2";
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
/// Firmware of the machine `pc`, wherever a package has it.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];

/// QEMU and what it needs.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// `bin/`, `lib64/`, `lib/` and `rom/`
    pub folder: PathBuf,
}

impl Qemu {
    /// Puts all of it into an initial file system.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add_to(&self, archive: &mut Archive) -> Result<()> {
        archive.add_folders(&self.folder, &["bin", "lib", "lib64", "rom"])
    }

    /// How it is called there to boot a Linux whose programs speak at the debug port.
    pub fn command_line(cpus: u32, memory: u32, kernel: &str, initramfs: &str, line: &str) -> String {
        format!(
            "/bin/qemu-system-x86_64 -M pc -accel kvm -cpu host -smp {cpus} -m {memory} -nodefaults -no-user-config -display none -vga none -serial null \
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
    let tree = apt::unpacked(&mut step, &apt::with_dependencies(&[PACKAGE])?, work.path())?;
    let output = work.path().join("output");
    collect(&tree, &output)?;
    std::fs::rename(&output, folder)?;
    step.done("QEMU is ready");
    Ok(())
}

/// Takes the program, its libraries and the firmware out of the unpacked packages.
fn collect(tree: &Path, output: &Path) -> Result<()> {
    programs::collect(tree, &[PROGRAM], &[], output)?;
    let rom = output.join("rom");
    std::fs::create_dir_all(&rom)?;
    for name in FIRMWARE {
        let places = ["usr/share/seabios", "usr/share/qemu"].map(|p| tree.join(p).join(name));
        let found = places.iter().find(|p| p.exists()).with_context(|| format!("QEMU's firmware {name} is missing"))?;
        std::fs::copy(found, rom.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_command_line_stays_one_argument() {
        let line = Qemu::command_line(2, 64, "k", "i", "a b=c");
        assert!(
            line.starts_with("/bin/qemu-system-x86_64 ")
                && line.contains(" -smp 2 ")
                && line.ends_with(" -append \"a b=c\""),
            "{line}"
        );
    }
}
