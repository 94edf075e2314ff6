//! `run --l2 linux-kvm`: Debian's Linux with KVM as the guest hypervisor, and Linux as its guest: with KVM alone on the machine,
//! under nvmx, and on request with KVM in nvmx's place.

use crate::backend::host::L0;
use crate::backend::linux::Job;
use crate::backend::{Backend, Spec};
use crate::boot::tell_failure;
use crate::boot::{self, Outcome};
use crate::cli::{L1, RunArgs};
use crate::cmd::files::Files;
use crate::cmd::run::both;
use crate::image::Wanted;
use crate::l2::LINUX_KVM as NAME;
use crate::report::added;
use crate::report::json::{Run, stages};
use crate::report::linux as report;
use crate::session::{Copies, LONG, Session};
use crate::suite::linux::same_but_for_the_machine;
use crate::transcript::stack;
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::linux::Kernel;
use nvmx_setup::ui::Ui;
use owo_colors::Style;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if one of the boots fails, or if they differ.
pub fn run(ui: &Ui, args: &RunArgs) -> Result<()> {
    if args.depth > 1 {
        return Err(Stop::Usage("--l2 linux-kvm works without --depth".into()).into());
    }
    let files = Files::prepare(ui, args)?;
    let job = Job::parse(&args.l2_args).map_err(Stop::Usage)?;
    let session = usual(Session::start_with(ui, &args.l0, &Wanted::Nvmx)?, args)?.of_run(args)?;
    let linux = session.linux(Kernel::Newest, job.qemu)?;
    let limit = args.l0.timeout.unwrap_or(LONG);
    let mut bare = linux.bare(&session.work("linux"), NAME, &job, &session.machine)?;
    bare.timeout = limit;
    let nested = session.under_nvmx(&bare, format!("{NAME}-nvmx"), &session.options_with_counters(args.fields));
    let peer = if args.l1 == L1::Kvm { Some(session.kvm_in_place(Copies::ByWords)?) } else { None };
    let heading = |text: &str| ui.line(&ui.paint(text, Style::new().bold()));
    heading(&format!("L0 | {}", stack::banner_line(&session.l0(), None)));

    let (alone, under) = both(&session, [&bare, &nested], "Linux in Linux with KVM alone, and under nvmx")?;
    let mut failed = vec![tell_failure(ui, &alone), tell_failure(ui, &under)];
    failed.push(same_but_for_the_machine(&alone, &under).err());
    let in_place = match &peer {
        Some(kvm) => Some(run_peer(ui, &session, kvm.as_ref(), &bare)?),
        None => None,
    };
    if let Some(outcome) = &in_place {
        failed.push(tell_failure(ui, outcome));
    }

    let mut columns = vec![
        report::Column { name: "KVM alone:", said: &alone.transcript },
        report::Column { name: "under nvmx:", said: &under.transcript },
    ];
    columns.extend(in_place.iter().map(|o| report::Column { name: "KVM as L1:", said: &o.transcript }));
    ui.line("");
    heading("What booting Linux as a guest of Linux costs");
    ui.line(&report::render(&columns, &report::KVM, session.backend.unit()));
    ui.line("");
    ui.line(&report::render_nvmx(&under.transcript, &report::KVM));
    ui.line("");
    ui.line(&report::render_reasons(&under.transcript));
    for line in added::lines(&alone.transcript, &under.transcript) {
        ui.line(&line);
    }
    let seconds = |o: &Outcome| format!("{:.1} s", o.took.as_secs_f64());
    ui.line(&format!("KVM alone: {}; under nvmx: {}.", seconds(&alone), seconds(&under)));
    let boots: Vec<&Outcome> = [&alone, &under].into_iter().chain(&in_place).collect();
    files.write(ui, &session, args, run_of(&session, &under, &boots), &under, &boots)?;
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

/// A KVM below is as people have it.
fn usual(session: Session, args: &RunArgs) -> Result<Session> {
    if args.l0.l0 != L0::KvmInBochs {
        return Ok(session);
    }
    let backend = Box::new(session.kvm_on_bochs()?.usual());
    Ok(Session { backend, ..session })
}

/// The stages of these boots as a program reads them.
pub fn run_of(session: &Session, under: &Outcome, boots: &[&Outcome]) -> Run {
    let levels = stack::stack(session.l0(), &under.transcript);
    let run = Run::new(levels, stack::strategy(&under.transcript), session.backend.unit(), Vec::new(), boots);
    let stages = boots.iter().flat_map(|outcome| stages(outcome)).collect();
    Run { stages, ..run }
}

fn run_peer(ui: &Ui, session: &Session, kvm: &dyn Backend, bare: &Spec) -> Result<Outcome> {
    let spec = Spec { name: format!("{NAME}-kvm"), debug_port: false, ..bare.clone() };
    let step = ui.step(&format!("the same under {}", kvm.name()));
    let outcome = boot::boot(&session.paths, kvm, &spec, &View::new(ui, Show::Warnings));
    drop(step);
    outcome
}
