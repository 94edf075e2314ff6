//! `run`: the main job. The guest boots twice, alone on the machine and under nvmx; the table puts the costs side by side.

use crate::backend::host::L0;
use crate::backend::{Backend, Spec, Unit};
use crate::boot::{self, Outcome, tell_failure};
use crate::cli::{L1, RecordedBy, RunArgs};
use crate::cmd::files::Files;
use crate::cmd::{depth, gdb, linux, own, xen};
use crate::image::Wanted;
use crate::l2::L2;
use crate::report::json::Run;
use crate::report::{self, spread, table};
use crate::session::{LONG, Session};
use crate::suite::compare;
use crate::transcript::stack;
use crate::transcript::view::{Show, View};
use anyhow::Result;
use l2_protocol::Kind;
use nvmx_setup::error::Stop;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use owo_colors::Style;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if one of the boots fails.
pub fn run(ui: &Ui, args: &RunArgs) -> Result<()> {
    let l2 = L2::find(&args.l2, &Paths::find()?.root)?;
    let own = !args.module.is_empty() || args.initrd.is_some() || args.bare || args.until.is_some() || args.watch;
    if args.trace.is_some() && args.recorder.trace_by == Some(RecordedBy::Nvmx) {
        args.of_one_nvmx()?;
    }
    if let Some(level) = args.gdb {
        return gdb::run(ui, args, &l2, level);
    }
    match l2 {
        L2::LinuxKvm | L2::Xen if own => {
            let text = "--l2 linux-kvm and xen go without --module, --initrd, --bare, --until and --watch";
            Err(Stop::Usage(text.into()).into())
        }
        L2::LinuxKvm => linux::run(ui, args),
        L2::Xen => xen::run(ui, args),
        L2::Guest(_) if !own && args.depth > 1 => depth::run(ui, args),
        L2::Guest(_) if !own => table(ui, args),
        L2::Guest(_) | L2::File(_) | L2::Project(_) => own::run(ui, args, &l2),
    }
}

/// A guest of ours, which measures.
fn table(ui: &Ui, args: &RunArgs) -> Result<()> {
    let files = Files::prepare(ui, args)?;
    let session = Session::start_with(ui, &args.l0, &Wanted::Guest(args.l2.clone()))?.of_run(args)?;
    let unit = session.backend.unit();
    let l2_args = l2_args(args, unit);
    let (bare, nested) = (session.bare(&args.l2, l2_args)?, session.nested(&args.l2, l2_args, args.fields)?);
    let peer = if args.l1 == L1::Kvm { Some(session.kvm_in_place(&args.l0)?) } else { None };
    let l0 = session.l0();
    ui.line(&ui.paint(&format!("L0 | {}", stack::banner_line(&l0, None)), Style::new().bold()));
    session.backend.noise(&session.machine).iter().for_each(|line| ui.note(&format!("noise: {line}")));
    let (bare, nested) = both(&session, [&bare, &nested], &format!("{} alone, and under nvmx", args.l2))?;
    let mut failed = vec![tell_failure(ui, &bare), tell_failure(ui, &nested)];
    let mut events = report::events(Some(&bare.transcript), &nested.transcript);
    let mut in_place = None;
    if let Some(kvm) = peer {
        let name = format!("{}-kvm", args.l2);
        let spec = Spec { name, timeout: args.l0.timeout.unwrap_or(LONG), ..session.bare(&args.l2, l2_args)? };
        let step = ui.step(&format!("{} under {}", args.l2, kvm.name()));
        let peer = boot::boot(&session.paths, &kvm, &spec, &View::new(ui, Show::Warnings))?;
        drop(step);
        report::add_peer(&mut events, &peer.transcript);
        let differs = |e| format!("nvmx and KVM do not do the same: {e}");
        failed.push(tell_failure(ui, &peer).or_else(|| compare::agree(&nested, &peer).err().map(differs)));
        in_place = Some(peer);
    }
    if unit == Unit::Instructions {
        report::add_cycles(&mut events);
    }
    if !events.is_empty() {
        ui.line("");
        ui.line(&ui.paint(&table::title(unit), Style::new().bold()));
        // A guest that came to its end has measured all that there is to measure.
        let late = |outcome: &Outcome| outcome.transcript.of_kind(Kind::End).next().is_none();
        let cut = table::Cut { alone: late(&bare), under: late(&nested) };
        let (text, left_out) = table::fitting(&events, cut, ui.width());
        ui.line(&text);
        if left_out > 0 {
            ui.line(&format!("{left_out} columns did not fit: a wider terminal, --json and --report show them."));
        }
        for line in table::footer(&events, unit).into_iter().chain(spread::lines(&events)) {
            ui.line(&line);
        }
        ui.line(&format!("Alone: {:.1} s; under nvmx: {:.1} s.", bare.took.as_secs_f64(), nested.took.as_secs_f64()));
    }
    let boots: Vec<&Outcome> = [&bare, &nested].into_iter().chain(&in_place).collect();
    let levels = stack::stack(l0, &nested.transcript);
    let run = Run::new(levels, stack::strategy(&nested.transcript), unit, events, &boots);
    files.write(ui, &session, args, run, &nested, &boots)?;
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

/// Two boots, the first alone on the machine and the second under nvmx, whose lines are shown: at a time where instructions are
/// counted, one after the other where time is measured.
///
/// # Errors
/// If L0 does not start, or after Ctrl-C.
pub fn both(session: &Session, [bare, nested]: [&Spec; 2], what: &str) -> Result<(Outcome, Outcome)> {
    let _step = session.ui.step(what);
    let (backend, view) = (session.backend.as_ref(), |show| View::new(&session.ui, show));
    let named = |spec: &Spec| spec.l2().map_or(view(Show::All), |l2| view(Show::All).naming(&l2));
    if backend.unit() == Unit::Cycles {
        // Beside each other they would disturb what is measured.
        let one = boot::boot(&session.paths, backend, bare, &view(Show::Warnings))?;
        return Ok((one, boot::boot(&session.paths, backend, nested, &named(nested))?));
    }
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| boot::boot(&session.paths, backend, bare, &view(Show::Warnings)));
        let two = boot::boot(&session.paths, backend, nested, &named(nested));
        (one.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the boot of {} panicked", bare.name))), two)
    });
    Ok((one?, two?))
}

/// What cascade is told where the TSC counts time: as many brackets as a median needs.
pub const MEDIANS: &str = "events=100 brackets=31";

/// The guest's command line, unless the user has one. KVM in KVM pays so much for each event that cascade raises fewer; where the TSC
/// counts time it measures by many brackets.
fn l2_args(args: &RunArgs, unit: Unit) -> &str {
    let deep = args.l1 == L1::Kvm && args.l0.l0 == L0::KvmInBochs;
    match args.l2_args.as_str() {
        "" if args.l2 == "cascade" && deep => "events=100",
        "" if args.l2 == "cascade" && unit == Unit::Cycles => MEDIANS,
        own => own,
    }
}
