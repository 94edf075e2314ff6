//! The table of controls in docs/support.md is that of the code: what is offered, how, what is refused, and why.

use bitflags::Flags;
use nvmx::rules::caps::{ENTRY, EXIT, Offer, PIN, PRIMARY, SECONDARY, TERTIARY};
use nvmx::rules::refused::{self, Refused};
use std::fmt::Write;

const PAGE: &str = include_str!("../docs/support.md");
const BEGIN: &str = "<!-- controls of src/rules/caps.rs: begin -->\n";
const END: &str = "<!-- controls of src/rules/caps.rs: end -->\n";

fn rows<C: Flags<Bits: PartialEq>>(out: &mut String, title: &str, offers: &[Offer<C>], refusals: &[Refused<C>]) {
    write!(out, "\n### {title}\n\n| control | state | how, or why not |\n|---|---|---|\n").unwrap();
    for flag in C::FLAGS {
        let bits = flag.value().bits();
        let offer = offers.iter().find(|offer| offer.control.bits() == bits);
        let refusal = refusals.iter().find(|refusal| refusal.control.bits() == bits);
        let (state, how) = match (offer, refusal) {
            (Some(offer), None) => ("offered", offer.how),
            (None, Some(refusal)) => ("refused", refusal.why),
            (None, None) => ("refused", "not implemented"),
            (Some(_), Some(_)) => panic!("{} is offered and refused", flag.name()),
        };
        writeln!(out, "| {} | {state} | {how} |", flag.name()).unwrap();
    }
}

#[test]
fn the_table_of_controls_is_that_of_the_code() {
    let mut table = String::new();
    rows(&mut table, "Pin-based controls", PIN, &[]);
    rows(&mut table, "Primary processor-based controls", PRIMARY, &[]);
    rows(&mut table, "Secondary processor-based controls", SECONDARY, refused::SECONDARY);
    rows(&mut table, "Tertiary processor-based controls", TERTIARY, refused::TERTIARY);
    rows(&mut table, "VM-exit controls", EXIT, refused::EXIT);
    rows(&mut table, "VM-entry controls", ENTRY, refused::ENTRY);
    let page = PAGE.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).map(|(table, _)| table.trim());
    assert!(page == Some(table.trim()), "put this between the marks of docs/support.md:\n{table}");
}
