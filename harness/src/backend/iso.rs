//! A boot disk with GRUB, the image and its modules.

use super::{Protocol, Spec};
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use nvmx_setup::proc;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every date on the disk, as `xorriso` writes it: firmware and GRUB read directories, and a boot is to be the same each time.
const DATE: &str = "2026010100000000";

/// What firmware starts GRUB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Platform {
    /// A PC's BIOS
    Bios,
    /// UEFI of 64 bits
    Uefi,
}

impl Platform {
    /// GRUB's name for it.
    const fn folder(self) -> &'static str {
        match self {
            Platform::Bios => "i386-pc",
            Platform::Uefi => "x86_64-efi",
        }
    }

    const fn modules(self) -> &'static str {
        match self {
            Platform::Bios => "multiboot multiboot2 linux normal iso9660 biosdisk",
            Platform::Uefi => "multiboot multiboot2 linux normal iso9660 efi_gop",
        }
    }
}

/// Writes `boot.iso` into the folder.
///
/// # Errors
/// If a file cannot be written or `grub-mkrescue` fails.
pub fn make(spec: &Spec, folder: &Path, platform: Platform) -> Result<PathBuf> {
    let tree = folder.join("iso");
    std::fs::create_dir_all(tree.join("boot/grub"))?;
    let copy = |from: &Path, name: &str| -> Result<()> {
        let text = || format!("cannot put {} on the boot disk", from.display());
        std::fs::copy(from, tree.join("boot").join(name)).with_context(text)?;
        Ok(())
    };
    copy(&spec.kernel.path, "kernel")?;
    for (i, module) in spec.modules.iter().enumerate() {
        copy(&module.path, &format!("module{i}"))?;
    }
    let arguments: Vec<&str> = spec.modules.iter().map(|m| m.args.as_str()).collect();
    std::fs::write(tree.join("boot/grub/grub.cfg"), grub_cfg(spec.protocol, &spec.kernel.args, &arguments))?;
    pack(&tree, folder, platform)
}

fn pack(tree: &Path, folder: &Path, platform: Platform) -> Result<PathBuf> {
    let iso = folder.join("boot.iso");
    let program = nvmx_setup::program("grub-mkrescue").context("grub-mkrescue is missing")?;
    let mut command = Command::new(program);
    command
        .arg("-d")
        .arg(Path::new("/usr/lib/grub").join(platform.folder()))
        .args(["--locales=", "--fonts=", "--themes="])
        .arg(format!("--install-modules={}", platform.modules()))
        .arg("-o")
        .arg(&iso)
        .arg(tree)
        .arg(format!("--modification-date={DATE}"))
        .args(["--", "-volume_date", "all_file_dates", DATE]);
    let said = proc::run(&mut command, None, |_| {})?;
    if !said.status.success() {
        return Err(Stop::environment(format!("grub-mkrescue failed:\n{}", said.tail(10))).into());
    }
    std::fs::remove_dir_all(tree)?;
    Ok(iso)
}

fn grub_cfg(protocol: Protocol, kernel: &str, modules: &[&str]) -> String {
    let (load, module) = match protocol {
        Protocol::Multiboot1 => ("multiboot", "module"),
        // GRUB has no PVH, and does not come between firmware and a drive.
        Protocol::Multiboot2 | Protocol::Pvh | Protocol::Firmware => ("multiboot2", "module2"),
        Protocol::Linux => ("linux", "initrd"),
    };
    let mut text = format!("set timeout=0\nmenuentry nvmx {{\n  {load} /boot/kernel{}\n", words(kernel));
    for (i, args) in modules.iter().enumerate() {
        text.push_str(&format!("  {module} /boot/module{i}{}\n", words(args)));
    }
    text.push_str("  boot\n}\n");
    text
}

/// The words of a command line, each quoted so that GRUB's script language leaves it alone.
fn words(line: &str) -> String {
    line.split_whitespace().map(|w| format!(" '{}'", w.replace('\'', "'\\''"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_menu_loads_the_image_and_its_modules_by_the_protocol_asked_for() {
        let two = grub_cfg(Protocol::Multiboot2, "log=warn fields=trapped", &["n=1", ""]);
        assert_eq!(
            two,
            "set timeout=0\nmenuentry nvmx {\n  multiboot2 /boot/kernel 'log=warn' 'fields=trapped'\n  \
             module2 /boot/module0 'n=1'\n  module2 /boot/module1\n  boot\n}\n"
        );
        let one = grub_cfg(Protocol::Multiboot1, "", &["x"]);
        assert!(one.contains("  multiboot /boot/kernel\n  module /boot/module0 'x'\n"), "{one}");
    }

    #[test]
    fn a_word_cannot_leave_its_quotes() {
        assert_eq!(words("a'b; reboot $x"), " 'a'\\''b;' 'reboot' '$x'");
    }
}
