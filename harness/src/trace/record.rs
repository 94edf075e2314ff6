//! Boots that record their exits, and what commands do with the records.

use super::file::{self, Boot};
use super::tree::Levels;
use crate::backend::{Backend, Recording, Spec};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use std::path::Path;
use tempfile::TempDir;

/// Who runs what in a boot.
pub fn levels(recording: &Recording, spec: &Spec, backend: &dyn Backend) -> Levels {
    file::levels(spec, &recording.nvmx, backend.below())
}

/// What was recorded, once the boot is over, if it was. The log is removed.
///
/// # Errors
/// If there is none.
pub fn read(spec: &Spec, backend: &dyn Backend, folder: &Path) -> Result<Option<Boot>> {
    let Some(recording) = &spec.record else { return Ok(None) };
    let log = folder.join(recording.log(&spec.name));
    let boot = Boot::of_emulator(spec, &recording.nvmx, backend.below(), backend.unit().name(), &log)?;
    // What cannot be removed does no harm.
    let _ = std::fs::remove_file(&log);
    Ok(Some(boot))
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
pub fn write(ui: &Ui, boots: &[&Boot], output: Option<&Output>) -> Result<()> {
    let Some(output) = output else { return Ok(()) };
    file::write(boots, output)?;
    let exits: Vec<String> = boots.iter().map(|boot| boot.header.name.clone()).collect();
    ui.line(&format!("the exits of {} are in {}: ./nvmx trace {}", exits.join(", "), output.name(), output.name()));
    Ok(())
}
