//! The boot tests of what nvmx loads as L2, and of what L2 finds at its first instruction.

use super::{Case, Judge, Suite, compare, fixtures::Fixtures, messages, refused};
use crate::backend::{Line, Payload, Protocol, Spec};
use crate::boot::Outcome;
use crate::session::Session;
use std::path::PathBuf;
use std::time::Duration;

/// It says three lines.
const SOON: Duration = Duration::from_secs(60);
/// The last line of nvmx before L2 starts.
const LAST_OF_NVMX: &str = "@L1 hello ";
/// The flags of multiboot 1 information for symbols: they are of the image that the loader loads, so of nvmx.
const SYMBOLS: u32 = 0b11 << 4;

/// Adds the boots and cases.
pub fn add(suite: &mut Suite, session: &Session, fixtures: &Fixtures) {
    let none = Vec::new;
    let bare = |file: PathBuf| Spec {
        protocol: Protocol::Multiboot1,
        timeout: SOON,
        ..session.spec(String::new(), Payload::new(file, ""), none())
    };
    let nested = |file, protocol| Spec { protocol, ..session.under_nvmx(&bare(file), String::new(), "log=info") };
    for (name, spec) in [
        ("flat-bare", bare(fixtures.flat())),
        // If nobody waited for the end of nvmx's last line, a fast one would hide it.
        ("flat", Spec { line: Line::AsProgrammed, ..nested(fixtures.flat(), Protocol::Multiboot2) }),
        ("flat-multiboot1", nested(fixtures.flat(), Protocol::Multiboot1)),
        ("astray", nested(fixtures.astray(), Protocol::Multiboot2)),
    ] {
        suite.boots.insert(name.into(), Ok(Spec { name: name.into(), ..spec }));
    }
    let mut case = |name: &str, boots: &[&str], judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    let name = "a flat multiboot image finds under nvmx what it finds bare";
    case(name, &["flat-bare", "flat"], Box::new(|o| compare::agree(o[0], o[1])));
    // GRUB tells other things by the second version.
    let name = "a flat image is told under nvmx, loaded by the first version of multiboot, all that it is told bare";
    let same: Judge = Box::new(|o| compare::agree(o[0], o[1]).and_then(|()| told_all(o[0], o[1])));
    case(name, &["flat-bare", "flat-multiboot1"], same);
    let name = "nvmx's last line is whole although L2 resets the serial port at once";
    case(name, &["flat"], Box::new(|o| whole(o[0])));
    let name = "a flat image whose entry point is not in it is refused";
    case(name, &["astray"], Box::new(|o| refused(o[0], messages::ASTRAY)));
}

/// The flags of the boot information that the guest got.
fn flags(outcome: &Outcome) -> Result<u32, String> {
    let said = outcome.transcript.records().find_map(|record| record.get("text")?.strip_prefix("flags-"));
    said.and_then(|digits| u32::from_str_radix(digits, 16).ok()).ok_or_else(|| format!("{}: no flags", outcome.name))
}

/// Under nvmx nothing is missing that the loader tells a guest itself.
fn told_all(bare: &Outcome, nested: &Outcome) -> Result<(), String> {
    match flags(bare)? & !SYMBOLS & !flags(nested)? {
        0 => Ok(()),
        missing => Err(format!("the boot information lacks what has flags {missing:#x}")),
    }
}

/// nvmx's last record before the guest's first one has all its fields.
fn whole(outcome: &Outcome) -> Result<(), String> {
    let mut lines = outcome.transcript.records().map(ToString::to_string);
    let hello = lines.find(|line| line.starts_with(LAST_OF_NVMX)).ok_or("nvmx's last line before L2 is no record")?;
    let next = lines.next().unwrap_or_default();
    if !hello.contains(" features=") || !next.starts_with("@L2 check name=flat ") {
        return Err(format!("nvmx's last line is `{hello}`, the next one `{next}`"));
    }
    Ok(())
}
