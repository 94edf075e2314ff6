//! `--trace`: the exits of one round of each row of an experiment, as trees.
//!
//! The emulator records every exit, at no cost for the guest, and the guest tells when a row began and how long it took. One
//! exit of the guest stands with all that followed until the guest goes on: what nvmx did, and the exits of its hypervisor.

use super::EXPERIMENTS;
use super::stacks::Stack;
use crate::backend::Spec;
use crate::boot;
use crate::boot::tell_failure;
use crate::session::Session;
use crate::trace::file::Boot;
use crate::trace::text;
use crate::trace::tree::Exit;
use crate::transcript::Transcript;
use crate::transcript::view::{Show, View};
use anyhow::Result;
use l2_protocol::Kind;
use nvmx::vmx::exit::BasicReason;
use nvmx_setup::error::Stop;

/// Trees of a row that are shown.
const MOST: usize = 8;
/// RAX of the VMCALLs by which the guest begins and ends a row.
const MARKS: std::ops::RangeInclusive<u64> = 0x1AB0..=0x1AB1;

/// The row of `price` that docs/lab.md shows.
pub const SAMPLE: &str = "price, cpuid, in the guest:";

/// The boot of one round: under nvmx, of these experiments (none: all).
///
/// # Errors
/// As [`Stack::spec`].
pub fn spec(session: &Session, only: &[&str]) -> Result<Spec> {
    Stack::Nested.spec(session, only, "events=1")
}

/// Boots the lab under nvmx for one round of these experiments and shows the exits, which it gives back.
///
/// # Errors
/// [`Stop::Guest`] if the boot fails.
pub fn run(session: &Session, only: &[&str]) -> Result<Vec<String>> {
    let spec = spec(session, only)?;
    let step = session.ui.step("a boot of the lab under nvmx");
    let outcome = boot::boot(&session.paths, session.backend.as_ref(), &spec, &View::new(&session.ui, Show::Nothing));
    drop(step);
    let outcome = outcome?;
    let failure = tell_failure(&session.ui, &outcome);
    let lines = outcome.trace.as_ref().map(|recorded| rounds(&outcome.transcript, recorded, only)).unwrap_or_default();
    lines.iter().for_each(|line| session.ui.line(line));
    failure.map_or(Ok(lines), |why| Err(Stop::Guest(why).into()))
}

/// The sample among these lines.
pub fn sample(lines: &[String]) -> Vec<String> {
    let from = lines.iter().position(|line| line.starts_with(SAMPLE)).unwrap_or(lines.len());
    let of_row = |(i, line): &(usize, &String)| *i == 0 || line.starts_with(' ');
    lines.iter().skip(from).enumerate().take_while(of_row).map(|(_, line)| line.clone()).collect()
}

/// What of a sample does not depend on the compiler: its lines without their numbers.
pub fn shape(sample: &[String]) -> Vec<String> {
    let kept = |line: &String| line.split('+').next().unwrap_or_default().replace(|c| "0123456789,".contains(c), "");
    sample.iter().map(kept).collect()
}

/// The trees of each row, under its name.
pub fn rounds(transcript: &Transcript, recorded: &Boot, only: &[&str]) -> Vec<String> {
    let built = recorded.build();
    let wanted = |name: &str| EXPERIMENTS.iter().any(|e| e.name == name) && (only.is_empty() || only.contains(&name));
    let mut lines = Vec::new();
    for record in transcript.of_kind(Kind::Event) {
        let get = |key: &str| record.get(key).unwrap_or_default();
        let number = |key: &str| get(key).parse::<u64>().unwrap_or(0);
        let (begin, ticks) = (number("begin"), number("ticks"));
        // A row that holds only facts has no time.
        if !wanted(get("experiment")) || ticks == 0 {
            continue;
        }
        let within = |exit: &Exit| (begin..begin + ticks).contains(&exit.tick);
        let parent = |exit: &Exit| exit.parent.and_then(|parent| built.exits.get(parent as usize));
        // What follows a mark is no part of the round, and a round's own exits stand under those that caused them.
        let of_row = |exit: &Exit| {
            within(exit) && !is_mark(exit) && !parent(exit).is_some_and(|parent| within(parent) || is_mark(parent))
        };
        let roots: Vec<u32> = (0u32..).zip(&built.exits).filter(|(_, exit)| of_row(exit)).map(|(n, _)| n).collect();
        let place = if get("scope") == "l3" { "in the guest" } else { "in its hypervisor itself" };
        let what = match roots.len() {
            0 => "no exit".to_string(),
            1 => "one exit, with those that it caused".to_string(),
            n => format!("{n} exits, each with those that it caused"),
        };
        lines.push(format!("{}, {}, {place}: {what}", get("experiment"), get("name")));
        lines.extend(
            roots.iter().take(MOST).flat_map(|root| text::tree(recorded, &built, *root)).map(|l| format!("  {l}")),
        );
        if roots.len() > MOST {
            lines.push(format!("  ... and {} more", roots.len() - MOST));
        }
    }
    lines
}

fn is_mark(exit: &Exit) -> bool {
    exit.reason().basic() == BasicReason::VMCALL && MARKS.contains(&exit.facts.rax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;
    use crate::trace::file::tests::boot;

    #[test]
    fn a_row_has_the_trees_that_began_in_its_time() {
        let said = transcript(&[
            "@L2 event experiment=price name=cpuid scope=l3 count=1 begin=90 ticks=180 exits=1",
            "@L2 event experiment=price name=rdtsc_passed scope=l3 count=1 begin=400 ticks=30 exits=0",
            "@L2 event experiment=rings name=sidt scope=native count=1 begin=0 ticks=0 exits=0",
        ]);
        let lines = rounds(&said, &boot(), &["price"]);
        assert_eq!(lines[0], "price, cpuid, in the guest: one exit, with those that it caused");
        assert!(lines[1].contains("L3 CPUID"), "{lines:?}");
        // The hypervisor's own exits are under it.
        assert!(lines.iter().any(|l| l.starts_with("  |  #") && l.contains("L2 VMRESUME")), "{lines:?}");
        assert!(lines.iter().any(|l| l.contains("in all 160 instructions: 3 hardware exits")), "{lines:?}");
        assert_eq!(lines.last().unwrap(), "price, rdtsc_passed, in the guest: no exit");
        assert!(rounds(&said, &boot(), &["mmio"]).is_empty());
        assert_eq!(sample(&lines), lines[..lines.len() - 1]);
        assert!(sample(&lines[1..]).is_empty());
        let other: Vec<String> = lines.iter().map(|line| line.replace("160", "1,170")).collect();
        assert_ne!(other, lines);
        assert_eq!(shape(&sample(&other)), shape(&sample(&lines)));
        assert_ne!(shape(&sample(&lines)[1..]), shape(&sample(&lines)));
    }
}
