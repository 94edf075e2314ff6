//! Where `run` writes besides the screen: `--json`, `--trace`, `--report`. What cannot be written is told before the boots.

use crate::boot::Outcome;
use crate::cli::RunArgs;
use crate::report::json::{Document, Report, Run};
use crate::report::page::{Format, Page};
use crate::report::provenance::{Place, Provenance};
use crate::session::Session;
use crate::trace::{record, text};
use crate::transcript::stack;
use anyhow::Result;
use nvmx_setup::output::Output;
use nvmx_setup::ui::Ui;

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
    /// [`nvmx_setup::error::Stop::Usage`] if one cannot be written.
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
        let from = Provenance::of(&session.paths.root, Some(Place::of(session)));
        if let Some((output, format)) = &self.report {
            let provenance = told(session, &from, under);
            let unit = session.backend.unit();
            let page = Page { l2: &args.l2, run: &run, unit, trace: under.trace.as_ref(), provenance: &provenance };
            output.write(&page.render(*format))?;
            ui.line(&format!("the report is {}", output.name()));
        }
        let recorded: Vec<_> = boots.iter().filter_map(|boot| boot.trace.as_ref()).collect();
        record::write(ui, &recorded, self.trace.as_ref())?;
        match &self.json {
            Some(output) => Document::new(from, Report::Run(Box::new(run))).write(output),
            None => Ok(()),
        }
    }
}

/// Where figures are from, for people.
fn told(session: &Session, from: &Provenance, under: &Outcome) -> Vec<(String, String)> {
    let machine = &session.machine;
    let cpus = if machine.cpus == 1 { "1 CPU".into() } else { format!("{} CPUs", machine.cpus) };
    let list = [
        ("command", from.command.clone()),
        ("nvmx", format!("{}, {}", env!("CARGO_PKG_VERSION"), from.told_revision())),
        ("compiler of the images", session.toolchain.text.clone()),
        ("emulator or KVM", session.backend.name()),
        ("machine", format!("{}, {cpus}, {} MiB", session.backend.cpu(machine), machine.memory)),
        ("field access", stack::strategy(&under.transcript)),
        ("exits", under.trace.as_ref().map_or("not recorded".into(), text::source)),
        ("time", from.date.clone()),
    ];
    list.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}
