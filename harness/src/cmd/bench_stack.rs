//! `bench --stack`: what L3's boot costs on the usual stack, KVM, nvmx, Linux with KVM, Linux, against `benches/stack.json`.

use super::run::both;
use crate::backend::Spec;
use crate::backend::host::L0;
use crate::backend::linux::Job;
use crate::boot::{self, tell_failure};
use crate::cli::{BenchArgs, L0Args};
use crate::image::Wanted;
use crate::report::provenance::{Place, Provenance};
use crate::report::stack::{Book, Figures, Row};
use crate::session::{Copies, LONG, Session, stack_file};
use crate::suite::linux::same_but_for_the_machine;
use crate::suite::usual::{self, Stack};
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::linux::Kernel;
use nvmx_setup::output::Output;
use nvmx_setup::ui::Ui;

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if a boot fails or a figure is off.
pub fn run(ui: &Ui, args: &BenchArgs) -> Result<()> {
    if !matches!(args.l0.l0, L0::Auto | L0::KvmInBochs) {
        return Err(Stop::Usage("--stack is KVM on the emulated machine: it goes with --l0 kvm-in-bochs".into()).into());
    }
    let stacks = wanted(args.row.as_deref(), args.long);
    if stacks.is_empty() {
        let names = usual::STACKS.map(|stack| stack.name).join("; ");
        return Err(Stop::Usage(format!("--row: no row has that in its name; there are: {names}")).into());
    }
    let l0 = L0Args { l0: L0::KvmInBochs, ..args.l0.clone() };
    let session = Session::start_with(ui, &l0, &Wanted::Nvmx)?;
    let backend = Box::new(session.kvm_on_bochs()?.usual());
    let session = Session { backend, ..session };
    let path = stack_file(&session.paths.root);
    let mut book = Book::read(&path)?;
    let mut failed = Vec::new();
    for stack in stacks {
        let (figures, place) = measure(ui, &session, stack)?;
        ui.line(&format!("{}: {}", stack.name, figures.text()));
        if args.bless {
            let provenance = Provenance::of(&session.paths.root, Some(place));
            book.book(Row { name: stack.name.into(), figures, provenance });
        } else {
            failed.extend(book.judge(stack.name, &figures).err());
        }
    }
    if args.bless {
        Output::prepare(&path)?.write(&book.text()?)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

/// The rows that are asked for.
fn wanted(row: Option<&str>, long: bool) -> Vec<&'static Stack> {
    let wanted = |stack: &&Stack| row.map_or(long || !stack.long, |text| stack.name.contains(text));
    usual::STACKS.iter().filter(wanted).collect()
}

/// Boots one of them with one KVM less, under nvmx, and with KVM in nvmx's place where that is asked for.
fn measure(ui: &Ui, session: &Session, stack: &Stack) -> Result<(Figures, Place)> {
    let job = Job::parse(stack.job).map_err(Stop::Usage)?;
    let linux = session.linux(Kernel::Newest, job.qemu)?;
    let [bare, nested] = stack.boots(session, &linux, &job)?.map(|spec| Spec { timeout: LONG, ..spec });
    let (alone, under) =
        both(session, [&bare, &nested], &format!("{}: with one KVM less, and under nvmx", stack.name))?;
    let mut failed = vec![tell_failure(ui, &alone), tell_failure(ui, &under)];
    failed.push(same_but_for_the_machine(&alone, &under).err());
    let mut in_place = None;
    if stack.beside_kvm {
        let kvm = session.kvm_in_place(Copies::ByWords)?;
        let spec = Spec { name: format!("{}-kvm", bare.name), debug_port: false, ..bare.clone() };
        let step = ui.step(&format!("{}: under {}", stack.name, kvm.name()));
        let outcome = boot::boot(&session.paths, kvm.as_ref(), &spec, &View::new(ui, Show::Warnings))?;
        drop(step);
        failed.push(tell_failure(ui, &outcome));
        in_place = Some(outcome);
    }
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    if !failed.is_empty() {
        return Err(Stop::Guest(failed.join("\n")).into());
    }
    let figures = Figures::of(&alone.transcript, &under.transcript, in_place.as_ref().map(|o| &o.transcript));
    let figures = figures.ok_or_else(|| Stop::Guest(format!("{}: no figures of L3's boot", stack.name)))?;
    let place = Place { memory: bare.machine.memory, cpus: bare.machine.cpus, ..Place::of(session) };
    Ok((figures, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_their_length_or_their_name() {
        let names = |row, long| wanted(row, long).iter().map(|stack| stack.name).collect::<Vec<_>>();
        assert_eq!(names(None, false), ["vmm=own, 1 CPU"]);
        assert_eq!(names(None, true).len(), usual::STACKS.len());
        assert_eq!(names(Some("qemu"), false), ["vmm=qemu, 1 CPU"]);
        assert!(names(Some("xen"), false).is_empty());
    }
}
