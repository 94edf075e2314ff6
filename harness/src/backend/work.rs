//! Where boots are prepared, and what they have in common.

use super::{Payload, Spec};
use anyhow::Result;
use std::path::PathBuf;

/// A folder for the files of boots, and a boot like all others.
pub struct Work {
    /// The folder
    pub folder: PathBuf,
    /// Nothing is written: boots are only named
    pub dry: bool,
    /// Machine, time and recording of every boot
    pub like: Spec,
}

impl Work {
    /// A boot on this machine.
    pub fn spec(&self, name: String, kernel: Payload, modules: Vec<Payload>) -> Spec {
        Spec { name, kernel, modules, ..self.like.clone() }
    }

    /// An initial file system for the boot with this name, made now.
    ///
    /// # Errors
    /// If it cannot be made or written.
    pub fn initramfs(&self, name: &str, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Payload> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{name}.initramfs"));
        if !self.dry {
            std::fs::write(&path, make()?)?;
        }
        Ok(Payload::new(path, ""))
    }
}
