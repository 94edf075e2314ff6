//! `run --l2 PATH`: the user's own hypervisor, alone on the machine and under nvmx, with all its text, and how it ended.

use crate::backend::{Payload, Protocol, Spec, StopAt, Unit};
use crate::boot::tell_failure;
use crate::boot::{self, Ended, Outcome};
use crate::cli::{Explain, L1, RunArgs};
use crate::cmd::files::Files;
use crate::image::Wanted;
use crate::l2::{self, L2};
use crate::report::json::{Compared, Run};
use crate::report::{self, table};
use crate::session::{Copies, LONG, Session};
use crate::suite::compare;
use crate::transcript::refusal::Refusal;
use crate::transcript::stack;
use crate::transcript::view::{Show, View};
use crate::transcript::{Line, is_warning};
use anyhow::Result;
use l2_protocol::Kind;
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use std::fmt;
use std::path::PathBuf;

/// How a guest of the user's ended: each has its line and its exit code.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Ending {
    /// `@L2 end status=pass`
    Passed,
    /// `@L2 end` with another status, and what it says
    Failed(String),
    /// A line had the text of `--until`
    Text,
    /// It ended the machine by its exit port, with this code where L0 tells it
    ExitPort(Option<i32>),
    /// Halted with interrupts off
    Halted,
    /// The limit
    Limit(String),
    /// A level died, or nvmx refused to start it
    Died(String),
}

impl Ending {
    /// Of a boot.
    fn of(outcome: &Outcome) -> Self {
        let said = &outcome.transcript;
        let last_word = said.of_kind(Kind::End).next_back();
        match outcome.ended {
            Ended::Text => return Ending::Text,
            // Many a guest says its last word and halts.
            Ended::Halted if last_word.is_none() => return Ending::Halted,
            Ended::Timeout(over) => return Ending::Limit(over.to_string()),
            Ended::Halted | Ended::Itself | Ended::Lingered => {}
        }
        if let Some(epitaph) = said.of_kind(Kind::Epitaph).next() {
            let get = |key| epitaph.get(key).unwrap_or("?");
            return Ending::Died(format!("{} died: {} ({})", get("who"), get("why"), get("where")));
        }
        match last_word.map(|end| (end.get("status"), end.get("failed"))) {
            Some((Some("pass"), _)) => return Ending::Passed,
            Some((Some("fail"), failed)) => return Ending::Failed(format!("{} failures", failed.unwrap_or("?"))),
            Some((other, _)) => {
                let said = other.map_or("no status".into(), |other| format!("status={other}"));
                return Ending::Failed(format!("it says {said}; status=pass and status=fail are known"));
            }
            None => {}
        }
        let refused = |line: &&str| is_warning(line) && line.contains("ERROR");
        match (said.texts().rfind(refused), outcome.machine.last()) {
            (Some(text), _) => Ending::Died(format!("nvmx refused: {text}")),
            (None, Some(text)) if text.contains("PANIC") || said.lines.is_empty() => Ending::Died(text.clone()),
            (None, _) => Ending::ExitPort(outcome.status.filter(|_| outcome.status_is_the_guests())),
        }
    }

    /// Success, or what the command ends with.
    fn result(&self, name: &str, until: Option<&str>) -> Result<(), Stop> {
        let text = format!("{name}: {self}");
        match self {
            Ending::Text => Ok(()),
            Ending::Limit(_) => Err(Stop::Limit(text)),
            Ending::Failed(_) | Ending::Died(_) => Err(Stop::Guest(text)),
            Ending::Halted if until.is_none() => Err(Stop::Halted(text)),
            Ending::Passed | Ending::ExitPort(_) if until.is_none() => Ok(()),
            Ending::Passed | Ending::ExitPort(_) | Ending::Halted => {
                let text = until.map_or(String::new(), |wanted| format!("{text}, and no line had `{wanted}` in it"));
                Err(Stop::Guest(text))
            }
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Passed => write!(f, "ended by its record: passed"),
            Ending::Failed(why) => write!(f, "ended by its record: failed ({why})"),
            Ending::Text => write!(f, "ended by --until: a line has its text"),
            Ending::ExitPort(None) => write!(f, "ended by the exit port"),
            Ending::ExitPort(Some(code)) => write!(f, "ended by the exit port with status {code}"),
            Ending::Halted => write!(f, "ended by a halt with interrupts off"),
            Ending::Limit(text) => write!(f, "ended by the limit: {text}"),
            Ending::Died(text) => write!(f, "{text}"),
        }
    }
}

