//! `run --l2 xen`: Debian's Xen as the guest hypervisor, and Linux in a PVH domain as its guest, alone on the machine and under
//! nvmx.

use crate::backend::Spec;
use crate::backend::xen::Job;
use crate::boot::tell_failure;
use crate::cli::{L1, RunArgs};
use crate::cmd::files::Files;
use crate::cmd::linux::run_of;
use crate::cmd::run::both;
use crate::image::Wanted;
use crate::l2::XEN as NAME;
use crate::report::linux as report;
use crate::session::{LONG, Session};
use crate::suite::xen::same_but_for_the_machine;
use crate::transcript::stack;
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use owo_colors::Style;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if one of the boots fails, or if they differ.
pub fn run(ui: &Ui, args: &RunArgs) -> Result<()> {
    if args.l1 == L1::Kvm || args.depth > 1 {
        return Err(Stop::Usage("--l2 xen works without --l1 kvm and --depth".into()).into());
    }
    let files = Files::prepare(ui, args)?;
    let job = Job::parse(&args.l2_args).map_err(Stop::Usage)?;
    let session = Session::start_with(ui, &args.l0, &Wanted::Nvmx)?.of_run(args)?;
    let xen = session.xen()?;
    let bare = xen.bare(&session.work("xen"), NAME, &job, &session.machine)?;
    let bare = Spec { timeout: args.l0.timeout.unwrap_or(LONG), ..bare };
    let nested = session.under_nvmx(&bare, format!("{NAME}-nvmx"), &session.options_with_counters(args.fields));
    let heading = |text: &str| ui.line(&ui.paint(text, Style::new().bold()));
    heading(&format!("L0 | {}", stack::banner_line(&session.l0(), None)));
    let (alone, under) = both(&session, [&bare, &nested], "Linux in Xen alone, and under nvmx")?;
    let mut failed = vec![tell_failure(ui, &alone), tell_failure(ui, &under)];
    failed.push(same_but_for_the_machine(&alone, &under).err());
    let columns = [
        report::Column { name: "Xen alone:", said: &alone.transcript },
        report::Column { name: "under nvmx:", said: &under.transcript },
    ];
    ui.line("");
    heading("What booting Linux as a guest of Xen costs");
    ui.line(&report::render(&columns, &report::XEN, session.backend.unit()));
    ui.line("");
    ui.line(&report::render_nvmx(&under.transcript, &report::XEN));
    ui.line("");
    ui.line(&report::render_reasons(&under.transcript));
    ui.line(&format!("Xen alone: {:.1} s; under nvmx: {:.1} s.", alone.took.as_secs_f64(), under.took.as_secs_f64()));
    let boots = [&alone, &under];
    files.write(ui, &session, args, run_of(&session, &under, &boots), &under, &boots)?;
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}
