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
use crate::session::{Copies, LONG, Session};
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
    let peer = if args.l1 == L1::Kvm { Some(session.kvm_in_place(Copies::ByBytes)?) } else { None };
    compared(ui, args, &session, peer.as_deref(), &files)
}

/// The boots of such a guest, with this KVM in nvmx's place as the last one, and their table.
fn compared(
    ui: &Ui,
    args: &RunArgs,
    session: &Session,
    peer: Option<&(dyn Backend + Send)>,
    files: &Files,
) -> Result<()> {
    let unit = session.backend.unit();
    let l2_args = l2_args(args, unit);
    let (bare, nested) = (session.bare(&args.l2, l2_args)?, session.nested(&args.l2, l2_args, args.fields)?);
    let l0 = session.l0();
    ui.line(&ui.paint(&format!("L0 | {}", stack::banner_line(&l0, None)), Style::new().bold()));
    session.backend.noise(&session.machine).iter().for_each(|line| ui.note(&format!("noise: {line}")));
    let (bare, nested) = both(session, [&bare, &nested], &format!("{} alone, and under nvmx", args.l2))?;
    let mut failed = vec![tell_failure(ui, &bare), tell_failure(ui, &nested)];
    let mut events = report::events(Some(&bare.transcript), &nested.transcript);
    let mut in_place = None;
    if let Some(kvm) = peer {
        let name = format!("{}-kvm", args.l2);
        let spec = Spec { name, timeout: args.l0.timeout.unwrap_or(LONG), ..session.bare(&args.l2, l2_args)? };
        let step = ui.step(&format!("{} under {}", args.l2, kvm.name()));
        let peer = boot::boot(&session.paths, kvm, &spec, &View::new(ui, Show::Warnings))?;
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
    files.write(ui, session, args, run, &nested, &boots)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::kvm::Kvm;
    use crate::backend::kvm_in_kvm::KvmInKvm;
    use crate::backend::kvm_linux;
    use crate::cli::{Cli, Cmd};
    use crate::image::Images;
    use crate::session::HOST_MODEL;
    use clap::Parser;
    use serde_json::Value;
    use std::path::Path;
    use tempfile::TempDir;

    const ALONE: &str = "@L2 event name=cpuid handled_by=L2 scope=l3 count=10 ticks=21000\n\
        @L3 check name=a value=1\n@L2 end status=pass failed=0\n";
    const NVMX: &str = "@L2 event name=cpuid handled_by=L2 scope=l3 count=10 ticks=52000 hw_exits=20 l0_exits=90\n\
        @L3 check name=a value=1\n@L2 end status=pass failed=0\n";
    /// What the VMM says at the debug port: its own lines, and its guest's with KVM's counts.
    const KVM: &str = "[vmm INFO ] KVM of Linux 6.12-x, nested=Y ept=Y\n\
        @L2 event name=cpuid handled_by=L2 scope=l3 count=10 ticks=170000 l0_exits=20\n\
        @L3 check name=a value=1\n@L2 end status=pass failed=0\n";

    /// `run --l0 kvm --l1 kvm` with a script for QEMU, which plays what each machine says.
    struct Played {
        folder: TempDir,
        result: Result<()>,
    }

    impl Played {
        fn new(kvm: &str, prepare: impl FnOnce(&Path)) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let at = |name: &str| folder.path().join(name);
            for (name, text) in [("alone", ALONE), ("nvmx", NVMX), ("kvm", kvm), ("console", ""), ("image", "x")] {
                std::fs::write(at(name), text).unwrap();
            }
            prepare(folder.path());
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu.sh");
            std::os::unix::fs::symlink(script, at("qemu")).unwrap();
            let json = at("json").display().to_string();
            let words = ["nvmx", "run", "--l0", "kvm", "--l1", "kvm", "--timeout", "1", "--json", &json];
            let Cmd::Run(args) = Cli::parse_from(words).command else { panic!("it is no run") };
            let ui = Ui::new(false);
            let host = Kvm::new(at("qemu"), "a processor".into()).unwrap();
            let peer = KvmInKvm { kvm: host.clone(), linux: kvm_linux::tests::of_nothing(folder.path()) };
            let mut session = Session::dry(&ui).unwrap();
            session.machine.model = HOST_MODEL.into();
            (session.backend, session.images) = (Box::new(host), Images::unbuilt(&at("image")));
            let result = compared(&ui, &args, &session, Some(&peer), &Files::prepare(&ui, &args).unwrap());
            Played { folder, result }
        }

        fn text(&self, name: &str) -> String {
            std::fs::read_to_string(self.folder.path().join(name)).unwrap()
        }

        fn cpuid(&self, figure: &str) -> Option<f64> {
            let document: Value = serde_json::from_str(&self.text("json")).unwrap();
            document["events"].as_array().unwrap().iter().find(|e| e["event"] == "cpuid").unwrap()[figure].as_f64()
        }

        /// The command has failed for this reason, and has nvmx's figures all the same.
        fn failed(&self, why: &str) {
            let error = self.result.as_ref().unwrap_err();
            assert_eq!(error.downcast_ref::<Stop>().map(Stop::code), Some(1), "{error:#}");
            assert!(error.to_string().contains(why), "{error:#}");
            assert_eq!(self.cpuid("nested"), Some(5200.0));
        }
    }

    #[test]
    fn kvm_takes_nvmxs_place_on_the_same_cpus_and_has_its_column() {
        let played = Played::new(KVM, |_| {});
        played.result.as_ref().unwrap();
        let figures = ["one_level", "nested", "l0_exits", "under_kvm", "kvm_exits"].map(|f| played.cpuid(f));
        assert_eq!(figures, [Some(2100.0), Some(5200.0), Some(9.0), Some(17_000.0), Some(2.0)]);
        // Where time is measured no cycles are modelled.
        assert_eq!((played.cpuid("cycles"), played.cpuid("kvm_cycles")), (None, None));
        let calls = played.text("calls");
        let [alone, nvmx, kvm] = calls.lines().collect::<Vec<_>>()[..] else { panic!("{calls}") };
        let cpus = |call: &str| call.split(" | ").next().map(str::to_string);
        assert!(cpus(alone) == cpus(nvmx) && cpus(nvmx) == cpus(kvm), "{calls}");
        let host = "-M pc -accel kvm -cpu host ";
        assert!([alone, nvmx, kvm].iter().all(|call| call.contains(host) && call.contains(" -smp 1 ")), "{calls}");
        // KVM's guest has the memory of nvmx's machine, and Linux has its own beside it.
        assert!(nvmx.contains(" -m 256 ") && kvm.contains(" -m 768 "), "{calls}");
        assert!(kvm.contains("-kernel") && kvm.contains("/vmlinuz -append console=ttyS0"), "{calls}");
        assert!(kvm.contains("isa-debugcon,iobase=0xe9") && kvm.ends_with("/linux0.initramfs"), "{calls}");
    }

    #[test]
    fn a_kvm_that_cannot_take_nvmxs_place_says_why_and_nvmx_keeps_its_figures() {
        let no_vmx = "[vmm ERROR] kernel module /kvm-intel.ko does not load: x: this CPU has no VMX\n";
        Played::new(no_vmx, |_| {}).failed("this CPU has no VMX");
        let off = "[vmm ERROR] kvm_intel has nesting off: load it with nested=1\n";
        Played::new(off, |_| {}).failed("kvm_intel has nesting off");
        let panicked = |folder: &Path| std::fs::write(folder.join("console"), "Kernel panic - no init\n").unwrap();
        Played::new("", panicked).failed("Linux: Kernel panic - no init");
        let hangs = |folder: &Path| std::fs::write(folder.join("kvm-hangs"), "").unwrap();
        let played = Played::new("", hangs);
        played.failed("cascade-kvm: it did not end within 1 s of CPU time");
        assert_eq!(played.cpuid("under_kvm"), None);
    }

    #[test]
    fn records_that_are_missing_or_others_are_told() {
        let silent =
            "@L2 event name=cpuid handled_by=L2 scope=l3 count=10 ticks=170000\n@L2 end status=pass failed=0\n";
        Played::new(silent, |_| {}).failed("nvmx and KVM do not do the same");
        Played::new(&KVM.replace("value=1", "value=2"), |_| {}).failed("value=1 against 2");
        let unmeasured = "@L3 check name=a value=1\n@L2 end status=pass failed=0\n";
        let played = Played::new(unmeasured, |_| {});
        assert!(played.result.is_ok() && played.cpuid("under_kvm").is_none());
    }
}
