//! Boots that record their exits, and what commands do with the records.

use super::file::{self, Boot};
use super::tree::Levels;
use crate::backend::{Backend, Recording, Spec};
use anyhow::Result;
use l2_protocol::OwnedRecord;
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
pub fn read<'a>(
    spec: &Spec,
    backend: &dyn Backend,
    folder: &Path,
    said: impl Iterator<Item = &'a OwnedRecord>,
) -> Result<Option<Boot>> {
    let Some(recording) = &spec.record else { return Ok(None) };
    let Some(log) = recording.log(&spec.name) else {
        return Ok(Boot::of_ring(spec, &recording.nvmx, backend.unit().name(), said));
    };
    let log = folder.join(log);
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

/// Writes what these boots recorded.
///
/// # Errors
/// If it cannot be written.
pub fn write(ui: &Ui, boots: &[&Boot], output: Option<&Output>) -> Result<()> {
    let Some(output) = output else { return Ok(()) };
    if boots.is_empty() {
        ui.note("nvmx wrote no trace: it cannot when L2 resets the machine or switches it off");
    }
    file::write(boots, output)?;
    let exits: Vec<String> = boots.iter().map(|boot| boot.header.name.clone()).collect();
    ui.line(&format!("the exits of {} are in {}: ./nvmx trace {}", exits.join(", "), output.name(), output.name()));
    Ok(())
}
