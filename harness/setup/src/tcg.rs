//! QEMU and its firmware, for boots that need no VMX.

use crate::error::Stop;
use crate::proc;
use crate::ui::Ui;
use crate::{Need, grub, require};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// QEMU, with or without KVM.
pub const QEMU: Need = Need::program("qemu-system-x86_64", "qemu-system-x86");

/// The code of UEFI firmware, as packages call it.
const UEFI: Need = Need::file(
    &["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_CODE.fd"],
    "ovmf",
);
/// GRUB for UEFI, beside what it needs for a BIOS.
const GRUB: Need = Need::file(&["/usr/lib/grub/x86_64-efi/multiboot2.mod"], "grub-efi-amd64-bin");

/// What makes the machine without VMX.
#[derive(Clone, Debug)]
pub struct Tools {
    /// qemu-system-x86_64
    pub qemu: PathBuf,
    /// "7.2.1"
    pub version: String,
    /// The code of the UEFI firmware
    pub uefi: PathBuf,
}

impl Tools {
    /// Asks QEMU for its version.
    ///
    /// # Errors
    /// If it does not start.
    pub fn new(qemu: PathBuf, uefi: PathBuf) -> Result<Self> {
        Ok(Tools { version: version(&qemu)?, qemu, uefi })
    }
}

/// What QEMU says of its version: "7.2.1".
///
/// # Errors
/// If it does not start.
pub fn version(qemu: &Path) -> Result<String> {
    let text = proc::stdout_of(Command::new(qemu).arg("--version"))?;
    Ok(text.split_whitespace().nth(3).unwrap_or("?").to_string())
}

/// Installs what is missing.
///
/// # Errors
/// As [`crate::apt::install`], or if QEMU does not start.
pub fn set_up(ui: &Ui) -> Result<Tools> {
    grub::set_up(ui)?;
    require(ui, &[QEMU, UEFI, GRUB], "boots of the loaders on QEMU")?;
    let (Some(qemu), Some(uefi)) = (QEMU.find(), UEFI.find()) else {
        return Err(Stop::environment("QEMU or its firmware is not there although it was installed").into());
    };
    Tools::new(qemu, uefi)
}
