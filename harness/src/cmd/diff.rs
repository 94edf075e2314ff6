//! `diff`: the same guests alone on the machine and under nvmx, record by record.

use crate::backend::Spec;
use crate::boot::{self, Outcome};
use crate::clamp::{self, Known};
use crate::cli::DiffArgs;
use crate::cmd::run::tell_failure;
use crate::error::Stop;
use crate::session::{LONG, Session};
use crate::suite::cases::COMPARED;
use crate::suite::compare::{self, Comparison, Difference};
use crate::transcript::{Show, View};
use crate::ui::Ui;
use anyhow::Result;
use owo_colors::Style;

/// Parts that are tried alone, to show the smallest run that differs.
const TRIED: usize = 3;
const SLOTS: [&str; 2] = ["bare", "nvmx"];

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if a boot fails or a record differs.
pub fn run(ui: &Ui, args: &DiffArgs) -> Result<()> {
    let mut session = Session::start(ui, &args.l0)?;
    // Thousands of cases take their time on the serial line.
    session.timeout = args.l0.timeout.unwrap_or(LONG);
    let guests = args.l2.as_deref().map_or(COMPARED.to_vec(), |name| vec![name]);
    let mut total = Comparison::default();
    let mut problems = Vec::new();
    for guest in guests {
        let guest_args = args.guest_args(guest);
        let (found, failed) = once(ui, &session, args, guest, &guest_args)?;
        tell(ui, guest, &found);
        smallest(ui, &session, args, guest, &guest_args, &found)?;
        if found.compared == 0 {
            problems.push(format!("{guest} has no check records: nothing is compared"));
        }
        problems.extend(failed);
        total.compared += found.compared;
        total.waived += found.waived;
        total.differ.extend(found.differ);
    }
    let summary = format!("compared {}, differ {}, waived {}", total.compared, total.differ.len(), total.waived);
    ui.line(&summary);
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
    let outcomes: [Outcome; 2] = [bare?, nested?];
    drop(step);
    let failed = outcomes.iter().filter_map(|outcome| tell_failure(ui, outcome)).collect();
    Ok((compare::compare(&outcomes[0].transcript, &outcomes[1].transcript), failed))
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

/// Tells the smallest run that shows a difference: a part of the guest alone, if that still differs.
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
    for (part, case) in parts(&found.differ).into_iter().take(TRIED) {
        let case = case.map_or(String::new(), |case| format!(" case={case}"));
        let words: Vec<&str> = guest_args.split_whitespace().filter(|w| !w.starts_with("part=")).collect();
        let smaller = format!("{} part={part}{case}", words.join(" ")).trim_start().to_string();
        let (alone, _) = once(ui, session, args, guest, &smaller)?;
        ui.line(&if alone.differ.is_empty() {
            format!("{guest}: part {part} does not differ if it runs alone: what precedes it matters")
        } else {
            let count = alone.differ.len();
            format!("{guest}: {count} of these differ with ./nvmx diff --l2 {guest} --l2-args '{smaller}'")
        });
    }
    Ok(())
}

/// The parts with differences, and the first case of a part that has cases, each part once.
fn parts(differ: &[Difference]) -> Vec<(&str, Option<&str>)> {
    let mut parts: Vec<(&str, Option<&str>)> = Vec::new();
    for difference in differ {
        let Some(part) = difference.part.as_deref() else { continue };
        if !parts.iter().any(|(known, _)| *known == part) {
            let record = difference.one.as_ref().or(difference.other.as_ref());
            parts.push((part, record.and_then(|r| r.get("case"))));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn each_part_that_differs_is_tried_once_by_its_first_case() {
        let bare = ["[L2] part traps", "@L2 check name=a x=1", "@L2 check name=b x=1", "[L2] part random"];
        let cases = |x: u32| format!("@L2 check name=random case=7 x={x}");
        let (left, right) = (cases(1), cases(2));
        let one = transcript(&[bare[0], bare[1], bare[2], bare[3], &left]);
        let other = transcript(&[bare[0], bare[3], &right]);
        let found = compare::compare(&one, &other);
        assert_eq!(found.differ.len(), 3);
        assert_eq!(parts(&found.differ), [("traps", None), ("random", Some("7"))]);
    }
}
