//! `vmcs`: the fields of vmcs12, vmcs02 and vmcs01 at an exit of a trace.

use crate::cli::VmcsArgs;
use crate::trace::vmcs::{Fields, render};
use crate::trace::{file, text};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the file is no trace, or has no such boot, exit or field.
pub fn run(ui: &Ui, args: &VmcsArgs) -> Result<()> {
    let (path, number) = split(&args.place).map_err(Stop::Usage)?;
    let trace = file::read(Path::new(path)).map_err(|error| Stop::Usage(format!("{error:#}")))?;
    let boot = trace.boot(args.boot.as_deref()).map_err(Stop::Usage)?;
    if boot.header.source == file::Source::Ring {
        let text =
            "nvmx's own trace has no fields of VMCSs: this needs a trace of the emulator (--l0 bochs, kvm-in-bochs)";
        return Err(Stop::Usage(text.into()).into());
    }
    let mut lines = Fields::at(boot, number).map_err(Stop::Usage)?.lines();
    if let Some(wanted) = &args.field {
        let wanted = wanted.to_uppercase();
        lines.retain(|line| line.field.name().contains(&wanted));
        if lines.is_empty() {
            return Err(Stop::Usage(format!("no field that these VMCSs have has `{wanted}` in its name")).into());
        }
    }
    let built = boot.build();
    if let Some(exit) = built.exits.get(number as usize) {
        ui.line(&text::head(boot, number, exit));
        ui.line(&format!("why: {}; {}", exit.why, text::after(boot, exit)));
        ui.line("");
    }
    render(&lines, boot.header.levels.guests.len() > 1).iter().for_each(|line| ui.line(line));
    Ok(())
}

/// `FILE@N`
fn split(place: &str) -> Result<(&str, u32), String> {
    let help = || format!("`{place}` is not FILE@N, a trace and the number of an exit in it");
    let (path, number) = place.rsplit_once('@').ok_or_else(help)?;
    Ok((path, number.trim_start_matches('#').parse().map_err(|_| help())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_file_and_a_number() {
        assert_eq!(split("a@b@12").unwrap(), ("a@b", 12));
        assert_eq!(split("a@#7").unwrap(), ("a", 7));
        assert!(split("a").is_err() && split("a@b").is_err());
    }
}
