//! The tools that make a boot disk.

use crate::ui::Ui;
use crate::{Need, require};
use anyhow::Result;

/// What `grub-mkrescue` needs for a BIOS boot from CD.
pub const NEEDS: [Need; 4] = [
    Need::program("grub-mkrescue", "grub-common"),
    Need::file(&["/usr/lib/grub/i386-pc/multiboot2.mod"], "grub-pc-bin"),
    Need::program("xorriso", "xorriso"),
    Need::program("mformat", "mtools"),
];

/// Installs what is missing.
///
/// # Errors
/// As [`crate::apt::install`].
pub fn set_up(ui: &Ui) -> Result<()> {
    require(ui, &NEEDS, "making a boot disk")
}
