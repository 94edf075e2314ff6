//! `diff`: the same guests alone on the machine and under nvmx, record by record.

use crate::backend::Spec;
use crate::boot::tell_failure;
use crate::boot::{self, Outcome};
use crate::clamp::{self, Known};
use crate::cli::DiffArgs;
use crate::image::Wanted;
use crate::report::json::{Compared, Diff, Document, GuestDiff, Report};
use crate::report::provenance::{Place, Provenance};
use crate::session::{LONG, Session};
use crate::suite::cases::COMPARED;
use crate::suite::compare::{self, Comparison, Difference};
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::ui::Ui;
use owo_colors::Style;

/// Parts that are tried alone, to show the smallest run that differs.
const TRIED: usize = 3;
const SLOTS: [&str; 2] = ["bare", "nvmx"];

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if a boot fails or a record differs.
pub fn run(ui: &Ui, args: &DiffArgs) -> Result<()> {
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    ui.reserve_stdout(json.as_ref());
    let wanted = args.l2.clone().map_or(Wanted::All, Wanted::Guest);
    let mut session = Session::start_with(ui, &args.l0, &wanted)?;
    // Thousands of cases take their time on the serial line.
    session.timeout = args.l0.timeout.unwrap_or(LONG);
    let mut guests = args.l2.as_deref().map_or(COMPARED.to_vec(), |name| vec![name]);
    if args.shard.is_some_and(|shard| shard.number > 1) {
        guests.retain(|guest| *guest == "vmxtest");
    }
    if args.l2.is_none() && session.backend.below() > 0 {
        // KVM halts vmxtest for good on one of the entries that must fail.
        guests.retain(|guest| *guest != "vmxtest");
        ui.note(
            "vmxtest is left out: alone on KVM it does not come to its end; --l2 vmxtest --l2-args part=NAME chooses",
        );
    }
    let mut total = Comparison::default();
    let (mut problems, mut told) = (Vec::new(), Vec::new());
    for guest in guests {
        let guest_args = args.guest_args(guest);
        let (found, failed) = once(ui, &session, args, guest, &guest_args)?;
        tell(ui, guest, &found);
        smallest(ui, &session, args, guest, &guest_args, &found)?;
        if found.compared == 0 {
            problems.push(format!("{guest} has no check records: nothing is compared"));
        }
        problems.extend(failed);
        let differ = found.differ.iter().map(|difference| difference.key.0.clone()).collect();
        let compared = Compared { compared: found.compared, waived: found.waived, differ };
        told.push(GuestDiff { guest: guest.into(), args: guest_args, compared });
        total.compared += found.compared;
        total.waived += found.waived;
        total.differ.extend(found.differ);
    }
    let summary = format!("compared {}, differ {}, waived {}", total.compared, total.differ.len(), total.waived);
    ui.line(&summary);
    if let Some(output) = &json {
        let from = Provenance::of(&session.paths.root, Some(Place::of(&session)));
        Document::new(from, Report::Diff(Diff { guests: told })).write(output)?;
    }
    if !total.differ.is_empty() {
        problems.insert(0, format!("{} records differ", total.differ.len()));
    }
    if problems.is_empty() { Ok(()) } else { Err(Stop::Guest(problems.join("\n")).into()) }
}

/// Both boots of a guest, at the same time.
fn once(
    ui: &Ui,
    session: &Session,
    args: &DiffArgs,
    guest: &str,
    guest_args: &str,
) -> Result<(Comparison, Vec<String>)> {
    let outcomes = boots(ui, session, args, guest, guest_args)?;
    outcomes.iter().for_each(|outcome| drop(tell_failure(ui, outcome)));
    Ok(compared(&outcomes[0], &outcomes[1]))
}

/// What differs, and which boots failed.
pub fn compared(alone: &Outcome, under: &Outcome) -> (Comparison, Vec<String>) {
    let failed = |outcome: &Outcome| Some(format!("{}: {}", outcome.name, outcome.verdict().err()?));
    let failed = [alone, under].into_iter().filter_map(failed).collect();
    (compare::compare(&alone.transcript, &under.transcript), failed)
}