/// What is booted.
pub struct Image {
    name: String,
    kernel: PathBuf,
    protocol: Protocol,
    modules: Vec<Payload>,
}

/// Runs the command.
///
/// # Errors
/// By how L2 ended under nvmx, or alone with `--bare`; [`Stop::Guest`] too if its records differ.
pub fn run(ui: &Ui, args: &RunArgs, l2: &L2) -> Result<()> {
    let files = Files::prepare(ui, args)?;
    let modules = modules(args)?;
    if let L2::File(path) = l2 {
        // A file that cannot boot is told before anything is set up.
        l2::protocol(path)?;
    }
    let wanted = match l2 {
        L2::Guest(name) => Wanted::Guest(name.clone()),
        _ => Wanted::Nvmx,
    };
    let session = Session::start_with(ui, &args.l0, &wanted)?.of_run(args)?;
    if args.watch {
        return super::watch::run(ui, args, &session, l2, |image| {
            once(ui, args, &session, &looked_at(image, l2, &modules, args)?, &Files::default())
        });
    }
    let image = crate::l2::build::build(ui, &session, l2)?;
    once(ui, args, &session, &looked_at(image, l2, &modules, args)?, &files)
}

/// What L2 gets besides its command line.
///
/// # Errors
/// [`Stop::Usage`] if a file is not there.
pub fn modules(args: &RunArgs) -> Result<Vec<Payload>> {
    let initrd = args.initrd.as_ref().map(|file| l2::payload(&file.to_string_lossy(), "", "--initrd"));
    args.module.iter().map(|text| l2::module(text)).chain(initrd).collect()
}

/// An image as it is to be booted.
///
/// # Errors
/// [`Stop::Usage`] if it cannot boot, or not with these options.
pub fn looked_at(kernel: PathBuf, l2: &L2, modules: &[Payload], args: &RunArgs) -> Result<Image> {
    // Our guests are booted as the tests boot them.
    let protocol = if matches!(l2, L2::Guest(_)) { Protocol::Multiboot2 } else { l2::protocol(&kernel)? };
    if args.initrd.is_some() != (protocol == Protocol::Linux) && (args.initrd.is_some() || modules.len() > 1) {
        let text = "--initrd is for a Linux kernel, whose only module it is; a multiboot image takes --module";
        return Err(Stop::Usage(text.into()).into());
    }
    if protocol == Protocol::Firmware && !(modules.is_empty() && args.l2_args.is_empty()) {
        let text =
            "a disk or CD image is started by firmware, which hands nothing on: no --module, --initrd, --l2-args";
        return Err(Stop::Usage(text.into()).into());
    }
    let name = kernel.file_stem().map_or("l2".into(), |name| name.to_string_lossy().replace(['/', ' '], "-"));
    Ok(Image { name, kernel, protocol, modules: modules.to_vec() })
}

