//! QEMU and its firmware, for boots that need no VMX.

use super::{Need, grub, require};
use crate::backend::kvm::QEMU;
use crate::backend::tcg::Tools;
use crate::error::Stop;
use crate::ui::Ui;
use anyhow::Result;

/// The code of UEFI firmware, as packages call it.
const UEFI: Need = Need::file(
    &["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_CODE.fd"],
    "ovmf",
);
/// GRUB for UEFI, beside what it needs for a BIOS.
const GRUB: Need = Need::file(&["/usr/lib/grub/x86_64-efi/multiboot2.mod"], "grub-efi-amd64-bin");

/// Installs what is missing.
///
/// # Errors
/// As [`super::apt::install`], or if QEMU does not start.
pub fn set_up(ui: &Ui) -> Result<Tools> {
    grub::set_up(ui)?;
    require(ui, &[QEMU, UEFI, GRUB], "boots of the loaders on QEMU")?;
    let (Some(qemu), Some(uefi)) = (QEMU.find(), UEFI.find()) else {
        return Err(Stop::environment("QEMU or its firmware is not there although it was installed").into());
    };
    Tools::new(qemu, uefi)
}
