//! docs/msrs.md is the policy of the code: each MSR with its verdicts and the reason, and what CPUID does not show.

use nvmx::rules::hidden::{EMPTY, HIDDEN};
use nvmx::rules::msr_policy::{BEYOND, Row, TABLE, UNLISTED, Verdict};
use nvmx::rules::switched::{Exits, Host, InNvmx, TABLE as SWITCHED};
use std::fmt::Write;

const PAGE: &str = include_str!("../docs/msrs.md");

fn part(name: &str) -> Option<&'static str> {
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let (_, rest) = PAGE.split_once(begin.as_str())?;
    rest.split_once(end.as_str()).map(|(part, _)| part.trim())
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Passes => "passes",
        Verdict::Switched => "switched",
        Verdict::Answered => "answered",
        Verdict::Refused => "refused",
    }
}

fn line(out: &mut String, index: &str, row: &Row) {
    writeln!(out, "| {index} | {} | {} | {} | {} |", row.name, word(row.read), word(row.write), row.why).unwrap();
}

#[test]
fn the_table_of_msrs_is_that_of_the_code() {
    let mut table = String::from("| MSRs | name | read | write | why |\n|---|---|---|---|---|\n");
    for row in TABLE {
        let index = match row.first == row.last {
            true => format!("{:X}H", row.first),
            false => format!("{:X}H–{:X}H", row.first, row.last),
        };
        line(&mut table, &index, row);
    }
    line(&mut table, "others up to 1FFFH and from C0000000H to C0001FFFH", &UNLISTED);
    line(&mut table, "all others", &BEYOND);
    assert!(part("msrs") == Some(table.trim()), "put this between the marks of docs/msrs.md:\n{table}");
}

#[test]
fn the_table_of_switched_state_is_that_of_the_code() {
    let mut table = String::from(
        "| state | MSR | L3's value | L2's value after an exit | loaded by the entry | saved by the exit | loaded by the exit | in nvmx | writes that exit | why |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in SWITCHED {
        let name = |text: String| {
            if text.is_empty() { "always".into() } else { format!("\"{text}\"").to_lowercase().replace('_', " ") }
        };
        let words = |names: Vec<&str>| name(names.join(" | "));
        let [entry, save] = [
            words(row.entry_load.iter_names().map(|(name, _)| name).collect()),
            words(row.exit_save.iter_names().map(|(name, _)| name).collect()),
        ];
        let load = words(row.exit_load.iter_names().map(|(name, _)| name).collect());
        let msr = row.msr.map_or("–".into(), |index| format!("{index:X}H"));
        let host = match row.host {
            Host::Field(field) => format!("`{}`", field.name()),
            Host::Constant(value) => format!("{value:X}H"),
        };
        let own = match row.in_nvmx {
            InNvmx::Own => "nvmx's",
            InNvmx::Resident => "the guest's stays",
        };
        let exits = match row.exits {
            Exits::Never => "none",
            Exits::ForGuest => "L2's",
            Exits::ForBoth => "L2's and L3's",
        };
        let guest = row.guest.name();
        writeln!(
            table,
            "| {} | {msr} | `{guest}` | {host} | {entry} | {save} | {load} | {own} | {exits} | {} |",
            row.name, row.why
        )
        .unwrap();
    }
    assert!(part("switched") == Some(table.trim()), "put this between the marks of docs/msrs.md:\n{table}");
}

#[test]
fn what_cpuid_does_not_show_is_that_of_the_code() {
    let mut table = String::from("| leaf | register | bits | what |\n|---|---|---|---|\n");
    for row in HIDDEN {
        let (leaf, subleaf) = row.leaf;
        let leaf = if subleaf == 0 { format!("{leaf:X}H") } else { format!("{leaf:X}H.{subleaf}") };
        let register = format!("{:?}", row.register).to_uppercase();
        let bits: Vec<_> = (0..32).filter(|bit| row.bits >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
        let bits = if row.bits == u32::MAX { "all".into() } else { bits.join(" ") };
        writeln!(table, "| {leaf} | {register} | {bits} | {} |", row.name).unwrap();
    }
    for (leaf, name) in EMPTY {
        writeln!(table, "| {leaf:X}H | all | all | {name} |").unwrap();
    }
    assert!(part("cpuid") == Some(table.trim()), "put this between the marks of docs/msrs.md:\n{table}");
}