/// The boots of one image.
fn once(ui: &Ui, args: &RunArgs, session: &Session, image: &Image, files: &Files) -> Result<()> {
    let stop = StopAt { text: args.until.clone(), halt: true };
    let bare = Spec { stop, ..alone(session, args, image)? };
    let l0 = session.l0();
    ui.line(&ui.paint(&format!("L0 | {}", stack::banner_line(&l0, None)), Style::new().bold()));
    let boot = |spec: &Spec, show| {
        boot::boot(&session.paths, session.backend.as_ref(), spec, &View::of_stack(ui, show, args.depth))
    };
    if args.bare {
        let step = ui.step(&format!("{} alone", image.name));
        let outcome = boot(&bare, Show::Guest)?;
        drop(step);
        words_of_l0(ui, args, session, &outcome);
        files.write(ui, session, args, run_of(session, &outcome, &[&outcome], None), &outcome, &[&outcome])?;
        return told(ui, &outcome, args);
    }
    let nested = under(session, &bare, args, image)?;
    let step = ui.step(&format!("{} alone, and under nvmx", image.name));
    let view = || View::of_stack(ui, Show::Guest, args.depth).naming(&image.kernel);
    let boot_under = || boot::boot(&session.paths, session.backend.as_ref(), &nested, &view());
    let (alone, under) = if session.backend.unit() == Unit::Cycles {
        // Beside each other they would disturb what is measured.
        (boot(&bare, Show::Nothing)?, boot_under()?)
    } else {
        let (alone, under) = std::thread::scope(|scope| {
            let alone = scope.spawn(|| boot(&bare, Show::Nothing));
            let under = boot_under();
            (alone.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a boot panicked"))), under)
        });
        (alone?, under?)
    };
    drop(step);
    let peer = if args.l1 == L1::Kvm { Some(in_kvm(ui, args, session, &bare, &image.name)?) } else { None };
    let events = report::events(Some(&alone.transcript), &under.transcript);
    if !events.is_empty() {
        ui.line(&table::render(&events));
    }
    let mut problems = Vec::new();
    let compared = compared(ui, &alone, &under, "alone and under nvmx", &mut problems);
    if let Some(peer) = &peer {
        self::compared(ui, &under, peer, "under nvmx and under KVM", &mut problems);
    }
    let boots: Vec<&Outcome> = [&alone, &under].into_iter().chain(&peer).collect();
    files.write(ui, session, args, run_of(session, &under, &boots, compared), &under, &boots)?;
    words_of_l0(ui, args, session, &alone);
    for outcome in [Some(&alone), peer.as_ref()].into_iter().flatten() {
        ui.line(&format!("{}: {}", outcome.name, Ending::of(outcome)));
    }
    told(ui, &under, args)?;
    if problems.is_empty() { Ok(()) } else { Err(Stop::Guest(problems.join("\n")).into()) }
}

/// The boot alone on the machine.
///
/// # Errors
/// [`Stop::Usage`] if the machine lacks the drive for it.
pub fn alone(session: &Session, args: &RunArgs, image: &Image) -> Result<Spec> {
    let kernel = Payload::new(&image.kernel, &args.l2_args);
    let bare = session.spec(format!("{}-bare", image.name), kernel, image.modules.clone());
    let mut bare = Spec { protocol: image.protocol, ..bare };
    if image.protocol == Protocol::Firmware {
        if !session.backend.has_drives() || args.l1 == L1::Kvm {
            let text = "a disk or CD image needs a machine with drives: --l0 bochs or kvm, without --l1 kvm";
            return Err(Stop::Usage(text.into()).into());
        }
        bare.drive = Some(l2::drive(&image.kernel)?);
    }
    Ok(bare)
}

/// The boot under nvmx of what boots alone as `bare` says.
///
/// # Errors
/// [`Stop::Usage`] if firmware would start nothing of its drive.
pub fn under(session: &Session, bare: &Spec, args: &RunArgs, image: &Image) -> Result<Spec> {
    let name = &image.name;
    let mut spec = session.under_nvmx(bare, format!("{name}-nvmx"), &session.options(args.fields));
    if let Some(drive) = &bare.drive {
        spec.modules = vec![l2::boot_sector(session, drive, name)?];
    }
    for _ in 1..args.depth {
        spec.modules.insert(0, spec.kernel.clone());
    }
    spec.machine.memory = spec.machine.memory.saturating_mul(args.depth);
    Ok(spec)
}

fn in_kvm(ui: &Ui, args: &RunArgs, session: &Session, bare: &Spec, name: &str) -> Result<Outcome> {
    let kvm = session.kvm_in_place(Copies::ByBytes)?;
    let timeout = args.l0.timeout.unwrap_or(LONG);
    // KVM's guest halts where the machine's processor does not.
    let stop = StopAt { halt: false, ..bare.stop.clone() };
    let spec = Spec { name: format!("{name}-kvm"), timeout, stop, ..bare.clone() };
    let _step = ui.step("the same with KVM in nvmx's place");
    boot::boot(&session.paths, kvm.as_ref(), &spec, &View::new(ui, Show::Nothing))
}

/// Compares the check records of two boots, if the guest prints any.
fn compared(ui: &Ui, one: &Outcome, other: &Outcome, how: &str, problems: &mut Vec<String>) -> Option<Compared> {
    let found = compare::compare(&one.transcript, &other.transcript);
    if found.compared == 0 {
        return None;
    }
    for difference in &found.differ {
        difference.lines(&one.name, &other.name).iter().for_each(|line| ui.line(&format!("differs: {line}")));
    }
    let (count, differ) = (found.compared, found.differ.len());
    if differ == 0 {
        ui.line(&format!("{count} check records are the same {how}"));
    } else {
        problems.push(format!("{differ} of {count} check records differ {how}"));
    }
    let differ = found.differ.iter().map(|difference| difference.key.0.clone()).collect();
    Some(Compared { compared: count, waived: found.waived, differ })
}

/// How it ended, on the screen and as the command's result.
fn told(ui: &Ui, outcome: &Outcome, args: &RunArgs) -> Result<()> {
    let ending = Ending::of(outcome);
    ui.line(&format!("{}: {ending} ({:.1} s)", outcome.name, outcome.took.as_secs_f64()));
    let result = ending.result(&outcome.name, args.until.as_deref());
    if matches!(ending, Ending::Limit(_) | Ending::Died(_) | Ending::Halted) && result.is_err() {
        let _ = tell_failure(ui, outcome);
    }
    Ok(result?)
}

/// So many different refusals of the machine itself are shown.
const MOST_WORDS: usize = 16;

/// What the machine itself says of what it refused, where L2 was alone on it.
fn words_of_l0(ui: &Ui, args: &RunArgs, session: &Session, alone: &Outcome) {
    if args.explain != Explain::Off {
        let words = session.backend.refused(&alone.folder);
        let (name, rest) = (session.backend.name(), words.len().saturating_sub(MOST_WORDS));
        words.iter().take(MOST_WORDS).for_each(|words| ui.line(&format!("L0 | {name} says: {words}")));
        if rest > 0 {
            ui.line(&format!("L0 | {name} says more, {rest} times: {}", alone.folder.display()));
        }
    }
}

/// What VMX refused, L2's addresses by name.
fn refusals(of: &Outcome) -> Vec<Refusal> {
    of.transcript.of_kind(Kind::Refused).filter_map(|record| Refusal::of(record, of.l2.as_deref())).collect()
}

fn run_of(session: &Session, of: &Outcome, boots: &[&Outcome], compared: Option<Compared>) -> Run {
    let levels = stack::stack(session.l0(), &of.transcript);
    let events = report::events(None, &of.transcript);
    let mut run = Run::new(levels, stack::strategy(&of.transcript), session.backend.unit(), events, boots);
    run.compared = compared;
    run.refusals = refusals(of);
    for (told, boot) in run.boots.iter_mut().zip(boots) {
        let ending = Ending::of(boot);
        told.passed = matches!(ending, Ending::Passed | Ending::Text | Ending::ExitPort(_));
        told.reason = Some(ending.to_string());
        told.text = Some(boot.transcript.lines.iter().map(Line::raw).collect());
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Over, Time};
    use crate::report::tests::transcript;
    use std::time::Duration;

    fn outcome(ended: Ended, lines: &[&str]) -> Outcome {
        Outcome {
            name: "x".into(),
            transcript: transcript(lines),
            ended,
            machine: Vec::new(),
            took: Duration::ZERO,
            used: None,
            status: Some(1),
            l2: None,
            folder: PathBuf::new(),
            trace: None,
        }
    }

    fn code(ended: Ended, lines: &[&str], until: Option<&str>) -> u8 {
        Ending::of(&outcome(ended, lines)).result("x", until).err().map_or(0, |stop| stop.code())
    }

    #[test]
    fn every_way_to_end_has_its_exit_code() {
        let late = Ended::Timeout(Over::Limit(Time::Instructions(7)));
        let end = "@L2 end status=pass failed=0";
        for (ended, lines, expected) in [
            (Ended::Itself, &[end][..], 0),
            (Ended::Lingered, &[end], 0),
            (Ended::Itself, &["hello"], 0),
            (Ended::Itself, &["@not a record", "@@"], 0),
            (Ended::Text, &["ready"], 0),
            (Ended::Itself, &["@L2 end status=fail failed=3"], 1),
            (Ended::Itself, &["@L1 epitaph who=L2 where=0x10 why=\"triple fault\""], 1),
            (Ended::Itself, &["[nvmx ERROR] module 0: no header"], 1),
            (late, &["hello"], 4),
            (Ended::Halted, &["hello"], 5),
            (Ended::Halted, &[end], 0),
            (Ended::Halted, &["@L2 end status=fail failed=3"], 1),
            (Ended::Itself, &["@L2 end status=0x0"], 1),
        ] {
            assert_eq!(code(ended, lines, None), expected, "{ended:?} {lines:?}");
        }
        let dead = Outcome { machine: vec![">>PANIC<< 3rd exception".into()], ..outcome(Ended::Itself, &[]) };
        assert_eq!(Ending::of(&dead), Ending::Died(">>PANIC<< 3rd exception".into()));
        let other = Ending::of(&outcome(Ended::Halted, &["@L2 end status=0x0"]));
        assert!(other.to_string().contains("it says status=0x0; status=pass and status=fail are known"), "{other}");
    }

    #[test]
    fn without_the_text_that_was_waited_for_nothing_is_a_success() {
        for (ended, lines, expected) in [
            (Ended::Text, &["ready"][..], 0),
            (Ended::Itself, &["@L2 end status=pass failed=0"], 1),
            (Ended::Itself, &["bye"], 1),
            (Ended::Halted, &["bye"], 1),
        ] {
            assert_eq!(code(ended, lines, Some("ready")), expected);
        }
    }
}
