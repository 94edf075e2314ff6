//! Boots that record their exits, and what commands do with the records.

use super::file::{self, Boot};
use super::tree::Levels;
use crate::backend::{Backend, Spec};
use crate::boot::Outcome;
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Where the exits of a boot are recorded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recording {
    /// The folder of the emulator's logs; `None`: that of the boot
    folder: Option<PathBuf>,
    /// nvmx, to know it among the images
    nvmx: PathBuf,
}

impl Recording {
    /// In this folder.
    pub fn new(folder: &TempDir, nvmx: &Path) -> Self {
        Recording { folder: Some(folder.path().to_path_buf()), nvmx: nvmx.to_path_buf() }
    }

    /// Beside the other files of the boot.
    pub fn kept(nvmx: &Path) -> Self {
        Recording { folder: None, nvmx: nvmx.to_path_buf() }
    }

    /// The log of the boot with this name: in the session's folder, or relative to the boot's.
    pub fn log(&self, name: &str) -> PathBuf {
        let file = format!("{}.exits", name.replace('/', "-"));
        self.folder.as_ref().map_or(PathBuf::from(&file), |folder| folder.join(&file))
    }

    /// Who runs what in a boot.
    pub fn levels(&self, spec: &Spec, backend: &dyn Backend) -> Levels {
        file::levels(spec, &self.nvmx, backend.below())
    }

    /// What was recorded, once the boot is over. The log is removed.
    ///
    /// # Errors
    /// If there is none.
    pub fn read(&self, spec: &Spec, backend: &dyn Backend, folder: &Path) -> Result<Boot> {
        let log = folder.join(self.log(&spec.name));
        let boot = Boot::of_emulator(spec, &self.nvmx, backend.below(), backend.unit().name(), &log)?;
        // What cannot be removed does no harm.
        let _ = std::fs::remove_file(&log);
        Ok(boot)
    }
}

/// A folder for logs, removed with the session.
///
/// # Errors
/// If it cannot be made.
pub fn folder(paths: &Paths) -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("exits-").tempdir_in(paths.boots()?)?;
    Ok(made)
}

/// Whether this L0 can record.
///
/// # Errors
/// [`Stop::Usage`] with what can.
pub fn possible(backend: &dyn Backend) -> Result<(), Stop> {
    let text = format!("{} does not record exits: --trace works on Bochs (--l0 bochs, kvm-in-bochs)", backend.name());
    if backend.records() { Ok(()) } else { Err(Stop::Usage(text)) }
}

/// Writes what these boots recorded.
///
/// # Errors
/// If it cannot be written.
pub fn write(ui: &Ui, outcomes: &[&Outcome], output: Option<&Output>) -> Result<()> {
    let Some(output) = output else { return Ok(()) };
    let boots: Vec<&Boot> = outcomes.iter().filter_map(|outcome| outcome.trace.as_ref()).collect();
    file::write(&boots, output)?;
    let exits: Vec<String> = boots.iter().map(|boot| boot.header.name.clone()).collect();
    ui.line(&format!("the exits of {} are in {}: ./nvmx trace {}", exits.join(", "), output.name(), output.name()));
    Ok(())
}
