//! `stat`: exits and their cost by level and reason, of a trace or of a boot, live if wanted.

use crate::backend::linux::Job;
use crate::backend::{Payload, Spec, StopAt, xen};
use crate::boot::tell_failure;
use crate::boot::{self, Ended, Outcome};
use crate::cli::{RecordedBy, StatArgs};
use crate::image::Wanted;
use crate::l2::{self, L2};
use crate::report::json::{Document, Report, Stat};
use crate::report::provenance::{Place, Provenance};
use crate::session::{LONG, Recordings, Session};
use crate::trace::log::{self, SIZE};
use crate::trace::stat::{render, rows, title};
use crate::trace::tree::Builder;
use crate::trace::{file, record};
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::linux::Kernel;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a live table is made anew: on a terminal, and where lines stay.
const LIVE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the file is no trace or L0 records nothing, [`Stop::Guest`] if the boot fails.
pub fn run(ui: &Ui, args: &StatArgs) -> Result<()> {
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    ui.reserve_stdout(json.as_ref());
    if let Some(path) = &args.file {
        let trace = file::read(path).map_err(|error| Stop::Usage(format!("{error:#}")))?;
        let boot = trace.boot(args.boot.as_deref()).map_err(Stop::Usage)?;
        return show(ui, boot, json.as_ref(), None);
    }
    let l2 = L2::find(&args.l2, &Paths::find()?.root)?;
    if args.recorder.trace_by == Some(RecordedBy::Nvmx) {
        told_at_the_end(args)?;
    }
    let wanted = if let L2::Guest(name) = &l2 { Wanted::Guest(name.clone()) } else { Wanted::Nvmx };
    let session = Session::start_with(ui, &args.l0, &wanted)?.recording(true, Some(&args.recorder))?;
    if matches!(session.recording, Some(Recordings::Told(_))) {
        told_at_the_end(args)?;
    }
    let spec = spec(ui, args, &session, &l2)?;
    let step = ui.step(&format!("{} with every exit recorded", spec.name));
    let outcome = if args.live { live(ui, &session, &spec)? } else { boot_it(ui, &session, &spec)? };
    drop(step);
    if let Some(boot) = &outcome.trace {
        show(ui, boot, json.as_ref(), Some(Place::of(&session)))?;
    }
    // A guest of the user's need not print records: that it ended is enough.
    let ended_well =
        !matches!(l2, L2::Guest(_) | L2::LinuxKvm | L2::Xen) && !matches!(outcome.ended, Ended::Timeout(_));
    match tell_failure_unless(ui, &outcome, ended_well) {
        None => Ok(()),
        Some(reason) => Err(Stop::Guest(reason).into()),
    }
}

/// nvmx's own trace is there when the boot is over, and of a boot with nvmx.
fn told_at_the_end(args: &StatArgs) -> Result<(), Stop> {
    let text = "nvmx tells its own trace when a boot under it ends: with it, stat works without --live and --bare";
    if args.live || args.bare { Err(Stop::Usage(text.into())) } else { Ok(()) }
}

fn tell_failure_unless(ui: &Ui, outcome: &Outcome, fine: bool) -> Option<String> {
    if fine { None } else { tell_failure(ui, outcome) }
}

/// A trace that was recorded elsewhere has no place.
fn show(ui: &Ui, boot: &file::Boot, json: Option<&Output>, place: Option<Place>) -> Result<()> {
    let rows = rows(&boot.build());
    ui.line(&title(&boot.header.name, &boot.header.unit));
    ui.line(&render(&rows));
    match json {
        Some(output) => {
            let (boot, unit) = (boot.header.name.clone(), boot.header.unit.clone());
            let from = Provenance::of(&Paths::find()?.root, place);
            Document::new(from, Report::Stat(Stat { boot, unit, rows })).write(output)
        }
        None => Ok(()),
    }
}

