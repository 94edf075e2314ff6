//! Where `run` writes besides the screen: `--json`, `--trace`, `--report`. What cannot be written is told before the boots.

use crate::boot::Outcome;
use crate::cli::RunArgs;
use crate::output::Output;
use crate::proc;
use crate::report::json::{Document, Report, Run};
use crate::report::page::{Format, Page};
use crate::report::stack;
use crate::session::Session;
use crate::trace::record;
use crate::ui::Ui;
use anyhow::Result;
use chrono::{DateTime, Utc};
use std::process::Command;
use std::time::SystemTime;

/// The files of a run.
#[derive(Default)]
pub struct Files {
    json: Option<Output>,
    trace: Option<Output>,
    report: Option<(Output, Format)>,
}

impl Files {
    /// Looks at them and writes nothing.
    ///
    /// # Errors
    /// [`crate::error::Stop::Usage`] if one cannot be written.
    pub fn prepare(ui: &Ui, args: &RunArgs) -> Result<Self> {
        let place = |path: &Option<std::path::PathBuf>| path.as_deref().map(Output::prepare).transpose();
        let report = match &args.report {
            Some(path) => Some((Output::prepare(path)?, Format::of(path)?)),
            None => None,
        };
        let files = Files { json: place(&args.json)?, trace: place(&args.trace)?, report };
        for output in [&files.json, &files.trace] {
            ui.reserve_stdout(output.as_ref());
        }
        Ok(files)
    }

    /// Writes what came of these boots; `under` is the one that the report shows.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(
        &self,
        ui: &Ui,
        session: &Session,
        args: &RunArgs,
        run: Run,
        under: &Outcome,
        boots: &[&Outcome],
    ) -> Result<()> {
        if let Some((output, format)) = &self.report {
            let provenance = provenance(session, under);
            let unit = session.backend.unit();
            let page = Page { l2: &args.l2, run: &run, unit, trace: under.trace.as_ref(), provenance: &provenance };
            output.write(&page.render(*format))?;
            ui.line(&format!("the report is {}", output.name()));
        }
        record::write(ui, boots, self.trace.as_ref())?;
        match &self.json {
            Some(output) => Document::new(Report::Run(Box::new(run))).write(output),
            None => Ok(()),
        }
    }
}

/// Where figures are from, so that they can be had again.
fn provenance(session: &Session, under: &Outcome) -> Vec<(String, String)> {
    let machine = &session.machine;
    let cpus = if machine.cpus == 1 { "1 CPU".into() } else { format!("{} CPUs", machine.cpus) };
    // The words after the program's path, which is this machine's own.
    let words: Vec<String> = std::env::args().skip(1).collect();
    let list = [
        ("command", format!("./nvmx {}", words.join(" "))),
        ("nvmx", format!("{}, {}", env!("CARGO_PKG_VERSION"), revision(session))),
        ("compiler of the images", session.toolchain.text.clone()),
        ("emulator or KVM", session.backend.name()),
        ("machine", format!("{}, {cpus}, {} MiB", session.backend.cpu(machine), machine.memory)),
        ("field access", stack::strategy(&under.transcript)),
        ("exits", if under.trace.is_some() { "recorded by the emulator" } else { "not recorded" }.into()),
        ("time", now()),
    ];
    list.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

fn revision(session: &Session) -> String {
    let git = |args: &[&str]| {
        let said = proc::stdout_of(Command::new("git").arg("-C").arg(&session.paths.root).args(args));
        said.ok().map(|text| text.trim().to_string())
    };
    match (git(&["rev-parse", "--short=12", "HEAD"]), git(&["status", "--porcelain", "--untracked-files=no"])) {
        (Some(hash), Some(changes)) if changes.is_empty() => format!("revision {hash}"),
        (Some(hash), _) => format!("revision {hash} with changes"),
        _ => "no revision known".into(),
    }
}

/// Now, as `2026-11-28 17:05 UTC`.
fn now() -> String {
    told(SystemTime::now().into())
}

fn told(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M UTC").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        let day = |days: i64| told(DateTime::from_timestamp(days * 86_400, 0).unwrap());
        assert_eq!(day(0), "1970-01-01 00:00 UTC");
        assert_eq!(day(11_016), "2000-02-29 00:00 UTC");
        assert_eq!(day(20_785), "2026-11-28 00:00 UTC");
    }
}
