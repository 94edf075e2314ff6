//! `bochs`: the faults of Bochs that our build cures, and the cures for whoever wants to send them upstream.

use crate::cli::BochsArgs;
use anyhow::{Context, Result};
use nvmx_setup::bochs::{self, series::Series};
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`Stop::Environment`](nvmx_setup::error::Stop) if the source cannot be fetched, or the file cannot be written.
pub fn run(ui: &Ui, args: &BochsArgs) -> Result<()> {
    let paths = Paths::find()?;
    let series = Series::read(&paths.root)?;
    let Some(file) = &args.patch else {
        series.fixes().iter().for_each(|fix| ui.line(&fix.text()));
        return Ok(());
    };
    let lock = paths.lock(ui)?;
    let patch = bochs::patch(ui, &paths, &series)?;
    drop(lock);
    if file == Path::new("-") {
        ui.line(patch.trim_end());
        return Ok(());
    }
    std::fs::write(file, patch).with_context(|| format!("cannot write {}", file.display()))?;
    ui.line(&format!("{} fixes of Bochs 3.0: {}", series.fixes().len(), file.display()));
    Ok(())
}