/// A guest alone, kept to what the other boot sees, and under nvmx.
///
/// # Errors
/// If L0 does not start, or after Ctrl-C.
pub fn boots(ui: &Ui, session: &Session, args: &DiffArgs, guest: &str, guest_args: &str) -> Result<[Outcome; 2]> {
    let specs = [session.bare(guest, guest_args)?, session.nested(guest, guest_args, args.fields)?];
    let what = format!("{guest} {guest_args}");
    let step = ui.step(&format!("{} alone, and under nvmx", what.trim_end()));
    let known = Known::default();
    let boot = |spec: &Spec| {
        let view = View::new(ui, Show::Warnings);
        let outcome = boot::watched(&session.paths, session.backend.as_ref(), spec, |line| {
            view.show(line);
            known.look(&spec.name, line);
        });
        known.over(&spec.name);
        outcome
    };
    let (bare, nested) = std::thread::scope(|scope| {
        let bare = scope.spawn(|| boot(&clamp::clamped(specs[0].clone(), known.wait(&specs[1].name).as_deref())));
        let nested = boot(&specs[1]);
        (bare.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a boot panicked"))), nested)
    });
    drop(step);
    Ok([bare?, nested?])
}

/// Every difference with both records.
fn tell(ui: &Ui, guest: &str, found: &Comparison) {
    for difference in &found.differ {
        let part = difference.part.as_ref().map_or(String::new(), |part| format!(" (part {part})"));
        ui.line(&ui.paint(&format!("{guest}{part}: {}", difference.key.0), Style::new().red()));
        for (slot, record) in SLOTS.iter().zip([&difference.one, &difference.other]) {
            let text = record.as_ref().map_or("(no such record)".to_string(), |r| r.to_string());
            ui.line(&format!("  {slot}: {text}"));
        }
        if difference.one.is_some() && difference.other.is_some() {
            ui.line(&format!("  differs in: {}", difference.keys.join(" ")));
        }
    }
}

/// Tells the smallest run that shows a difference: a part of the guest alone, if that still differs, and of a part that has
/// cases one of them.
fn smallest(
    ui: &Ui,
    session: &Session,
    args: &DiffArgs,
    guest: &str,
    guest_args: &str,
    found: &Comparison,
) -> Result<()> {
    let chosen = |key: &str| guest_args.split_whitespace().any(|word| word.starts_with(key));
    if chosen("case=") || (chosen("part=") && !chosen("part=random")) {
        return Ok(());
    }
    for (part, cases) in parts(&found.differ).into_iter().take(TRIED) {
        let replaced = |word: &&str| {
            let key = word.split_once('=').map_or("", |(key, _)| key);
            key == "part" || cases.split_whitespace().any(|w| w.split_once('=').is_some_and(|(k, _)| k == key))
        };
        let mut words: Vec<&str> = guest_args.split_whitespace().filter(|w| !replaced(w)).collect();
        let part_word = format!("part={part}");
        words.push(&part_word);
        words.extend(cases.split_whitespace());
        let smaller = words.join(" ");
        let (alone, _) = once(ui, session, args, guest, &smaller)?;
        if alone.differ.is_empty() {
            ui.line(&format!("{guest}: part {part} does not differ if it runs alone: what precedes it matters"));
            continue;
        }
        let count = alone.differ.len();
        ui.line(&format!("{guest}: {count} of these differ with ./nvmx diff --l2 {guest} --l2-args '{smaller}'"));
        if cases.starts_with("first=") {
            // Which of them
            tell(ui, guest, &alone);
            smallest(ui, session, args, guest, &smaller, &alone)?;
        }
    }
    Ok(())
}

/// The parts with differences, each once, with the words that choose what differs first in a part that has cases: a group
/// of cases, or one of them.
fn parts(differ: &[Difference]) -> Vec<(&str, String)> {
    let mut parts: Vec<(&str, String)> = Vec::new();
    for difference in differ {
        let Some(part) = difference.part.as_deref() else { continue };
        if !parts.iter().any(|(known, _)| *known == part) {
            let record = difference.one.as_ref().or(difference.other.as_ref());
            let value = |key| record.and_then(|r| r.get(key));
            let words = match (value("case"), value("first").zip(value("cases"))) {
                (Some(case), _) => format!("case={case}"),
                (None, Some((first, cases))) => format!("first={first} cases={cases}"),
                (None, None) => String::new(),
            };
            parts.push((part, words));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn each_part_that_differs_is_tried_once_by_its_first_cases() {
        let bare = ["[L2] part traps", "@L2 check name=a x=1", "@L2 check name=b x=1", "[L2] part random"];
        for (cases, words) in [("case=7", "case=7"), ("first=300 cases=100", "first=300 cases=100")] {
            let cases = |x: u32| format!("@L2 check name=random {cases} x={x}");
            let (left, right) = (cases(1), cases(2));
            let one = transcript(&[bare[0], bare[1], bare[2], bare[3], &left]);
            let other = transcript(&[bare[0], bare[3], &right]);
            let found = compare::compare(&one, &other);
            assert_eq!(found.differ.len(), 3);
            assert_eq!(parts(&found.differ), [("traps", String::new()), ("random", words.into())]);
        }
    }
}