/// The boot of what is L2, under nvmx or alone.
fn spec(ui: &Ui, args: &StatArgs, session: &Session, l2: &L2) -> Result<Spec> {
    let long = |spec: Spec| Spec { timeout: args.l0.timeout.unwrap_or(LONG), ..spec };
    let bare = match l2 {
        L2::LinuxKvm => {
            let job = Job::parse(&args.l2_args).map_err(Stop::Usage)?;
            let linux = session.linux(Kernel::Newest, job.qemu)?;
            long(linux.bare(&session.work("linux"), &args.l2, &job, &session.machine)?)
        }
        L2::Xen => {
            let job = xen::Job::parse(&args.l2_args).map_err(Stop::Usage)?;
            long(session.xen()?.bare(&session.work("xen"), &args.l2, &job, &session.machine)?)
        }
        L2::Guest(name) => session.bare(name, &args.l2_args)?,
        L2::File(_) | L2::Project(_) => {
            let kernel = crate::l2::build::build(ui, session, l2)?;
            let name = kernel.file_stem().map_or("l2".into(), |name| name.to_string_lossy().into_owned());
            let (protocol, stop) = (l2::protocol(&kernel)?, StopAt { text: None, halt: true });
            Spec { protocol, stop, ..session.spec(name, Payload::new(kernel, &args.l2_args), Vec::new()) }
        }
    };
    if args.bare {
        return Ok(bare);
    }
    let name = format!("{}-nvmx", bare.name.trim_end_matches("-bare"));
    let options = match l2 {
        L2::LinuxKvm | L2::Xen => session.options_with_counters(args.fields),
        _ => session.options(args.fields),
    };
    Ok(session.under_nvmx(&bare, name, &options))
}

fn boot_it(ui: &Ui, session: &Session, spec: &Spec) -> Result<Outcome> {
    boot::boot(&session.paths, session.backend.as_ref(), spec, &View::new(ui, Show::Warnings))
}

/// Boots with a table that grows.
fn live(ui: &Ui, session: &Session, spec: &Spec) -> Result<Outcome> {
    let (Some(path), Some(recording)) = (spec.exit_log(), &spec.record) else { return boot_it(ui, session, spec) };
    let mut grown = Grown::new(Builder::new(record::levels(recording, spec, session.backend.as_ref())));
    let (over, unit) = (AtomicBool::new(false), session.backend.unit().name());
    let terminal = std::io::stdout().is_terminal();
    std::thread::scope(|scope| {
        let boot = scope.spawn(|| {
            let outcome = boot_it(ui, session, spec);
            over.store(true, Ordering::SeqCst);
            outcome
        });
        let mut shown = Instant::now();
        while !over.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(100));
            if shown.elapsed() < LIVE[usize::from(!terminal)] {
                continue;
            }
            shown = Instant::now();
            grown.read(&path);
            if !grown.built.exits.is_empty() {
                let clear = if terminal { "\x1b[H\x1b[2J" } else { "" };
                ui.line(&format!("{clear}{}\n{}", title(&spec.name, unit), render(&rows(&grown.built))));
            }
        }
        boot.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the boot of {} panicked", spec.name)))
    })
}

/// A log that is read while it is written.
struct Grown {
    built: Builder,
    file: Option<File>,
    rest: Vec<u8>,
    head: bool,
}

impl Grown {
    fn new(built: Builder) -> Self {
        Grown { built, file: None, rest: Vec::new(), head: false }
    }

    /// Takes what came since the last time.
    fn read(&mut self, path: &std::path::Path) {
        if self.file.is_none() {
            self.file = File::open(path).ok();
        }
        let Some(file) = &mut self.file else { return };
        // What cannot be read now comes with the whole log in the end.
        let _ = file.read_to_end(&mut self.rest);
        if !self.head && self.rest.len() >= log::HEAD {
            self.rest.drain(..log::HEAD);
            self.head = true;
        }
        if self.head {
            let whole = self.rest.len() / SIZE * SIZE;
            log::records(&self.rest[..whole]).for_each(|record| self.built.add(&record));
            self.rest.drain(..whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::tree::tests::{cascade, nested};
    use std::io::Write;

    #[test]
    fn a_log_is_read_as_it_grows_whatever_the_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut grown = Grown::new(Builder::new(nested()));
        grown.read(&path);
        let whole = log::tests::log(&cascade());
        let mut file = File::create(&path).unwrap();
        for piece in whole.chunks(100) {
            file.write_all(piece).unwrap();
            grown.read(&path);
        }
        assert_eq!(grown.built.exits, Builder::of(nested(), cascade()).exits);
    }
}
